"""What a trainer may hand to the operators: any leading dimensions, integer targets, mixed dtypes, whole weights."""

import subprocess
import sys

import oracle
import pytest
import torch

from vogue_kernels import IGNORE, linear_branch_stats, linear_logprob


def inputs(*leading, d=8, v=50):
    raw, noisy, weight = torch.randn(*leading, d), torch.randn(*leading, d), torch.randn(v, d)
    return [x.requires_grad_() for x in (raw, noisy, weight)], torch.randint(v, leading)


@pytest.mark.parametrize("leading", [(3, 4), (2, 3, 4), (2, 0), ()], ids=str)
def test_results_have_the_dimensions_of_the_targets(leading, backend):
    (raw, noisy, weight), targets = inputs(*leading)
    leaves = raw, noisy, weight
    stats = linear_branch_stats(*leaves, targets, backend=backend)
    flat = linear_branch_stats(raw.reshape(-1, 8), noisy.reshape(-1, 8), weight, targets.flatten(), backend=backend)
    for result, expected in zip(stats, flat, strict=True):
        assert torch.equal(result, expected.view(leading))
    gradients = (torch.autograd.grad(sum(r.sum() for r in x), leaves) for x in (stats, flat))
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_may_be_integers_of_any_kind(dtype, backend):
    (raw, _, weight), targets = inputs(5)
    found = linear_logprob(raw, weight, targets.to(dtype), backend=backend)
    torch.testing.assert_close(found, linear_logprob(raw, weight, targets, backend=backend), rtol=0, atol=0)


def test_ignore_index_skips_besides_the_usual_one(backend):
    (raw, _, weight), targets = inputs(5)
    targets[:] = torch.tensor([0, 7, IGNORE, 7, 3])
    stats = linear_logprob(raw, weight, targets, backend=backend, ignore_index=7)
    expected = oracle.linear_logprob(raw, weight, targets).logprob
    expected = torch.where(torch.tensor([True, False, False, False, True]), expected, 0.0)
    torch.testing.assert_close(stats.logprob, expected)
    torch.testing.assert_close(
        torch.autograd.grad(stats.logprob.sum(), (raw, weight)), torch.autograd.grad(expected.sum(), (raw, weight))
    )


@pytest.mark.parametrize("leading", [(6,), (3, 6)], ids=str)
def test_with_shift_each_position_is_scored_on_the_next_token(leading, backend):
    (raw, _, weight), tokens = inputs(*leading)
    stats = linear_logprob(raw, weight, tokens, backend=backend, shift=True)
    expected = linear_logprob(raw[..., :-1, :], weight, tokens[..., 1:], backend=backend)
    assert stats.logprob.shape == (*leading[:-1], 5)
    torch.testing.assert_close(stats, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), raw)
    assert not gradient[..., -1, :].any() and gradient[..., 0, :].all()


@pytest.mark.parametrize("hidden, head", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")])
def test_hidden_states_are_cast_to_the_weights_dtype_and_get_a_gradient_of_their_own(hidden, head, backend):
    (raw, noisy, weight), targets = inputs(6)
    raw, noisy = (x.detach().to(getattr(torch, hidden)).requires_grad_() for x in (raw, noisy))
    weight = weight.detach().to(getattr(torch, head)).requires_grad_()
    leaves = raw, noisy, weight
    stats = linear_branch_stats(*leaves, targets, backend=backend)
    expected = linear_branch_stats(raw.to(weight.dtype), noisy.to(weight.dtype), weight, targets, backend=backend)
    torch.testing.assert_close(stats, expected, rtol=0, atol=0)
    for leaf, gradient in zip(leaves, torch.autograd.grad(sum(r.sum() for r in stats), leaves), strict=True):
        assert gradient.dtype == leaf.dtype and gradient.any()


@pytest.mark.parametrize("head, beside", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_a_bias_of_any_dtype_is_added_without_rounding(head, beside, backend):
    (raw, _, weight), targets = inputs(6)
    raw, weight = (x.detach().to(getattr(torch, head)).requires_grad_() for x in (raw, weight))
    bias = (3 + torch.rand(50) / 100).to(getattr(torch, beside)).requires_grad_()  # bfloat16 would round it to 3
    stats = linear_logprob(raw, weight, targets, bias, backend=backend)
    double = [x.detach().double().requires_grad_() for x in (raw, weight, bias)]
    truth = oracle.linear_logprob(*double[:2], targets, double[2])
    torch.testing.assert_close([x.double() for x in stats], list(truth), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), bias)
    (expected,) = torch.autograd.grad(truth.logprob.sum(), double[2])
    rounding = torch.finfo(weight.dtype).eps  # a backend may round the gradient of the logits to it, as PyTorch does
    torch.testing.assert_close(gradient, expected.to(bias.dtype), rtol=rounding, atol=rounding)


def test_float64_mixes_with_nothing():
    (raw, _, weight), targets = inputs(3)
    with pytest.raises(TypeError, match=r"hidden must have the dtype of weight, torch\.float64, got torch\.float32"):
        linear_logprob(raw, weight.double(), targets)
    with pytest.raises(TypeError, match=r"bias must have the dtype of weight, torch\.float32, got torch\.float64"):
        linear_logprob(raw, weight, targets, torch.zeros(50, dtype=torch.float64))


def test_dimensions_that_do_not_fit_are_named():
    (raw, _, weight), targets = inputs(3, 4)
    with pytest.raises(ValueError, match=r"hidden must be \(4, 3, 8\), got \(3, 4, 8\)"):
        linear_logprob(raw, weight, targets.t())
    with pytest.raises(ValueError, match=r"shift needs a position to predict from, got targets \(2, 0\)"):
        linear_logprob(torch.zeros(2, 0, 8), weight, torch.zeros(2, 0, dtype=torch.int64), shift=True)


FSDP = """
import copy, os, sys, torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from vogue_kernels import linear_logprob

class Head(nn.Linear):
    def forward(self, hidden, targets):
        return linear_logprob(hidden, self.weight, targets, self.bias).logprob

torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(sys.argv[1], 1), rank=0, world_size=1)
torch.manual_seed(0)
head, hidden, targets = Head(8, 40), torch.randn(2, 5, 8), torch.randint(40, (2, 5))
whole = copy.deepcopy(head)
fully_shard(head)
for one in (head, whole):
    one(hidden, targets).sum().backward()
torch.testing.assert_close(head.weight.grad.full_tensor(), whole.weight.grad)
torch.testing.assert_close(head.bias.grad.full_tensor(), whole.bias.grad)
try:
    linear_logprob(hidden, head.weight, targets)
except ValueError as error:
    print(error, flush=True)
os._exit(0)  # at the interpreter's own end a thread of gloo may abort a process that is done
"""


@pytest.mark.slow
def test_fsdp2_gathers_the_weight_inside_its_modules_forward_and_a_sharded_one_is_refused(tmp_path):
    command = [sys.executable, "-c", FSDP, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "weight is a DTensor, spread over ranks; call the operator inside the forward" in done.stdout
