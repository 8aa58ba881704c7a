"""An entropy that is paid for, steered to a target, or that says which tokens are trained on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import launch
from steps import TWO_BY_TWO, batches_of, generated, rows_of, weights_after
from test_objective import LENGTHS, PLAIN, N, batch_of

from vogue.cli import main
from vogue.method.entropy import EntropyBonus, entropy_threshold
from vogue.method.uncertainty import Signals, TokenStats
from vogue.metrics import Clock, Means
from vogue.step.entropy_target import BONUS
from vogue.step.objective import objective, reads_all, uncertainties
from vogue_kernels import linear_logprob

# ----------------------------------------------------------------------------------------------------- the equations


def test_the_threshold_is_a_quantile_of_all_parts_together():
    # 1, 2, 3, 4, 5: the highest 40% begin at the quantile of 0.6, which lies at 1 + 0.6 · 4 = 3.4.
    parts = [np.array([4, 1, 5], dtype=np.float32), np.array([], dtype=np.float32), np.array([3, 2], dtype=np.float32)]
    assert entropy_threshold(parts, 0.4) == pytest.approx(3.4)
    assert entropy_threshold(parts[::-1], 0.4) == entropy_threshold(parts, 0.4)
    assert entropy_threshold(parts, 0.5) == 3  # reached by three of five
    assert entropy_threshold(parts, 1e-9) == pytest.approx(5)
    assert entropy_threshold([np.array([], dtype=np.float32)], 0.4) == float("-inf")


def test_the_weight_of_the_entropy_is_steered_by_hand():
    bonus, found = EntropyBonus(0.1), []
    for entropy in (0.5, 0.3, 0.2, 0.1, 0.6, 0.6, 0.6):
        found.append((pytest.approx(bonus.coef), pytest.approx(bonus.paid(0.5))))
        bonus = bonus.after(entropy, target=0.5, delta=0.1, most=0.35)
    # Nothing is paid before the first entropy is known; 0.5 is still a reason to pay, 0.6 isn't.
    assert found == [(0.1, 0), (0.2, 0.2), (0.3, 0.3), (0.35, 0.35), (0.35, 0.35), (0.25, 0), (0.15, 0)]
    assert EntropyBonus(0.05, 0.6).after(0.6, 0.5, 0.1, 1.0).coef == 0


# ----------------------------------------------------------------------------------------------------- the objective

NOTHING = torch.zeros(N, dtype=torch.bool)


def tokens_of(seed=0):
    """Hidden states of the batch's tokens, a head and targets, in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (N, 30))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(30, (N,), generator=generator)


def signals_of(hidden, weight, targets):
    stats = linear_logprob(hidden, weight, targets)
    return Signals(stats.logprob, stats.entropy.detach(), None, stats.entropy), stats


@pytest.mark.parametrize("coef", [0.3, -0.06])
@pytest.mark.parametrize("token_mean", [True, False])
def test_the_bonus_is_the_entropy_of_the_whole_vocabulary_with_its_gradient(coef, token_mean, config):
    hidden, weight, targets = tokens_of()
    advantages = torch.tensor([1.0] * 4 + [0.0] * 4 + [-1.0] * 2)  # to tokens without an advantage it is paid, too
    batch = batch_of(advantages, NOTHING, NOTHING, token_mean)
    signals, _ = signals_of(hidden, weight, targets)
    loss, metrics = objective(batch, signals, config(f"loss.entropy_coef={coef}").loss, PLAIN, 1.0, first=True)
    logp = torch.log_softmax(hidden @ weight.T, -1)
    logprob, entropy = logp[torch.arange(N), targets], -(logp.exp() * logp).sum(-1)
    expected = -(batch.weights * ((logprob - logprob.detach()).exp() * advantages + coef * entropy)).sum()
    torch.testing.assert_close(loss, expected)
    leaves = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    assert metrics["entropy_paid"] == (pytest.approx(entropy.sum().item()), N)
    assert metrics["entropy_coef"] == (coef, 1)
    assert metrics["loss"].total == pytest.approx(loss.item())


