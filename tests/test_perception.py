"""PAPO: black squares, the divergence from the view that has them, and what it adds to the loss."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import launch
from steps import batches_of, objective_of
from test_kl import with_rewards
from test_policy import (
    PAD_ID,
    TEMPERATURE,
    alone,
    assert_equal_gradients,
    copy_of,
    in_double,
    kinds,  # noqa: F401
    row,
)

from vogue.cli import main
from vogue.method.kl import Reference, divergence
from vogue.method.perturb import perturb
from vogue.model.packing import collate
from vogue.model.policy import Policy
from vogue.rollout.engine import media_token_ids
from vogue.settings import ConfigError

# ------------------------------------------------------------------------------------------------------- the squares

WHITE = Image.new("RGB", (210, 150), "white")


def masked(image=WHITE, **settings):
    return np.asarray(perturb(image, "mask", **({"patch": 10} | settings)))


def test_squares_of_a_grid_are_black_and_all_else_is_as_it_was():
    pixels = masked(seed=3)
    cells = pixels.reshape(15, 10, 21, 10, 3)
    assert (cells == cells[:, :1, :, :1]).all()  # each is of one colour
    assert set(np.unique(pixels)) == {0, 255}
    assert (masked(seed=3) == pixels).all() and (masked(seed=4) != pixels).any()
    photo = Image.fromarray(np.random.default_rng(0).integers(1, 256, (150, 210, 3), dtype=np.uint8))
    seen = masked(photo, seed=3)
    assert (seen == np.asarray(photo) * (pixels > 0)).all()


def test_as_many_are_black_as_asked_for_and_those_at_the_edge_are_cut():
    large = Image.new("RGB", (2000, 2000), "white")
    assert (masked(large, share=0.6) == 0).mean() == pytest.approx(0.6, abs=0.01)
    assert (masked(large, share=0.0) == 255).all() and not masked(large, share=1.0).any()
    cut = masked(Image.new("RGB", (25, 14), "white"), patch=10)
    assert cut.shape == (14, 25, 3)
    for rows, columns in ((slice(10, 14), slice(20, 25)), (slice(0, 10), slice(20, 25))):
        assert len(np.unique(cut[rows, columns])) == 1


# -------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("gradient", ["clean", "both"])
def test_divergences_have_gradients_through_the_views_that_are_asked_for(gradient, kinds, preprocessor, new_model):  # noqa: F811
    plain, banned = new_model().double(), media_token_ids(preprocessor.processor)
    names = ("one image", "another image")
    rows = [row(preprocessor, kinds[name], (3, 2), sigma=0.8, seed=i) for i, name in enumerate(names)]
    batch = in_double(collate([*rows, row(preprocessor, kinds["no image"], (4,), seed=3)], PAD_ID, token_mean=True))
    policy = Policy(copy_of(plain), TEMPERATURE, banned, perception=gradient)
    stats = policy(batch)
    assert stats.other.kl_own_other.requires_grad
    assert not Policy(copy_of(plain), TEMPERATURE, banned)(batch).other.kl_own_other.requires_grad

    def logps(view):
        return torch.cat(
            [alone(plain, r.prompt, r.views[view], c.token_ids, banned) for r in rows for c in r.completions]
        )

    own, other = logps("noisy"), logps("raw")  # these rows are trained on the noisy view
    other = other if gradient == "both" else other.detach()
    kl, reverse = (own.exp() * (own - other)).sum(1), (other.exp() * (other - own)).sum(1)
    entropy = -(other.exp() * other).sum(1)
    for found, expected in ((stats.other.kl_own_other, kl), (stats.other.kl_other_own, reverse)):
        assert found.sub(expected).abs().max() < 1e-9 and expected.max() > 1e-4
    weights = torch.linspace(-1, 2, len(kl), dtype=torch.float64)
    (weights * (stats.other.kl_own_other - 2 * stats.other.kl_other_own)).sum().backward(retain_graph=True)
    if gradient == "both":
        (weights * stats.other.entropy).sum().backward()
        kl = kl + entropy
    (weights * (kl - 2 * reverse)).sum().backward()
    assert_equal_gradients(policy, plain)


# ------------------------------------------------------------------------------------------------------- the trainer

MASK = ("perturb.preset=mask", "branch.rollout=raw", "branch.probability=0", "perception.kl_coef=0.5")
ESTIMATES = [
    ("exact", "forward"),
    ("exact", "reverse"),
    ("k1", "forward"),
    ("k3", "forward"),
    ("low_var_kl", "forward"),
]


@pytest.mark.parametrize(("estimator", "direction"), ESTIMATES)
def test_the_loss_is_less_by_the_divergence_of_every_token(new_trainer, estimator, direction):
    trainer = new_trainer(*MASK, f"perception.estimator={estimator}", f"perception.direction={direction}")
    groups = with_rewards(trainer, 1.0, 1.0)  # A = 0: without the term nothing would be trained on
    batches = batches_of(trainer, groups)
    assert all(batch.others for batch in batches) and sum(int((batch.weights > 0).sum()) for batch in batches) > 8
    batch = batches[0]
    stats = trainer.policy(batch)
    found = objective_of(trainer, batch, trainer.signals(batch, stats))
    other = stats.other
    terms = {
        "exact": {"forward": other.kl_own_other, "reverse": other.kl_other_own}[direction],
        **{
            name: divergence(stats.logprob, stats.logprob.detach(), Reference(other.logprob, other.kl_own_other), name)
            for name in ("k1", "k3", "low_var_kl")
        },
    }
    assert float(found.loss) == pytest.approx(-0.5 * float(terms[estimator].sum()), rel=1e-4)
    assert abs(float(found.loss)) > 1e-3
    assert found.metrics["perception_kl"].total == pytest.approx(float(other.kl_own_other.sum()), rel=1e-5)


def test_the_entropy_of_the_masked_view_is_made_smaller(new_trainer):
    settings = ("perception.gradient=both", "perception.entropy_coef=0.1")
    trainer = new_trainer(*MASK, *settings)
    batch = batches_of(trainer, with_rewards(trainer, 1.0, 1.0))[0]
    stats = trainer.policy(batch)
    found = objective_of(trainer, batch, trainer.signals(batch, stats))
    by_hand = -0.5 * stats.other.kl_own_other.sum() + 0.1 * stats.other.entropy.sum()
    assert float(found.loss) == pytest.approx(float(by_hand), rel=1e-5)


def test_the_method_is_grpo_with_the_papers_weights(config):
    found = config("method=papo", "branch.rollout=raw")
    assert (found.perturb.preset, found.perturb.patch, found.perturb.share) == ("mask", 14, 0.6)
    assert (found.perception.kl_coef, found.kl.coef) == (0.02, 0.01)
    assert found.guidance.alpha_per == found.guidance.alpha_out == found.branch.probability == 0
    for wrong, told in (
        (("perception.estimator=k3",), r"^perception\.estimator=k3: with perception\.kl_coef=0 nothing reads it$"),
        ((*MASK, "perception.direction=reverse", "perception.estimator=k3"), "direction=reverse is computed exactly"),
        ((*MASK, "perception.entropy_coef=0.1"), r"with perception\.gradient=clean that entropy has no gradient"),
        (("perception.kl_coef=0.1", "branch.rollout=drawn"), "completions are trained on T.x. itself"),
        (("perturb.patch=8",), r"^perturb\.patch=8: perturb\.preset=noise doesn't read it$"),
        (("perturb.preset=mask", "perturb.sigma=0.2"), r"^perturb\.sigma=0\.2: perturb\.preset=mask doesn't read it$"),
    ):
        with pytest.raises(ConfigError, match=told):
            config(*wrong)


def test_a_step_measures_and_trains_what_it_asks_for(new_trainer):
    trainer = new_trainer("method=papo", "branch.rollout=raw", "perception.kl_coef=0.2")
    metrics, groups = trainer.run_step()
    assert metrics["perception_kl"] > 0 and metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["noisy_share"] == 0 and all(
        group.view == "raw" for group in groups
    )  # nothing is generated from T(x)


def test_an_update_through_both_views_makes_the_divergence_larger(new_trainer):
    # Through the clean one alone it needn't: the masked view follows, since both have the same weights.
    trainer = new_trainer(*MASK, "perception.gradient=both")
    batch = batches_of(trainer, with_rewards(trainer, 1.0, 1.0))[0]
    before = objective_of(trainer, batch)
    before.loss.backward()
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad
    after = objective_of(trainer, batch)
    assert after.metrics["perception_kl"].total > 1.02 * before.metrics["perception_kl"].total


CURVES = ("reward", "loss", "entropy", "kl", "perception_kl", "grad_norm", "tokens")


@pytest.mark.long
@pytest.mark.parametrize("gradient", ["clean", "both"])
def test_two_ranks_train_as_one_does_and_go_on_as_if_they_had_not_stopped(settings, mixed_data, tmp_path, gradient):
    chosen = [*settings, "method=papo", "branch.rollout=raw", f"perception.gradient={gradient}"]
    chosen += [f"data.train={mixed_data}", "rollout.n=4", "perception.kl_coef=0.1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *chosen, f"trainer.output_dir={one}", "trainer.steps=3"]) == 0
    for more in (("trainer.steps=1",), ("trainer.steps=3", "--resume")):
        launch(2, "--module", "vogue.train", *chosen, f"trainer.output_dir={two}", *more)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=2e-3)
