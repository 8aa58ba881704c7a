"""The trainer's objective: the mathematics of `VogueLoss`, which other trainers use, and what it asks of a batch."""

from dataclasses import replace

import pytest
import torch
from steps import TWO_BY_TWO, batches_of, generated, objective_of, with_settings

from vogue.method.uncertainty import OtherBranch, Signals, TokenStats, read_signals
from vogue.metrics import Mean, Means
from vogue.model.packing import Batch
from vogue.objective import engine_correction, has_gradient, objective, uncertainties
from vogue.rollout.engine import Completion
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
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("divergence", ["symmetric", "forward", "reverse"])
@pytest.mark.parametrize("rollout", ["raw", "drawn"])
def test_it_is_vogue_loss_on_any_batch(rollout, divergence, aggregation, seed, config):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    own, other, weight = randn(N, 8).requires_grad_(), randn(N, 8), randn(40, 8)
    targets, advantages, old = torch.randint(40, (N,), generator=generator), 2 * randn(N), randn(N)
    guidance = GuidanceConfig(0.7, 1.5, 2.0, 3.0, order=["parallel", "sequential"][seed % 2])
    paid = torch.arange(N) < COMPARED
    criterion = VogueLoss(
        **{"guidance": guidance, "clip_low": 0.1, "clip_high": 0.3, "clip_dual": 2.0, "temperature": 0.8},
        **{"aggregation": aggregation, "divergence": divergence, "rollout": rollout, "entropy": "drawn"},
    )
    ids = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    old = linear_logprob(own, weight, targets, temperature=0.8).logprob.detach() + 0.3 * old
    expected, logged = criterion(
        own, weight, targets, advantages, old_logprob=old, hidden_other=other, noisy=paid, sequence_ids=ids
    )

    alone = linear_logprob(own, weight, targets, temperature=0.8)
    both = linear_branch_stats(own[:COMPARED], other[:COMPARED], weight, targets[:COMPARED], temperature=0.8)
    compared = (both.logprob_q, both.entropy_q, both.kl_pq, both.kl_qp, both.symmetric_kl)
    stats = TokenStats(alone.logprob, alone.entropy, (OtherBranch(*(value.detach() for value in compared)),))
    batch = batch_of(advantages, paid, paid & (rollout == "drawn"), aggregation == "token-mean")
    signals = read_signals(stats, batch.noisy, paid, "exact", divergence, "drawn")
    batch = replace(batch, old=signals._replace(logprob=old))
    settings = config("loss.clip_low=0.1", "loss.clip_high=0.3", "loss.clip_dual=2").loss
    loss, metrics = objective(batch, signals, settings, guidance, sign=1.0, first=True)

    divisor = N if aggregation == "token-mean" else 4  # the trainer's, over all batches and ranks
    torch.testing.assert_close(loss / divisor, expected)
    gradients = (torch.autograd.grad(x, own, retain_graph=True)[0] for x in (loss / divisor, expected))
    torch.testing.assert_close(*gradients)
    for name in ("clip_fraction", "out_capped", "per_capped"):
        assert metrics[name].total / metrics[name].count == pytest.approx(logged[name].item(), abs=1e-6)
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
    assert engine_correction(ratios.log(), batch, 2.0, mode).tolist() == pytest.approx(expected, abs=1e-3)
    settings = config("loss.importance_cap=2", f"loss.importance_mode={mode}").loss
    signals = Signals(torch.zeros(N), torch.zeros(N), None)
    loss = objective(batch, signals, settings, PLAIN, 1.0, first=False).loss
    assert loss.item() == pytest.approx(-sum(expected), abs=1e-2)
