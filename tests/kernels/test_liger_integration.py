"""The signature of Liger's function, beside the installed Liger and beside float64."""

import oracle
import pytest
import torch

from vogue_kernels.integrations.liger import FusedLinearScaledCrossEntropyFunction as Ours

N, D, V, TEMPERATURE = 37, 24, 301, 0.7
SELECTED = torch.tensor([5, 300, 5])


@pytest.fixture
def Theirs():
    return pytest.importorskip("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction


def case(dtype=torch.float32, ignore_index=-100):
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype) / D**0.5
    targets = torch.randint(V, (N,))
    targets[[0, 11]] = ignore_index
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def gradients(results, *inputs):
    """Of a sum in which every result has weights of its own."""
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in results)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("ignore_index", [-100, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_ligers(dtype, ignore_index, Theirs):
    hidden, weight, targets = case(dtype, ignore_index)
    given = (hidden, weight, targets, TEMPERATURE, ignore_index, 1, True, SELECTED)
    ours, theirs = Ours.apply(*given), Theirs.apply(*given)
    assert [x.shape for x in ours] == [x.shape for x in theirs] == [(N,), (N,), (N, 3)]
    of_ours, of_theirs = gradients(ours, hidden, weight), gradients(theirs, hidden, weight)
    most = 1e-6 if dtype == torch.float32 else 1e-2  # in bfloat16 it is Liger that rounds: its logits, and its entropy
    for a, b in zip((*ours, *of_ours), (*theirs, *of_theirs), strict=True):
        assert (a - b).norm() < most * b.norm() and a.shape == b.shape


def test_values_and_gradients_are_exact():
    hidden, weight, targets = case()
    ours = Ours.apply(hidden, weight, targets, TEMPERATURE, -100, 1, True, SELECTED)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp = oracle.logits(*exact, None, TEMPERATURE).log_softmax(-1)
    kept = targets != -100
    stats = oracle.linear_logprob(*exact, targets, temperature=TEMPERATURE)
    expected = (-stats.logprob, stats.entropy, torch.where(kept[:, None], logp[:, SELECTED], 0.0))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    for a, b in zip(gradients(ours, hidden, weight), gradients(expected, *exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_results_come_as_liger_gives_them(Theirs):
    hidden, weight, targets = case()
    for asked in ({}, {"return_entropy": True}, {"selected_token_ids": SELECTED}):
        ours, theirs = Ours.apply(hidden, weight, targets, **asked), Theirs.apply(hidden, weight, targets, **asked)
        assert isinstance(ours, tuple) == isinstance(theirs, tuple)
        assert not isinstance(ours, tuple) or len(ours) == len(theirs)


def test_where_every_target_is_skipped_results_and_gradients_are_zeros():
    hidden, weight, targets = case()
    results = Ours.apply(hidden, weight, targets.fill_(-1), 1.0, -1, 1, True, SELECTED)
    assert not any(x.any() for x in results)
    assert not any(x.any() for x in gradients(results, hidden, weight))


def test_what_liger_refuses_is_refused():
    hidden, weight, targets = case(ignore_index=-1)
    with pytest.raises(ValueError, match=r"targets\[0\] = -1 is outside \[0, 301\)"):
        Ours.apply(hidden, weight, targets)
    with pytest.raises(ValueError, match="-100, which is neither a token nor ignore_index=-1"):
        Ours.apply(hidden, weight, targets.masked_fill(targets == 3, 4).index_fill(0, torch.tensor([7]), -100), 1.0, -1)
    with pytest.raises(ValueError, match=r"selected_token_ids must be in \[0, 301\), got \[301\]"):
        Ours.apply(hidden, weight, targets, 1.0, -1, selected_token_ids=torch.tensor([301]))
