"""The trainer's objective: the mathematics of `VogueLoss`, which other trainers use, and what it asks of a batch."""

import math
from dataclasses import replace

import pytest
import torch
from steps import TWO_BY_TWO, batches_of, generated, objective_of, with_settings

from vogue.method.uncertainty import OtherBranch, Signals, TokenStats, read_signals
from vogue.metrics import Mean, Means
from vogue.model.packing import Batch
from vogue.rollout.engine import Completion
from vogue.step.objective import has_gradient, objective, uncertainties
from vogue_kernels import GuidanceConfig, VogueLoss, linear_branch_stats, linear_logprob

LENGTHS = (3, 1, 4, 2)  # of completions; the first two are compared with the other branch
N, COMPARED = sum(LENGTHS), 4


def batch_of(advantages, paid, noisy, token_mean, engine_logprob=None):
    """A batch as `collate` makes it, of which the objective reads these fields alone."""
    lengths = torch.tensor(LENGTHS)
    nothing = dict.fromkeys(("input_ids", "token_types", "segments", "images", "positions", "targets"))
    return Batch(
        **nothing,
        completions=tuple(Completion((0,) * length, (0.0,) * length, "", True) for length in LENGTHS),
        places=(),
        advantages=advantages,
        engine_logprob=torch.full((N,), torch.nan) if engine_logprob is None else engine_logprob,
        weights=(torch.ones(4) if token_mean else 1 / lengths).repeat_interleave(lengths),
        noisy=noisy,
        paid=paid,
        others=(),
        right=torch.zeros_like(noisy),
    )


PPO = {"clip_low": 0.1, "clip_high": 0.3, "clip_dual": 2.0}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "constant"])
@pytest.mark.parametrize("divergence", ["symmetric", "forward", "reverse"])
@pytest.mark.parametrize("rollout", ["raw", "drawn"])
def test_it_is_vogue_loss_on_any_batch(rollout, divergence, aggregation, seed, config):
    hold_to_vogue_loss(config, rollout, divergence, aggregation, seed, PPO)


