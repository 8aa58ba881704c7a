"""ROMA and DVRP: the worst of several degraded views, which tokens are held to it, and what moves."""

import json
from dataclasses import replace

import pytest
import torch
from ranks import launch
from steps import batches_of, objective_of, rows_of, weights_after
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
from vogue.method.robust import worst_divergence
from vogue.model.packing import collate
from vogue.model.policy import Policy
from vogue.rollout.engine import media_token_ids
from vogue.settings import ConfigError
from vogue.step.objective import objective


def test_the_worst_view_is_one_of_each_token_and_alone_has_a_gradient():
    views = [torch.tensor(values, requires_grad=True) for values in ([0.1, 0.5, 0.2], [0.3, 0.4, 0.2])]
    found = worst_divergence(views)
    assert found.tolist() == pytest.approx([0.3, 0.5, 0.2])
    (found * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert [view.grad.tolist() for view in views] == [[0, 2, 4], [1, 0, 0]]  # among equals the first
    with pytest.raises(ValueError, match="no degraded view"):
        worst_divergence([])


# -------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("moves", ["view", "both"])
def test_degraded_views_have_the_gradients_that_are_asked_for(moves, kinds, preprocessor, new_model):  # noqa: F811
    plain, banned = new_model().double(), media_token_ids(preprocessor.processor)
    rows = [row(preprocessor, kinds[name], (3, 2), sigma=0.8, seed=i) for i, name in enumerate(("one image",) * 2)]
    rows = [replace(r, trained="raw", others=("noisy",), degraded=1) for r in rows]
    batch = in_double(collate([*rows, row(preprocessor, kinds["no image"], (4,), seed=3)], PAD_ID, token_mean=True))
    assert batch.others == () and len(batch.degraded) == 1
    policy = Policy(copy_of(plain), TEMPERATURE, banned, robust=moves)
    stats = policy(batch)
    assert stats.other is None and len(stats.logprob) == 14
    (found,) = stats.degraded

    def logps(view):
        return torch.cat(
            [alone(plain, r.prompt, r.views[view], c.token_ids, banned) for r in rows for c in r.completions]
        )

    own, other = logps("raw"), logps("noisy")
    own = own if moves == "both" else own.detach()
    kl, entropy = (own.exp() * (own - other)).sum(1), -(other.exp() * other).sum(1)
    logprob = other.gather(1, batch.targets[:10, None])[:, 0]
    for value, expected in ((found.kl_own_other, kl), (found.entropy, entropy), (found.logprob, logprob)):
        assert value.sub(expected).abs().max() < 1e-9 and expected.abs().max() > 1e-4
    weights = torch.linspace(-1, 2, len(kl), dtype=torch.float64)
    (weights * (found.kl_own_other - 2 * found.logprob + 3 * found.entropy)).sum().backward()
    (weights * (kl - 2 * logprob + 3 * entropy)).sum().backward()
    assert_equal_gradients(policy, plain)


# ------------------------------------------------------------------------------------------------------- the trainer

ROMA = ("method=roma", "branch.rollout=raw", "robust.kl_coef=0.5", "robust.policy_coef=0.25", "robust.sigma=[0.3,0.8]")


def test_the_loss_has_the_worst_view_of_right_completions_and_their_policy_gradient(new_trainer):
    trainer = new_trainer(*ROMA, "robust.entropy_coef=0.1")
    groups = with_rewards(trainer, 1.0, 0.0)
    batches = batches_of(trainer, groups)
    held = [batch for batch in batches if batch.degraded]
    assert held and all(batch.others == () and len(batch.degraded) == 2 and batch.right.all() for batch in held)
    assert not any(batch.right.any() for batch in batches if not batch.degraded)  # wrong ones need no view
    batch = held[0]
    stats = trainer.policy(batch)
    first, second = stats.degraded
    assert not torch.allclose(first.kl_own_other, second.kl_own_other)
    plain = objective_of(trainer, batch, trainer.signals(batch, stats))
    found = objective(
        batch,
        trainer.signals(batch, stats),
        trainer.config.loss,
        trainer.guidance,
        1.0,
        first=True,
        robust=trainer.config.robust,
    )
    worst = torch.maximum(first.kl_own_other, second.kl_own_other)
    extra = 0.5 * worst - 0.25 * batch.advantages * first.logprob + 0.05 * (first.entropy + second.entropy)
    assert float((found.loss - plain.loss).detach()) == pytest.approx(float(extra.detach().sum()), rel=1e-4)
    assert found.metrics["robust_kl"].total == pytest.approx(float(worst.detach().sum()), rel=1e-5)


def test_right_completions_are_held_to_it_where_none_is_wrong_and_wrong_ones_with_all(new_trainer):
    trainer = new_trainer(*ROMA)
    equal = with_rewards(trainer, 1.0, 1.0)  # A = 0: without the term nothing would be trained on
    assert all(r.others == ("degraded 1", "degraded 2") for group in equal for r in rows_of(trainer, group))
    assert not any(rows_of(trainer, group) for group in with_rewards(trainer, 0.0, 0.0))
    everything = new_trainer("method=dvrp", "branch.rollout=raw")
    for group in with_rewards(everything, 0.0, 0.0):
        (only,) = rows_of(everything, group)
        assert only.others == ("noisy", "degraded 1") and only.degraded == 1


def test_strengths_are_in_an_order_of_each_prompts_own(new_loader):
    loader = new_loader("method=roma", "branch.rollout=raw", "robust.sigma=[0.01,0.9]", "rollout.prompts=12")

    def far(item, name):
        return float((item.views[name].pixel_values - item.views["raw"].pixel_values).abs().mean())

    items = loader.items(0)
    weak = [far(item, "degraded 1") < far(item, "degraded 2") for item in items]
    assert any(weak) and not all(weak)
    again = loader.again([item.origin for item in items], 0)
    assert all(
        again[i.origin].views["degraded 2"].pixel_values.equal(i.views["degraded 2"].pixel_values) for i in items
    )
    other = loader.items(1)[0]
    assert set(other.views) == {"raw", "degraded 1", "degraded 2"}


def test_the_views_follow_and_without_the_weight_the_step_is_grpos(new_trainer):
    trainer = new_trainer(*ROMA)
    metrics, _ = trainer.run_step()
    assert metrics["robust_kl"] > 0 and metrics["noisy_share"] == 0
    groups = with_rewards(trainer, 1.0, 1.0)
    batch = batches_of(trainer, groups)[0]
    before = objective(*_arguments(trainer, batch), first=True, robust=trainer.config.robust)
    before.loss.backward()
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad
    after = objective(*_arguments(trainer, batch), first=True, robust=trainer.config.robust)
    assert after.metrics["robust_kl"].total < 0.98 * before.metrics["robust_kl"].total

    grpo, off = new_trainer("method=grpo", "branch.rollout=raw"), new_trainer(*ROMA)
    off.config = grpo.config
    weights = [weights_after(each, with_rewards(each, 1.0, 0.0))[0] for each in (grpo, off)]
    assert weights[0].equal(weights[1])


def _arguments(trainer, batch):
    return batch, trainer.signals(batch, trainer.policy(batch)), trainer.config.loss, trainer.guidance, 1.0


def test_settings_are_the_methods_and_what_nothing_reads_is_refused(config):
    found = config("method=dvrp", "branch.rollout=raw")
    assert (found.robust.kl_coef, found.robust.completions, found.perception.kl_coef) == (0.01, "all", 0.01)
    assert found.moving_views == 2  # the masked one, and the noisy one
    roma = config("method=roma", "branch.rollout=raw")
    assert roma.robust.views == ("degraded 1", "degraded 2") and roma.moving_views == 2
    assert config("method=grpo").moving_views == 0 == config("method=papo", "branch.rollout=raw").moving_views
    for wrong, told in (
        (("robust.policy_coef=0.1",), r"^robust\.policy_coef=0\.1: with robust\.kl_coef=0 nothing reads it$"),
        (("robust.kl_coef=0.1",), r"^robust\.kl_coef=0\.1: with branch\.rollout=drawn completions are trained on T"),
        (("method=dvrp", "branch.rollout=raw", "robust.completions=right"), "fixes robust.completions=all"),
        (("method=roma", "branch.rollout=raw", "robust.kl_coef=0", "robust.policy_coef=0"), "is another method"),
    ):
        with pytest.raises(ConfigError, match=told):
            config(*wrong)


CURVES = ("reward", "loss", "entropy", "robust_kl", "grad_norm", "tokens")


@pytest.mark.long
@pytest.mark.parametrize("method", ["roma", "dvrp"])
def test_two_ranks_train_as_one_does_and_go_on_as_if_they_had_not_stopped(settings, mixed_data, tmp_path, method):
    (tmp_path / "varied.py").write_text(
        "def varied(completions, samples):\n    return [sum(map(ord, text)) % 2 for text in completions]\n"
    )
    chosen = [*settings, f"method={method}", "branch.rollout=raw", f"data.train={mixed_data}", "rollout.n=4"]
    chosen += [f"reward.function={tmp_path}/varied.py:varied", "trainer.measure_every=2", "robust.kl_coef=0.1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *chosen, f"trainer.output_dir={one}", "trainer.steps=3"]) == 0
    for more in (("trainer.steps=1",), ("trainer.steps=3", "--resume")):
        launch(2, "--module", "vogue.train", *chosen, f"trainer.output_dir={two}", *more)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    assert any("robust_kl" in row for row in rows[0])  # of steps with a right completion
    for a, b in zip(*rows):
        assert {name: b.get(name, -1.0) for name in CURVES} == pytest.approx(
            {name: a.get(name, -1.0) for name in CURVES}, rel=2e-3
        )
