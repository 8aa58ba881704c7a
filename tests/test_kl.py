"""KL to a reference: its estimators by hand, the policy beside one, and what it changes in loss and rewards."""

import json
from dataclasses import replace

import pytest
import torch
from ranks import launch
from steps import batches_of, generated, objective_of, rows_of
from test_lora import adapted, filled
from test_policy import (
    PAD_ID,
    TEMPERATURE,
    alone,
    assert_equal_gradients,
    copy_of,
    in_double,
    kinds,  # noqa: F401
    row,
    untied,
)

from vogue.cli import main
from vogue.method.kl import ESTIMATORS, Reference, divergence
from vogue.metrics import Clock, Means
from vogue.model.packing import collate
from vogue.model.policy import Policy
from vogue.model.reference import check_reference
from vogue.rewards import Score
from vogue.rollout.engine import media_token_ids
from vogue.settings import ConfigError
from vogue.step.groups import judged

# ---------------------------------------------------------------------------------------------------- the estimators

POLICY, REFERENCE = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
KL = 0.173287  # ½ log 2 + 0 + ¼ log ½ = ¼ log 2
GRADIENT = (0.259930, -0.043322, -0.216608)  # of the logits: π (log π/ref − KL)
REVERSE = (0.25, 0.0, -0.25)  # π − ref: that of KL(ref‖π)


def mean_over_tokens(estimator, old):
    """The mean over v ~ old of an estimate and of its gradient, by enumeration."""
    logits = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    logp, reference = logits.log_softmax(-1), torch.tensor(REFERENCE, dtype=torch.float64).log()
    old = torch.tensor(old, dtype=torch.float64)
    exact = (logp.exp() * (logp - reference)).sum().expand(3)
    found = (old * divergence(logp, old.log(), Reference(reference, exact), estimator)).sum()
    found.backward()
    return found.item(), logits.grad.tolist()


@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
@pytest.mark.parametrize("old", [POLICY, (0.2, 0.3, 0.5)], ids=["on-policy", "off-policy"])
def test_in_the_mean_value_and_gradient_are_those_of_the_kl(estimator, old):
    value, gradient = mean_over_tokens(estimator, old)
    assert value == pytest.approx(KL, abs=1e-6) and gradient == pytest.approx(GRADIENT, abs=1e-6)


def test_the_usual_k3_has_the_kls_value_and_the_gradient_of_the_other_one():
    value, gradient = mean_over_tokens("low_var_kl", POLICY)
    assert value == pytest.approx(KL, abs=1e-6) and gradient == pytest.approx(REVERSE, abs=1e-6)


def test_one_token_by_hand():
    # π = ½, π_old = ¼, ref = 1: l = −log 2, ρ = 2
    logprob, old = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    found = {name: divergence(logprob, old, Reference(torch.zeros(1), torch.ones(1)), name) for name in ESTIMATORS}
    by_hand = {"exact": 1.0, "k1": -1.386294, "k3": 0.613706, "low_var_kl": 0.306853}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_token_that_the_policy_all_but_lost_has_finite_values_and_gradients(estimator):
    logprob = torch.tensor([-300.0], requires_grad=True)
    value = divergence(logprob, torch.zeros(1), Reference(torch.zeros(1), logprob * 0), estimator)
    value.sum().backward()
    assert value.isfinite().all() and logprob.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------- the policy


@pytest.fixture
def batch(kinds, preprocessor):  # noqa: F811
    noisy = [row(preprocessor, kinds[name], (3, 2), sigma=0.8, seed=i) for i, name in enumerate(["one image"])]
    rows = [*noisy, row(preprocessor, kinds["no image"], (4,), seed=3)]
    return in_double(collate(rows, PAD_ID, token_mean=True)), rows


