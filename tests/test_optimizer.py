"""Learning rates: their schedule, and those of parts of a model."""

import pytest
import torch
from test_families import FAMILIES, config_of
from transformers import AutoModelForImageTextToText

from vogue.config.training_sections import OptimizerConfig
from vogue.model.optimizer import lr_factor, parameter_groups
from vogue.model.policy import Policy
from vogue.settings import ConfigError


def factors(updates, **settings):
    return [lr_factor(update, updates, OptimizerConfig(**settings)) for update in range(updates + 1)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1]),
        ({"warmup_ratio": 0.5}, [1 / 3, 2 / 3, 1, 1, 1]),
        ({"lr_scheduler_type": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"lr_scheduler_type": "linear", "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        # (1 + cos 45 degrees) / 2 = 0.853553...
        ({"lr_scheduler_type": "cosine"}, [1, 0.8535534, 0.5, 0.1464466, 0]),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1, "warmup_steps": 2}, [1 / 3, 2 / 3, 1, 0.55, 0.1]),
        ({"lr_scheduler_type": "cosine", "warmup_ratio": 1.0}, [0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_the_rate_of_every_update(settings, expected):
    assert factors(4, **settings) == pytest.approx(expected)


def test_a_run_that_goes_on_for_longer_stays_at_the_floor():
    assert lr_factor(9, 4, OptimizerConfig(lr_scheduler_type="linear", min_lr_ratio=0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("settings", [{"warmup_steps": 2, "warmup_ratio": 0.1}, {"min_lr_ratio": 0.1}])
def test_settings_that_contradict_each_other_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=r"set one of them|doesn't fall"):
        OptimizerConfig(**settings)


@pytest.fixture(params=FAMILIES)
def policy(request):
    with torch.device("meta"):
        return Policy(AutoModelForImageTextToText.from_config(config_of(request.param)), 1.0)


def names_of(policy, group):
    mine = {id(parameter) for parameter in group["params"]}
    return {name.removeprefix("model.model.") for name, parameter in policy.named_parameters() if id(parameter) in mine}


def test_tower_projector_and_text_model_have_rates_of_their_own(policy):
    text, tower, projector = parameter_groups(policy, OptimizerConfig(vision_lr=1e-7, projector_lr=1e-5))
    assert "lr" not in text and tower["lr"] == 1e-7 and projector["lr"] == 1e-5
    assert all("merger" in name or "projector" in name for name in names_of(policy, projector))
    assert all(
        name.startswith(("visual.", "vision_tower.")) and "merger" not in name for name in names_of(policy, tower)
    )
    assert not any(word in name for name in names_of(policy, text) for word in ("visual", "vision", "projector"))
    counted = [parameter for group in (text, tower, projector) for parameter in group["params"]]
    assert len(counted) == len({id(parameter) for parameter in counted}) == len(list(policy.parameters()))


def test_the_projector_keeps_to_the_text_models_rate_where_it_has_none_of_its_own(policy):
    text, tower = parameter_groups(policy, OptimizerConfig(vision_lr=1e-7))
    assert any("merger" in name or "projector" in name for name in names_of(policy, text))
    assert not any("merger" in name for name in names_of(policy, tower))


def test_a_rate_of_what_is_frozen_is_refused(policy):
    getattr(policy.model.model, policy.family.tower).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"optimizer\.vision_lr=1e-07: nothing of the vision tower"):
        parameter_groups(policy, OptimizerConfig(vision_lr=1e-7))


def test_a_step_moves_each_part_by_its_own_rate(new_trainer):
    rates = ["optimizer.vision_lr=1e-4", "optimizer.projector_lr=2e-5", "optimizer.lr_scheduler_type=linear"]
    trainer = new_trainer(*rates, "optimizer.weight_decay=0", "trainer.steps=2")
    before = {name: parameter.detach().clone() for name, parameter in trainer.policy.named_parameters()}
    trainer.run_step()
    moved = {name: float((x.detach() - before[name]).abs().max()) for name, x in trainer.policy.named_parameters()}

    def largest(has, lacks=""):
        return max(v for name, v in moved.items() if has in name and not (lacks and lacks in name))

    # Adam's first step is the rate in each direction that has a gradient.
    assert largest("visual", "merger") == pytest.approx(1e-4, rel=0.02)
    assert largest("merger") == pytest.approx(2e-5, rel=0.02)
    assert largest("language_model") == pytest.approx(1e-3, rel=0.02)
    assert trainer.run_step().metrics["lr"] < 1e-3