def test_the_mean_of_minus_log_p_which_some_take_for_the_entropy_has_another_gradient():
    # Of the sampled tokens' −log p the expected gradient is Σ_v p_v ∇(−log p_v) = 0; the entropy's is not.
    hidden, weight, _ = tokens_of()
    logp = torch.log_softmax(hidden[:1] @ weight.T, -1)
    estimated = torch.autograd.grad((logp.detach().exp() * -logp).sum(), hidden, retain_graph=True)[0]
    exact = torch.autograd.grad(linear_logprob(hidden[:1], weight, torch.tensor([0])).entropy.sum(), hidden)[0]
    assert estimated.abs().max() < 1e-12 < 1e-2 < exact.abs().max()


@pytest.mark.parametrize("overrides", [(), ("loss.entropy_target=0.5", "loss.entropy_coef=0.1")])
def test_an_entropy_that_is_not_paid_gets_no_gradient(overrides, config):
    hidden, weight, targets = tokens_of()
    signals, stats = signals_of(hidden, weight, targets)
    settings = config(*overrides).loss
    unpaid = None if not overrides else EntropyBonus(settings.entropy_coef).paid(settings.entropy_target)
    batch = batch_of(torch.ones(N), NOTHING, NOTHING, True)
    loss, metrics = objective(batch, signals, settings, PLAIN, 1.0, first=True, entropy_coef=unpaid)
    # None, not zeros: this is how the operators' backward pass knows that nobody asks.
    assert torch.autograd.grad(loss, stats.entropy, allow_unused=True) == (None,)
    assert ("entropy_paid" in metrics) == bool(overrides)