def reads(plain, rows, banned):
    """(N, V) log-probabilities of all completions' tokens by a plain model."""
    return torch.cat(
        [alone(plain, r.prompt, r.views[r.trained], c.token_ids, banned) for r in rows for c in r.completions]
    )


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_reference_beside_the_policy_is_compared_with_over_the_whole_vocabulary(head, batch, preprocessor, new_model):
    batch, rows = batch
    made = new_model().double() if head == "tied" else untied(new_model())
    plain, other = copy_of(made), copy_of(made)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    banned = media_token_ids(preprocessor.processor)
    policy = Policy(copy_of(plain), TEMPERATURE, banned, reference=copy_of(other).requires_grad_(False))
    without, stats = policy(batch), policy(batch, refers=True)
    assert without.reference is None
    logp = reads(plain, rows, banned)
    with torch.no_grad():
        reference = reads(other, rows, banned)
    kl = (logp.exp() * (logp - reference)).sum(1)
    sampled = reference.gather(1, batch.targets[:, None])[:, 0]
    assert kl.max() > 0.01
    assert stats.reference.kl.sub(kl).abs().max() < 1e-9
    assert stats.reference.logprob.sub(sampled).abs().max() < 1e-9 and not stats.reference.logprob.requires_grad
    for name in ("logprob", "entropy"):
        assert getattr(stats, name).sub(getattr(without, name)).abs().max() < 1e-9
    assert stats.other.symmetric_kl.sub(without.other.symmetric_kl).abs().max() < 1e-9
    # All that has a gradient has it from the one comparison: of logprob, entropy and KL.
    weights = torch.linspace(-1, 2, len(kl), dtype=torch.float64)
    chosen = logp.gather(1, batch.targets[:, None])[:, 0]
    (weights * (stats.reference.kl + 2 * stats.logprob)).sum().backward()
    (weights * (kl + 2 * chosen)).sum().backward()
    assert_equal_gradients(policy, plain)
    assert all(parameter.grad is None for parameter in policy.reference.parameters())


def test_below_adapters_the_reference_is_the_model_itself(batch, preprocessor, new_model):
    batch, _ = batch
    plain, banned = new_model().double(), media_token_ids(preprocessor.processor)
    model = filled(adapted(copy_of(plain), vision=True))
    policy = Policy(model, TEMPERATURE, banned)
    stats = policy(batch, refers=True)
    own, below = policy(batch).logprob, Policy(copy_of(plain), TEMPERATURE, banned)(batch).logprob
    assert (own - below).abs().max() > 0.01
    assert stats.logprob.equal(own) or stats.logprob.sub(own).abs().max() < 1e-9
    assert stats.reference.logprob.sub(below).abs().max() < 1e-9
    assert stats.reference.kl.min() > 0


# ------------------------------------------------------------------------------------------------------- the trainer


def with_rewards(trainer, *rewards):
    """The step's groups, each with these rewards."""
    scores = [Score(reward, float(reward > 0), 1.0, None, {}) for reward in rewards]
    return [judged(group, scores, trainer.config) for group in generated(trainer)]


