"""Estimates from one token against the exact values: means over a whole small vocabulary, by enumeration."""

import pytest
import torch

from vogue.uncertainty import output_uncertainty, perception_uncertainty
from vogue_kernels import linear_branch_stats

V = 7
DIVERGENCES = ("symmetric", "forward", "reverse")


@pytest.fixture
def everything():
    """For each of 5 pairs of distributions: q(v) of all tokens v, (5, V), and the statistics of all of them (5 V,)."""
    torch.manual_seed(0)
    raw, noisy = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = torch.randn(V, 4, dtype=torch.float64)
    targets = torch.arange(V).repeat(5)
    stats = linear_branch_stats(raw.repeat_interleave(V, 0), noisy.repeat_interleave(V, 0), weight, targets)
    return (noisy @ weight.T).softmax(-1), (raw @ weight.T).softmax(-1), stats


def mean_under(q, values):
    return (q * values.view(-1, V)).sum(-1)


def by_hand(p, q, divergence):
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[divergence]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_k3_has_the_mean_of_the_exact_divergence_and_is_never_negative(everything, divergence):
    q, p, stats = everything
    estimates = perception_uncertainty(stats, "k3", divergence)
    torch.testing.assert_close(mean_under(q, estimates), by_hand(p, q, divergence))
    assert estimates.min() >= 0
    assert estimates.view(-1, V).std(dim=1).min() > 1e-3  # it is an estimate, not the value itself


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_exact_divergence_is_that_of_the_whole_vocabulary_whatever_was_sampled(everything, divergence):
    q, p, stats = everything
    exact = perception_uncertainty(stats, "exact", divergence).view(-1, V)
    torch.testing.assert_close(exact, by_hand(p, q, divergence)[:, None].expand(-1, V))


def test_the_sampled_terms_are_the_official_codes_and_their_mean_is_another_number(everything):
    q, p, stats = everything
    found = perception_uncertainty(stats, "sampled", "symmetric").view(-1, V)
    torch.testing.assert_close(found, (p - q) * (p.log() - q.log()) / 2)
    assert (mean_under(q, found) - by_hand(p, q, "symmetric")).abs().min() > 1e-2


def test_the_entropys_estimates(everything):
    q, _, stats = everything
    found = {
        name: output_uncertainty(stats.entropy_noisy, stats.logprob_noisy, name) for name in ("exact", "k3", "sampled")
    }
    entropy = -(q * q.log()).sum(-1)
    torch.testing.assert_close(found["exact"].view(-1, V), entropy[:, None].expand(-1, V))
    torch.testing.assert_close(mean_under(q, found["k3"]), entropy)
    torch.testing.assert_close(found["sampled"].view(-1, V), -q * q.log())
    assert (mean_under(q, found["sampled"]) - entropy).abs().min() > 1e-2
    assert found["sampled"].max() < 0.368


def test_no_gradient_passes_through_an_uncertainty(everything):
    _, _, stats = everything
    stats = type(stats)(*(value.clone().requires_grad_() for value in stats))
    for estimator in ("exact", "k3", "sampled"):
        assert not output_uncertainty(stats.entropy_noisy, stats.logprob_noisy, estimator).requires_grad
        assert not perception_uncertainty(stats, estimator, "symmetric").requires_grad
