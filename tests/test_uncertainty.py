"""Estimates from one token against the exact values: means over a whole small vocabulary, by enumeration."""

import pytest
import torch

from vogue.method.uncertainty import OtherBranch, TokenStats, output_uncertainty, perception_uncertainty, read_signals
from vogue_kernels import linear_branch_stats

V = 7
DIVERGENCES = ("symmetric", "forward", "reverse")


@pytest.fixture(params=[True, False], ids=["trained-on-the-noisy-branch", "trained-on-the-raw-one"])
def everything(request):
    """For each of 5 pairs of distributions: own, p and q of all tokens (5, V), and the statistics of all (5 V,)."""
    torch.manual_seed(0)
    raw, noisy = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = torch.randn(V, 4, dtype=torch.float64)
    own, other = (noisy, raw) if request.param else (raw, noisy)
    both = linear_branch_stats(
        own.repeat_interleave(V, 0), other.repeat_interleave(V, 0), weight, torch.arange(V).repeat(5)
    )
    compared = OtherBranch(both.logprob_q, both.entropy_q, both.kl_pq, both.kl_qp, both.symmetric_kl)
    stats = TokenStats(both.logprob_p, both.entropy_p, (compared,))
    p, q = ((hidden @ weight.T).softmax(-1) for hidden in (raw, noisy))
    return q if request.param else p, p, q, stats, torch.full((5 * V,), request.param)


def u_per(everything, estimator, divergence):
    *_, stats, noisy = everything
    return perception_uncertainty(stats.logprob, stats.other, noisy, estimator, divergence)


def mean_under(q, values):
    return (q * values.view(-1, V)).sum(-1)


def by_hand(p, q, divergence):
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[divergence]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_k3_has_the_mean_of_the_exact_divergence_and_is_never_negative(everything, divergence):
    own, p, q, *_ = everything
    estimates = u_per(everything, "k3", divergence)
    torch.testing.assert_close(mean_under(own, estimates), by_hand(p, q, divergence))
    assert estimates.min() >= 0
    assert estimates.view(-1, V).std(dim=1).min() > 1e-3  # it is an estimate, not the value itself


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_exact_divergence_is_that_of_the_whole_vocabulary_whatever_was_sampled(everything, divergence):
    _, p, q, *_ = everything
    exact = u_per(everything, "exact", divergence).view(-1, V)
    torch.testing.assert_close(exact, by_hand(p, q, divergence)[:, None].expand(-1, V))


def test_the_sampled_terms_are_the_official_codes_and_their_mean_is_another_number(everything):
    own, p, q, *_ = everything
    found = u_per(everything, "sampled", "symmetric").view(-1, V)
    torch.testing.assert_close(found, (p - q) * (p.log() - q.log()) / 2)
    assert (mean_under(own, found) - by_hand(p, q, "symmetric")).abs().min() > 1e-2


def test_the_entropys_estimates(everything):
    own, _, _, stats, _ = everything
    found = {name: output_uncertainty(stats.entropy, stats.logprob, name) for name in ("exact", "k3", "sampled")}
    entropy = -(own * own.log()).sum(-1)
    torch.testing.assert_close(found["exact"].view(-1, V), entropy[:, None].expand(-1, V))
    torch.testing.assert_close(mean_under(own, found["k3"]), entropy)
    torch.testing.assert_close(found["sampled"].view(-1, V), -own * own.log())
    assert (mean_under(own, found["sampled"]) - entropy).abs().min() > 1e-2
    assert found["sampled"].max() < 0.368


def test_no_gradient_passes_through_an_uncertainty(everything):
    *_, stats, noisy = everything
    stats = stats._replace(
        logprob=stats.logprob.clone().requires_grad_(), entropy=stats.entropy.clone().requires_grad_()
    )
    for estimator in ("exact", "k3", "sampled"):
        signals = read_signals(stats, noisy, ~noisy, estimator, "symmetric", "trained")
        assert signals.logprob is stats.logprob
        assert not signals.u_out.requires_grad and not signals.u_per.requires_grad


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_the_entropy_of_the_drawn_branch_is_the_noisy_ones_where_a_raw_token_is_paid(everything, estimator):
    # Four tokens, the first three compared, the first two paid; own is one branch throughout.
    *_, stats, noisy = everything
    stats = TokenStats(stats.logprob[:4], stats.entropy[:4], (OtherBranch(*(value[:3] for value in stats.other)),))
    paid = torch.tensor([True, True, False, False])
    own = output_uncertainty(stats.entropy, stats.logprob, estimator)
    other = output_uncertainty(stats.other.entropy, stats.other.logprob, estimator)
    found = read_signals(stats, noisy[:4], paid, estimator, "symmetric", "drawn")
    drawn = own[:2] if noisy[0] else other[:2]  # where own is noisy, it is the one that was drawn
    torch.testing.assert_close(found.u_out, torch.cat([drawn, own[2:]]))
    assert found.u_per[3] == 0 and found.u_per[:3].min() > 0
    trained = read_signals(stats, noisy[:4], paid, estimator, "symmetric", "trained")
    torch.testing.assert_close(trained.u_out, own)