def moved(trainer):
    """The trainer with a policy that is no longer its reference."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return trainer


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_of_every_token_has_the_kl_in_it(new_trainer, estimator):
    trainer = moved(new_trainer("kl.coef=0.5", f"kl.estimator={estimator}"))
    groups = with_rewards(trainer, 1.0, 1.0)  # A = 0: without the KL nothing would be trained on
    batches = batches_of(trainer, groups)
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    assert sum(int((batch.weights > 0).sum()) for batch in batches) == tokens
    batch = batches[0]
    stats = trainer.policy(batch, refers=True)
    found = objective_of(trainer, batch, trainer.signals(batch, stats))
    kl = divergence(stats.logprob, stats.logprob.detach(), stats.reference, estimator)
    assert found.loss.item() == pytest.approx(0.5 * float(kl.detach().sum()), rel=1e-5)
    assert abs(float(kl.detach().sum())) > 1e-3
    assert found.metrics["kl"].total == pytest.approx(float(stats.reference.kl.sum()), rel=1e-5)
    assert not batches_of(new_trainer(), groups)[0].weights.any()


@pytest.mark.parametrize("estimator", ["exact", "k1"])
def test_the_reward_of_a_completion_loses_the_kl_of_its_tokens(new_trainer, estimator):
    settings = ("kl.coef=0.5", "kl.placement=reward", f"kl.estimator={estimator}", "loss.drop_unfinished=true")
    trainer = moved(new_trainer(*settings, "advantage.scale=none"))
    groups = with_rewards(trainer, 1.0, 0.0)
    means = Means()
    found = trainer.penalised(groups, means, Clock())
    for before, after in zip(groups, found, strict=True):
        assert after.kept == before.kept
        whole = replace(before, kept=(True, True), advantages=(1.0, 1.0))
        batch = collate(rows_of(trainer, whole), PAD_ID, token_mean=True)
        stats = trainer.policy(batch, refers=True)
        terms = stats.reference.kl if estimator == "exact" else stats.logprob - stats.reference.logprob
        first = len(before.completions[0].token_ids)
        sums = float(terms[:first].sum()), float(terms[first:].sum())
        rewards = [1 - 0.5 * sums[0], -0.5 * sums[1]]
        assert [score.reward for score in after.scores] == pytest.approx(rewards, rel=1e-4)
        assert after.scores[1].components["kl"] == pytest.approx(rewards[1], rel=1e-4)
        half = (rewards[0] - rewards[1]) / 2
        assert after.advantages == pytest.approx([half, -half], rel=1e-4)
    assert means["kl"].total > 0


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_step_trains_with_it_and_starts_at_no_distance(new_trainer, placement):
    trainer = new_trainer("kl.coef=0.1", f"kl.placement={placement}", "branch.probability=0.5", "perturb.sigma=0.8")
    first, second = trainer.run_step(), trainer.run_step()
    assert abs(first.metrics["kl"]) < 1e-6 < second.metrics["kl"]
    assert ("reward/kl" in second.metrics) == (placement == "reward")


def test_what_does_not_go_together_is_refused(config, wide_model_folder, model_folder, new_model, tmp_path):
    with pytest.raises(ConfigError, match=r"^kl\.estimator=k3: with kl\.coef=0 there is no reference$"):
        config("kl.estimator=k3")
    with pytest.raises(ConfigError, match=r"^kl\.placement=reward: advantage\.kind=passk reads right and wrong alone"):
        config("kl.coef=0.1", "kl.placement=reward", "method=passk", "advantage.k=2")
    fits = config("kl.coef=0.1", f"kl.reference={wide_model_folder}")  # of another width
    assert check_reference(new_model(), fits) == str(wide_model_folder)
    folder = tmp_path / "words"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["vocab_size"] = 77
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"^kl\.reference={folder}: weights have another shape than in the model of"):
        check_reference(new_model(), config("kl.coef=0.1", f"kl.reference={folder}"))
    smaller = new_model()
    smaller.config.text_config.vocab_size = 300
    with pytest.raises(
        ConfigError, match=rf"^kl\.reference={wide_model_folder}: its vocab_size is 320, that of .*=300$"
    ):
        check_reference(smaller, fits)


# --------------------------------------------------------------------------------------------------------- whole runs

CURVES = ("reward", "loss", "entropy", "kl", "grad_norm", "tokens")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings_of_it",
    [
        ("kl.placement=loss",),
        pytest.param(("kl.placement=reward", "lora.rank=4", "lora.alpha=64"), marks=pytest.mark.long),
        pytest.param(("kl.placement=loss", "lora.rank=4", "lora.alpha=64"), marks=pytest.mark.long),
    ],
    ids=["loss", "reward-below-adapters", "loss-below-adapters"],
)
def test_two_ranks_train_as_one_does_and_go_on_as_if_they_had_not_stopped(
    settings, settings_of_it, mixed_data, wide_model_folder, tmp_path
):
    chosen = [
        *settings,
        "branch.probability=0.5",
        "kl.coef=0.2",
        *settings_of_it,
        f"data.train={mixed_data}",
        "rollout.n=4",
    ]
    if "lora.rank=4" not in settings_of_it:
        chosen.append(f"kl.reference={wide_model_folder}")  # with a head of its own, of another width
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *chosen, f"trainer.output_dir={one}", "trainer.steps=3"]) == 0
    for more in (("trainer.steps=1",), ("trainer.steps=3", "--resume")):
        launch(2, "--module", "vogue.train", *chosen, f"trainer.output_dir={two}", *more)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=2e-3)
    assert rows[0][-1]["kl"] > 1e-4
    assert not any("reference" in name for name in _saved(two))


def _saved(run):
    from safetensors import safe_open

    found = []
    for path in (run / "checkpoints/step_000003").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found += file.keys()
    return found
