"""The Triton backend at the widths of real models, where all stages of the kernels' pipelines are filled. Needs a GPU.

Every expected value is computed in float64 on the same GPU. It takes 45 GB of its memory at most.
"""

import os

import pytest
import torch
from test_linear_stats import Case, assert_branch_stats_as_exact_as_plain

from vogue_kernels import linear_branch_stats, linear_logprob

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU"
)

QWEN_3B, QWEN_7B, WIDE = (2048, 151936), (3584, 152064), (5120, 152064)  # D, V of Qwen2.5-VL 3B, 7B and 32B


@pytest.fixture(autouse=True)
def on_the_gpu():
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize(
    "case",
    [
        *(Case("normal", 300, *size, "bf16", bias=bias) for size in (QWEN_3B, QWEN_7B, WIDE) for bias in (False, True)),
        Case("peaked", 300, *QWEN_7B, "bf16", 0.7, bias=True),
        Case("normal", 33, *QWEN_7B, "bf16", bias=True),  # tiles of 64 tokens
        Case("normal", 40, *QWEN_3B, "f32"),
    ],
    ids=str,
)
def test_real_widths(case):
    assert_branch_stats_as_exact_as_plain(case, "triton")


@pytest.mark.parametrize("case", [Case("normal", 300, *QWEN_3B, "bf16", bias=True)], ids=str)
def test_many_batches_and_chunks(case, monkeypatch):
    for name, value in {"MOST_TOKENS": 128, "CHUNK_ELEMENTS": 1 << 21}.items():
        monkeypatch.setattr(f"vogue_kernels.gpu.{name}", value)
    assert_branch_stats_as_exact_as_plain(case, "triton")


@pytest.mark.parametrize(
    "case",
    [Case("normal", 130, 128, 3000, "bf16", bias=True), Case("normal", 130, 100, 3003, "bf16")],  # with TMA, without
    ids=str,
)
def test_memory_is_accessed_where_it_is_allocated(case):
    """Small, so that compute-sanitizer can watch it."""
    assert_branch_stats_as_exact_as_plain(case, "triton")


@pytest.mark.parametrize("size", [QWEN_3B, QWEN_7B], ids=["3B", "7B"])
def test_identical_branches_diverge_by_exactly_zero_and_a_run_repeats_bit_by_bit(size):
    depth, vocab = size
    hidden, weight = torch.randn(200, depth).bfloat16(), (torch.randn(vocab, depth) / depth**0.5).bfloat16()
    targets = torch.randint(vocab, (200,))
    stats = linear_branch_stats(hidden, hidden.clone(), weight, targets, backend="triton")
    again = linear_branch_stats(hidden, hidden.clone(), weight, targets, backend="triton")
    for divergence in (stats.kl_pq, stats.kl_qp, stats.symmetric_kl):
        assert torch.equal(divergence, torch.zeros(200))
    for one, other in zip(stats, again, strict=True):
        assert torch.equal(one, other)


def scored(hidden, weight, targets, backend="triton"):
    """(log-probabilities, gradients of hidden and weight)."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    logprob = linear_logprob(*leaves, targets, backend=backend).logprob
    return logprob.detach(), torch.autograd.grad(logprob.sum(), leaves)


def test_hidden_states_of_more_than_two_to_the_31_elements(monkeypatch):
    monkeypatch.setattr("vogue_kernels.gpu.MOST_TOKENS", 1 << 20)  # in one launch
    n, (depth, vocab), last = (1 << 31) // WIDE[0] + 300, (WIDE[0], 1000), slice(-200, None)
    hidden, weight = torch.randn(n, depth, dtype=torch.bfloat16), torch.randn(vocab, depth).bfloat16() / 64
    targets = torch.randint(vocab, (n,))
    logprob, (grad_hidden, _) = scored(hidden, weight, targets)
    expected, (expected_grad, _) = scored(hidden[last].double(), weight.double(), targets[last], "torch")
    torch.testing.assert_close(logprob[last].double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_hidden[last].double(), expected_grad, rtol=0.02, atol=1e-3)


def test_a_weight_of_more_than_two_to_the_31_elements():
    depth = WIDE[0]
    vocab, last = (1 << 31) // depth + 1000, slice(-500, None)
    hidden, weight = torch.randn(70, depth).bfloat16(), torch.randn(vocab, depth, dtype=torch.bfloat16).div_(64)
    targets = torch.randint(vocab - 500, vocab, (70,))
    logprob, (grad_hidden, grad_weight) = scored(hidden, weight, targets)
    logits = torch.cat([hidden.double() @ part.double().t() for part in weight.split(1 << 15)], dim=1)
    logp = logits.log_softmax(1)
    torch.testing.assert_close(logprob.double(), logp.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-4)
    grad_logits = -logp.exp()
    grad_logits[torch.arange(70), targets] += 1
    torch.testing.assert_close(
        grad_weight[last].double(), grad_logits[:, last].t() @ hidden.double(), rtol=0.02, atol=1e-3
    )
    expected = sum(g @ w.double() for g, w in zip(grad_logits.split(1 << 15, 1), weight.split(1 << 15), strict=True))
    torch.testing.assert_close(grad_hidden.double(), expected, rtol=0.02, atol=1e-3)


def test_a_cuda_graph_refuses_them():
    hidden, weight, targets = torch.randn(8, 64), torch.randn(100, 64), torch.randint(100, (8,))
    linear_logprob(hidden, weight, targets)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="can't run inside a CUDA graph"):
        linear_logprob(hidden, weight, targets)