def test_tokens_that_are_not_chosen_leave_the_loss_and_not_its_divisor(config):
    hidden, weight, targets = tokens_of()
    signals, _ = signals_of(hidden, weight, targets)
    chosen = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    advantages = torch.tensor([1.0] * 4 + [0.0] * 4 + [-2.0] * 2)
    plain = batch_of(advantages, NOTHING, NOTHING, False)
    old = signals._replace(logprob=signals.logprob.detach(), chosen=chosen)
    batch = replace(plain, old=old)
    settings = config("loss.top_entropy_quantile=0.5", "loss.entropy_coef=0.1").loss
    loss, metrics = objective(batch, signals, settings, PLAIN, 1.0, first=True)
    weights = 1 / torch.tensor([3.0] * 3 + [1] + [4] * 4 + [2] * 2)  # of the whole completions' lengths
    expected = -(weights * chosen * (advantages + 0.1 * signals.u_out)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["loss"].count == pytest.approx(len(LENGTHS))
    assert metrics["entropy_paid"] == (pytest.approx(signals.u_out[chosen].sum().item()), 5)
    assert metrics["clip_fraction"].count == 3  # tokens 0, 3 and 9
    told = uncertainties(batch, TokenStats(signals.logprob, signals.u_out, ()), measuring=True)
    assert told["entropy"].count == 3
    assert told["measured/entropy"].count == N


# ------------------------------------------------------------------------------------------------- a trainer's update


def groups_of(trainer, *advantages):
    """This step's groups, with these advantages."""
    groups = generated(trainer, trainer.loader.items(trainer.step))
    return [replace(group, advantages=given) for group, given in zip(groups, advantages, strict=True)]


@pytest.mark.parametrize(
    ("overrides", "all_of_them"),
    [
        ((), False),
        (("loss.entropy_coef=0.1",), True),
        (("loss.entropy_target=0.5",), True),
        (("loss.top_entropy_quantile=0.5",), True),
    ],
)
def test_completions_without_an_advantage_are_computed_where_the_loss_reads_them(new_trainer, overrides, all_of_them):
    trainer = new_trainer("method=grpo", *TWO_BY_TWO, *overrides)
    assert reads_all(trainer.config.loss) == all_of_them
    mixed, alike = groups_of(trainer, (1.0, 0.0), (0.0, 0.0))
    assert sum(len(row.completions) for row in rows_of(trainer, mixed)) == (2 if all_of_them else 1)
    assert sum(len(row.completions) for row in rows_of(trainer, alike)) == (2 if all_of_them else 0)


def test_the_other_image_is_not_looked_at_for_completions_that_earn_no_bonus(new_trainer):
    trainer = new_trainer(*TWO_BY_TWO, "branch.rollout=raw", "branch.probability=1", "loss.entropy_coef=0.1")
    (mixed,), (alike,) = (rows_of(trainer, group) for group in groups_of(trainer, (1.0, 0.0), (0.0, 0.0)))
    assert (mixed.others, mixed.paid) == (("noisy",), True)
    assert (alike.others, alike.paid) == ((), False)
    trainer.update(groups_of(trainer, (0.0, 0.0), (0.0, 0.0)), Means(), Clock())  # of which no batch has another view


def test_where_no_completion_has_an_advantage_an_update_ascends_the_entropy_alone(new_trainer):
    trainer = new_trainer("method=grpo", *TWO_BY_TWO, "loss.entropy_coef=0.1")
    groups = groups_of(trainer, (0.0, 0.0), (0.0, 0.0))

    def entropy():
        batches = batches_of(trainer, groups)
        with torch.no_grad():
            found = [trainer.policy(batch).entropy for batch in batches]
        return torch.cat(found).mean().item()

    before = entropy()
    _, sums = weights_after(trainer, groups)
    assert sums["loss"].total / sums["loss"].count == pytest.approx(-0.1 * before, rel=1e-4)
    assert sums["entropy_paid"].total / sums["entropy_paid"].count == pytest.approx(before, rel=1e-4)
    assert entropy() > before + 1e-3


TOP = ("method=grpo", "rollout.n=4", "loss.top_entropy_quantile=0.3", "perturb.sigma=0.8")
FOUR_GROUPS = ((1.0, -1.0, 0.5, -0.5),) * 3 + ((0.0,) * 4,)


def test_the_tokens_that_train_are_those_of_the_highest_entropy_of_the_whole_update(new_trainer):
    trainer = new_trainer(*TOP, "trainer.micro_batch_tokens=150")  # several micro-batches, one quantile
    groups = groups_of(trainer, *FOUR_GROUPS)
    batches = batches_of(trainer, groups)
    assert len(batches) > 2
    with torch.no_grad():
        found = [trainer.policy(batch).entropy for batch in batches]
    entropy, advantages = torch.cat(found), torch.cat([batch.advantages for batch in batches])
    assert len(entropy) == sum(len(c.token_ids) for group in groups for c in group.completions)
    order = entropy.sort(descending=True).values
    chosen = entropy >= np.quantile(entropy.double().numpy(), 0.7)
    assert chosen.sum() == -(-3 * len(order) // 10) or chosen.sum() == 3 * len(order) // 10 + 1

    _, sums = weights_after(trainer, groups)
    sent = chosen & (advantages != 0)
    assert 0 < sent.sum() < chosen.sum()
    assert sums["entropy"].count == sent.sum()
    assert sums["entropy"].total == pytest.approx(entropy[sent].double().sum().item(), rel=1e-5)
    assert sums["loss"].total == pytest.approx(-advantages[sent].double().sum().item(), rel=1e-4)
    assert sums["loss"].count == len(entropy)  # the divisor is that of all tokens
    assert sums["trained_share"].total == sums["trained_share"].count == len(entropy)
    assert sums["ratio_error"].total < 1e-4


@pytest.mark.parametrize("override", ["trainer.micro_batch_tokens=150", "trainer.shared_prefix=false"])
def test_how_an_update_is_packed_does_not_change_which_tokens_train(new_trainer, override):
    plain, other = new_trainer(*TOP), new_trainer(*TOP, override)
    groups = groups_of(plain, *FOUR_GROUPS)
    (first, sums), (second, others) = weights_after(plain, groups), weights_after(other, groups)
    assert others["entropy"].count == sums["entropy"].count > 0
    for name in ("loss", "entropy"):
        assert others[name].total == pytest.approx(sums[name].total, rel=1e-4)
    # As in test_trainer.py: AdamW turns rounding of the smallest gradients into whole steps.
    assert ((first - second).abs() > 1e-5).float().mean() < 0.01


def test_the_weight_follows_the_updates_of_a_step_and_is_kept_in_the_runs_state(new_trainer):
    steered = ("loss.entropy_target=100", "loss.entropy_coef=0.01", "loss.entropy_coef_delta=0.02")
    trainer = new_trainer("method=grpo", *TWO_BY_TWO, "trainer.updates=2", *steered, "loss.entropy_coef_max=0.06")
    coefs = [trainer.run_step().metrics["entropy_coef"] for _ in range(3)]
    # Of the six updates: 0 as long as no entropy is known, then 0.01 + 0.02 i, at most 0.06.
    assert coefs == pytest.approx([(0 + 0.03) / 2, (0.05 + 0.06) / 2, 0.06])
    coef, entropy = trainer.state.current[BONUS]
    assert coef == pytest.approx(0.06)
    assert 0 < entropy < 100

    above = new_trainer("method=grpo", *TWO_BY_TWO, "loss.entropy_target=1e-9", "loss.entropy_coef=0.5")
    metrics = [above.run_step().metrics for _ in range(2)]
    assert [row["entropy_coef"] for row in metrics] == [0, 0]  # never paid above the target
    assert above.state.current[BONUS][0] == pytest.approx(0.5 - 2 * 0.005)


# ------------------------------------------------------------------------------------------------------------ ranks

EVERYTHING = (
    *("method=cispo", "rollout.n=4", "trainer.updates=2", "advantage.scale=batch"),
    *("loss.top_entropy_quantile=0.5", "loss.entropy_target=100", "loss.entropy_coef=0.05"),
    *("loss.importance_cap=5", "loss.importance_floor=0.5", "loss.importance_mode=token_mask"),
    *("trainer.micro_batch_tokens=200", "optimizer.lr=1e-4", "trainer.log_completions=1000"),
    "trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
)


NAMES = ("reward", "loss", "grad_norm", "entropy", "entropy_paid", "entropy_coef", "mismatch/outside", "tokens")


@pytest.fixture
def train(settings, mixed_data, tmp_path):
    """A function: train on this many ranks in a folder of its own; returns the metrics and what completions earned."""

    def run(ranks, name, *overrides):
        given = [
            *settings,
            f"data.train={mixed_data}",
            *EVERYTHING,
            f"trainer.output_dir={tmp_path / name}",
            *overrides,
        ]
        if ranks == 1:
            assert main(["train", *given]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *given)
        metrics, completions = (
            [json.loads(line) for line in (tmp_path / name / f"{what}.jsonl").read_text().splitlines()]
            for what in ("metrics", "completions")
        )
        told = {(row["step"], row["problem"], row["completion"]): row["advantage"] for row in completions}
        return [{name: row[name] for name in NAMES} for row in metrics], told

    return run


@pytest.mark.slow
def test_two_ranks_weigh_and_choose_tokens_as_one_does(train):
    (one, alone), (two, shared) = train(1, "one", "trainer.steps=2"), train(2, "two", "trainer.steps=2")
    assert len(one) == len(two) == 2
    assert 0 < one[0]["entropy_coef"] < one[1]["entropy_coef"]
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    assert len(shared) > 4  # those of rank 0
    assert any(shared.values())
    assert shared == {place: alone[place] for place in shared}  # to the last bit


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_with_the_weight_of_the_entropy_that_it_had(train, ranks):
    straight, _ = train(ranks, "straight", "trainer.steps=3")
    train(ranks, "again", "trainer.steps=1")
    again, _ = train(ranks, "again", "trainer.steps=3", "--resume")
    assert len(again) == 3
    for a, b in zip(straight, again, strict=True):
        assert b == pytest.approx(a, rel=1e-6)
