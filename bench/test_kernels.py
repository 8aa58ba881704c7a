"""`vogue_kernels` against eager PyTorch on the head of a real model: time side by side, and memory.

    make bench                                   # or: pytest bench/test_kernels.py
    pytest bench/test_kernels.py -k "forward and N64"

Eager is what trainers write: logits of both branches, float32 log-softmax, entropies and divergence, autograd. Columns
of one group are comparable; compare ratios, not seconds of a shared machine. `extra_MB` (in `--benchmark-json`, and
printed at the end) is the highest sum of tensors alive at once, beyond inputs and gradients.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vogue_kernels import available_backends, linear_branch_stats, linear_logprob

D, V = 2048, 151_936  # Qwen2.5-VL-3B's head
BACKENDS = ["eager", *(name for name, reason in available_backends().items() if reason is None)]


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators made, at the highest."""

    def __init__(self):
        super().__init__()
        self.alive = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.alive[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def eager_stats(raw, noisy, weight, targets):
    """Log-probabilities, entropies and divergences from full logits."""
    p, q = (torch.log_softmax((hidden @ weight.T).float(), dim=-1) for hidden in (raw, noisy))
    logprobs = [logits.gather(1, targets[:, None])[:, 0] for logits in (p, q)]
    entropies = [-(logits.exp() * logits).sum(dim=-1) for logits in (p, q)]
    return *logprobs, *entropies, (p.exp() * (p - q)).sum(dim=-1), (q.exp() * (q - p)).sum(dim=-1)


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(tokens, D, generator=generator)
    noisy = raw + 0.1 * torch.randn(tokens, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) / D**0.5
    return raw, noisy, weight, torch.randint(V, (tokens,), generator=generator)


def forward(backend, raw, noisy, weight, targets):
    if backend == "eager":
        return eager_stats(raw, noisy, weight, targets)
    return linear_branch_stats(raw, noisy, weight, targets, backend=backend)


def forward_backward(backend, raw, _, weight, targets):
    hidden, weight = raw.clone().requires_grad_(), weight.detach().requires_grad_()
    if backend == "eager":
        logprob = torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None])[:, 0]
    else:
        logprob = linear_logprob(hidden, weight, targets, backend=backend).logprob
    logprob.sum().backward()
    return hidden.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [64, 256], ids="N{}".format)
@pytest.mark.parametrize("work", [forward, forward_backward], ids=lambda work: work.__name__)
def test_head(benchmark, work, tokens, backend):
    benchmark.group = f"{work.__name__} N={tokens} D={D} V={V} float32, {torch.get_num_threads()} threads"
    tensors = inputs(tokens)
    with PeakMemory() as memory:
        work(backend, *tensors)
    benchmark.extra_info["extra_MB"] = round(memory.peak / 1e6)
    benchmark.pedantic(work, (backend, *tensors), rounds=3, warmup_rounds=1)
    print(f"{benchmark.group}, {backend}: {memory.peak / 1e6:.0f} MB alive at the highest")