@pytest.mark.parametrize(
    "options",
    [
        PPO | {"importance_level": "sequence", "importance_cap": 0.9, "importance_mode": "sequence_truncate"},
        {"kind": "cispo", "clip_high": 0.1, "importance_floor": 0.8, "importance_mode": "geometric_mask"},
        {"kind": "cispo", "importance_level": "sequence", "importance_cap": 1.2, "importance_floor": 0.8},
        {"kind": "sapo", "sapo_temperature_neg": 3.0, "importance_cap": 1.2, "importance_mode": "token_mask"},
        {"kind": "sapo", "importance_level": "sequence"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("aggregation", ["sequence-mean", "constant"])
def test_it_is_vogue_loss_with_every_surrogate_and_correction(aggregation, options, config):
    hold_to_vogue_loss(config, "raw", "symmetric", aggregation, 0, options)


def hold_to_vogue_loss(config, rollout, divergence, aggregation, seed, options):
    """Loss, gradient and metrics of a batch against `VogueLoss` with these options."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    own, other, weight = randn(N, 8).requires_grad_(), randn(N, 8), randn(40, 8)
    targets, advantages, old = torch.randint(40, (N,), generator=generator), 2 * randn(N), randn(N)
    guidance = GuidanceConfig(0.7, 1.5, 2.0, 3.0, order=["parallel", "sequential"][seed % 2])
    paid = torch.arange(N) < COMPARED
    criterion = VogueLoss(
        **{"guidance": guidance, "temperature": 0.8, "aggregation": aggregation, "max_tokens": 6},
        **{"divergence": divergence, "rollout": rollout, "entropy": "drawn"},
        **options,
    )
    ids = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    old = linear_logprob(own, weight, targets, temperature=0.8).logprob.detach() + 0.3 * old
    engine = (old + 0.3 * randn(N)).index_fill(0, torch.tensor([5]), torch.nan)
    corrected = any(name.startswith("importance_") and name != "importance_level" for name in options)
    expected, logged = criterion(
        *(own, weight, targets, advantages),
        **{"old_logprob": old, "hidden_other": other, "noisy": paid, "sequence_ids": ids},
        engine_logprob=engine if corrected else None,
    )

    alone = linear_logprob(own, weight, targets, temperature=0.8)
    both = linear_branch_stats(own[:COMPARED], other[:COMPARED], weight, targets[:COMPARED], temperature=0.8)
    compared = (both.logprob_q, both.entropy_q, both.kl_pq, both.kl_qp, both.symmetric_kl)
    stats = TokenStats(alone.logprob, alone.entropy, (OtherBranch(*(value.detach() for value in compared)),))
    batch = batch_of(advantages, paid, paid & (rollout == "drawn"), aggregation != "sequence-mean", engine)
    signals = read_signals(stats, batch.noisy, paid, "exact", divergence, "drawn")
    batch = replace(batch, old=signals._replace(logprob=old))
    settings = config(*(f"loss.{name}={value}" for name, value in options.items())).loss
    loss, metrics = objective(batch, signals, settings, guidance, sign=1.0, first=True)

    divisor = {"token-mean": N, "sequence-mean": 4, "constant": 4 * 6}[aggregation]  # the trainer's, over all ranks
    torch.testing.assert_close(loss / divisor, expected)
    gradients = (torch.autograd.grad(x, own, retain_graph=True)[0] for x in (loss / divisor, expected))
    torch.testing.assert_close(*gradients)
    for name in ("clip_fraction", "out_capped", "per_capped"):
        assert metrics[name].total / metrics[name].count == pytest.approx(logged[name].item(), abs=1e-6)
    if corrected:
        assert metrics["mismatch/outside"].total / N == pytest.approx(logged["importance_outside"].item())
        assert 0 < metrics["mismatch/outside"].total < N
    assert metrics["loss"].total == pytest.approx(loss.item())


def test_advantages_are_a_tokens_own(new_trainer):
    # A completion of which one token alone has an advantage: a loss of that token, and a gradient of it.
    trainer = new_trainer("method=grpo", *TWO_BY_TWO)
    groups = [replace(group, advantages=(1.0, -1.0)) for group in generated(trainer)]
    (batch,) = batches_of(trainer, groups)
    at = 2
    only = torch.zeros(len(batch.targets)).index_fill(0, torch.tensor(at), 1.5)
    stats = trainer.policy(batch)
    signals = trainer.signals(batch, stats)
    loss, metrics = objective_of(trainer, replace(batch, advantages=only), signals)
    assert loss.item() == pytest.approx(-1.5)
    gradient = torch.autograd.grad(loss, signals.logprob)[0]
    assert gradient.nonzero().tolist() == [[at]] and gradient[at] == -1.5
    assert metrics["clip_fraction"].count == 1
    assert uncertainties(replace(batch, advantages=only), stats, measuring=False)["entropy"] == (
        stats.entropy[at].item(),
        1,
    )


def test_a_completion_needs_a_forward_where_any_of_its_tokens_sends_a_gradient():
    assert not has_gradient(torch.zeros(3))
    assert has_gradient(torch.tensor([0.0, 0.0, -0.1]))


def test_icepop_leaves_out_tokens_on_both_sides_and_keeps_the_divisor(config):
    nothing = torch.zeros(N, dtype=torch.bool)
    ratios = torch.tensor([1.0, 0.49, 0.51, 4.99, 5.01, 1.0, 2.0, 0.1, 9.0, 1.0])
    engine = -1.0 - ratios.log()
    engine[9] = torch.nan  # another view: nothing is known of it
    batch = batch_of(torch.ones(N), nothing, nothing, True, engine)
    bounds = ("loss.importance_floor=0.5", "loss.importance_cap=5", "loss.importance_mode=token_mask")
    signals = Signals(torch.full((N,), -1.0), torch.zeros(N), None)
    loss, metrics = objective(batch, signals, config(*bounds).loss, PLAIN, 1.0, first=True)
    assert loss.item() == pytest.approx(-(1 + 0.51 + 4.99 + 1 + 2 + 1), rel=1e-5)
    assert metrics["mismatch/outside"] == (4, N)
    assert metrics["loss"].count == N
    below = objective(batch, signals, config(bounds[0], bounds[2]).loss, PLAIN, 1.0, first=True).loss
    assert below.item() == pytest.approx(-(1 + 0.51 + 4.99 + 5.01 + 1 + 2 + 9 + 1), rel=1e-5)


def test_the_mismatch_is_of_tokens_whose_engine_saw_the_trained_view_and_its_cap_weighs_them(config):
    advantages = torch.ones(N)
    engine = torch.full((N,), -1.0)
    engine[:3] = torch.nan
    logprob = torch.full((N,), -1.0)
    logprob[3] = -1.0 + torch.tensor(4.0).log()  # the trainer finds it four times as likely
    batch = batch_of(advantages, torch.zeros(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool), True, engine)
    settings = config("loss.importance_cap=2").loss
    signals = Signals(logprob, torch.zeros(N), None)
    loss, metrics = objective(batch, signals, settings, GuidanceConfig(0.0, 1.0, 0.0, 1.0), 1.0, first=False)
    assert loss.item() == pytest.approx(-(N + 1))
    assert metrics["mismatch/logprob"].count == N - 3
    assert metrics["mismatch/logprob"].total == pytest.approx(1.386294, abs=1e-5)  # log 4
    assert "ratio_error" not in metrics


def test_a_metric_of_any_name_is_added_up_and_told(new_trainer):
    new_trainer()  # joins the ranks
    means = Means()
    means.add("a new one", 3.0)
    means.add_all({"a new one": Mean(5.0, 3), "of nothing": Mean(0.0, 0)})
    assert means.over_ranks() == {"a new one": 2.0}


def test_several_views_may_be_compared_with_the_trained_one(new_trainer, config):
    trainer = new_trainer("branch.rollout=raw", "branch.probability=1", "perturb.sigma=0.8", *TWO_BY_TWO)
    groups = [replace(group, advantages=(1.0, -1.0)) for group in generated(trainer)]
    (batch,) = batches_of(trainer, groups)
    twice = replace(batch, others=(batch.others[0], replace(batch, others=())))  # the noisy view, and the raw one again
    found, plain = trainer.policy(twice), trainer.policy(batch)
    assert len(found.others) == 2
    torch.testing.assert_close(found.others[0].symmetric_kl, plain.others[0].symmetric_kl)
    assert found.others[1].symmetric_kl.abs().max() < 1e-6 < found.others[0].symmetric_kl.max()
    grpo = with_settings(trainer, config("method=grpo", *TWO_BY_TWO))
    gradients = [
        torch.autograd.grad(objective_of(grpo, batch, grpo.signals(batch, stats)).loss, list(grpo.policy.parameters()))
        for stats in (found, plain)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


PLAIN = GuidanceConfig(0.0, 1.0, 0.0, 1.0)


def test_a_sequences_ratio_is_the_geometric_mean_of_its_tokens_and_clipped_as_one(config):
    nothing = torch.zeros(N, dtype=torch.bool)
    batch = batch_of(torch.tensor([1.0] * 3 + [2.0] + [-1.0] * 4 + [1.0] * 2), nothing, nothing, False)
    # Ratios of the tokens of completions of 3, 1, 4 and 2; their geometric means are 2, 1.1, 0.5 and 1.2.
    ratios = torch.tensor([1.0, 2.0, 4.0, 1.1, 0.25, 1.0, 0.5, 0.5, 1.44, 1.0], dtype=torch.float64)
    logprob = ratios.log().requires_grad_()
    old = Signals(torch.zeros(N, dtype=torch.float64), torch.zeros(N), None)
    settings = config("loss.importance_level=sequence", "loss.clip_low=0.6", "loss.clip_high=0.3").loss
    loss, metrics = objective(
        replace(batch, old=old), Signals(logprob, torch.zeros(N), None), settings, PLAIN, 1.0, first=True
    )
    # A mean over its tokens is each completion's s A: 1.3, where 2 is clipped; 1.1 x 2; -0.5; and 1.2.
    assert loss.item() == pytest.approx(-(1.3 + 2.2 - 0.5 + 1.2))
    assert metrics["clip_fraction"] == (3, N)
    gradient = torch.autograd.grad(loss, logprob)[0]
    expected = [0.0] * 3 + [-2.2] + [0.5 / 4] * 4 + [-1.2 / 2] * 2  # d s A / d log pi_t = s A / T
    assert gradient.tolist() == pytest.approx(expected)


def test_the_other_surrogates_reach_the_batchs_loss_by_hand(config):
    nothing = torch.zeros(N, dtype=torch.bool)
    advantages = torch.tensor([1.0] * 3 + [2.0] + [-1.0] * 4 + [1.0] * 2)
    ratios = torch.tensor([1.0, 2.0, 4.0, 1.1, 0.25, 1.0, 0.5, 0.5, 1.44, 1.0], dtype=torch.float64)
    old = torch.full((N,), -1.0, dtype=torch.float64)
    batch = replace(batch_of(advantages, nothing, nothing, True), old=Signals(old, torch.zeros(N), None))

    def found(*overrides):
        logprob = (old + ratios.log()).requires_grad_()
        signals = Signals(logprob, torch.zeros(N), None)
        loss, metrics = objective(batch, signals, config(*overrides).loss, PLAIN, 1.0, first=True)
        return loss.item(), torch.autograd.grad(loss, logprob)[0].tolist(), metrics["clip_fraction"].total

    bounded = [1.0, 2.0, 2.5, 1.1, 0.4, 1.0, 0.5, 0.5, 1.44, 1.0]
    cispo = [-r * a for r, a in zip(bounded, advantages.tolist())]
    value = sum(x * (math.log(r) - 1) for x, r in zip(cispo, ratios.tolist()))
    settings = ("loss.kind=cispo", "loss.clip_low=0.6", "loss.clip_high=1.5")
    assert found(*settings) == (pytest.approx(value), pytest.approx(cispo), 2)
    assert found("method=cispo")[1] == pytest.approx([-r * a for r, a in zip(ratios.tolist(), advantages.tolist())])

    loss, gradient, sapo = 0.0, [], {1.0: 2.0, -1.0: 3.0}
    for r, a in zip(ratios.tolist(), advantages.tolist()):
        tau = sapo[math.copysign(1.0, a)]
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        loss -= 4 / tau * gate * a
        gradient.append(-4 * gate * (1 - gate) * r * a)
    settings = ("loss.kind=sapo", "loss.sapo_temperature_pos=2", "loss.sapo_temperature_neg=3")
    assert found(*settings) == (pytest.approx(loss), pytest.approx(gradient), 0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [1.0, 2.0, 2.0, 1.5, 0.5, 1.0, 2.0, 1.0, 2.0, 0.25]),
        ("token_mask", [1.0, 2.0, 0.0, 1.5, 0.5, 1.0, 0.0, 1.0, 0.0, 0.25]),
        # The products are 8, 1.5, 1.5 and 1.
        ("sequence_truncate", [2.0] * 3 + [1.5] * 5 + [1.0] * 2),
        ("sequence_mask", [0.0] * 3 + [1.5] * 5 + [1.0] * 2),
    ],
)
def test_what_corrects_for_the_engines_policy_by_hand(mode, expected, config):
    ratios = torch.tensor([1.0, 1.9999, 4.0, 1.5, 0.5, 1.0, 3.0, 1.0, 4.0, 0.25])
    nothing = torch.zeros(N, dtype=torch.bool)
    batch = batch_of(torch.ones(N), nothing, nothing, True, -ratios.log())
    settings = config("loss.importance_cap=2", f"loss.importance_mode={mode}").loss
    logprob = torch.zeros(N, requires_grad=True)
    loss, metrics = objective(batch, Signals(logprob, torch.zeros(N), None), settings, PLAIN, 1.0, first=False)
    assert loss.item() == pytest.approx(-sum(expected), abs=1e-2)
    weights = -torch.autograd.grad(loss, logprob)[0]  # at a ratio of 1 and advantages of 1, the factor of each token
    assert weights.tolist() == pytest.approx(expected, abs=1e-3)
    assert metrics["mismatch/outside"] == ({"token": 3, "sequence": 3}[mode.split("_")[0]], N)
