"""The head's errors against float64, beside those of eager PyTorch, Liger and TRL.

    python bench/kernel_errors.py [--shape D V] [--tokens N] [--dtype bfloat16]

An error is the largest over all entries, divided by the largest true entry. All get the same inputs, of a model's
scale, and the truth is float64's on these very inputs, so that what the inputs' own rounding costs isn't counted.
"eager" multiplies in the inputs' dtype and takes the softmax in float32, as trainers do; "liger" is
LigerFusedLinearScaledCrossEntropyFunction, "trl" ChunkedLogProbFunction, TRL's default head. Neither has a divergence.
"vogue, kept" is ours with its logits kept for the backward pass.
Gradients are those of Σ g_t log p_t + h_t H_t with random g and h. It prints a table for a document.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import torch

from vogue_kernels import linear_branch_stats, linear_logprob


class Head(NamedTuple):
    """One way to compute the head's statistics."""

    logprob: Callable  # (hidden, weight, targets) → (log-probability, entropy), (N,) each
    symmetric_kl: Callable | None  # (hidden_p, hidden_q, weight, targets) → (N,)


def vogue_logprob(hidden, weight, targets):
    stats = linear_logprob(hidden, weight, targets)
    return stats.logprob, stats.entropy


def kept_logprob(hidden, weight, targets):
    stats = linear_logprob(hidden, weight, targets, keep_logits_bytes=1 << 40)
    return stats.logprob, stats.entropy


def vogue_kl(hidden_p, hidden_q, weight, targets):
    return linear_branch_stats(hidden_p, hidden_q, weight, targets).symmetric_kl


def eager_softmax(hidden, weight):
    logits = hidden @ weight.t()
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def eager_logprob(hidden, weight, targets):
    logp = eager_softmax(hidden, weight)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


def eager_kl(hidden_p, hidden_q, weight, targets):
    logp, logq = eager_softmax(hidden_p, weight), eager_softmax(hidden_q, weight)
    return ((logp.exp() - logq.exp()) * (logp - logq)).sum(dim=-1) / 2


def liger_logprob(hidden, weight, targets):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, return_entropy=True)[:2]
    return -nll, entropy


def trl_logprob(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",))[:2]


HEADS = {
    "vogue": Head(vogue_logprob, vogue_kl),
    "vogue, kept": Head(kept_logprob, None),  # its logits, for the backward pass
    "eager": Head(eager_logprob, eager_kl),
    "liger": Head(liger_logprob, None),
    "trl": Head(trl_logprob, None),
}


def results(head: Head, hidden_p, hidden_q, weight, targets) -> dict[str, torch.Tensor]:
    """Values and gradients by name, float64."""
    leaves = [x.detach().requires_grad_() for x in (hidden_p, weight)]
    values = head.logprob(*leaves, targets)
    generator = torch.Generator(targets.device).manual_seed(1)
    upstream = [torch.randn(len(targets), generator=generator, device=targets.device).to(x.dtype) for x in values]
    gradients = torch.autograd.grad(values, leaves, upstream)
    found = dict(zip(("log p", "entropy", "∂hidden", "∂weight"), (*values, *gradients), strict=True))
    if head.symmetric_kl is not None:
        found["symmetric KL"] = head.symmetric_kl(hidden_p, hidden_q, weight, targets)
    return {name: x.detach().double() for name, x in found.items()}


def inputs(n: int, width: int, vocab: int, device: str, dtype: torch.dtype):
    """(hidden_p, hidden_q, weight, targets), of a model's scale."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    hidden, weight = normal(n, width), normal(vocab, width) / width**0.5
    other = hidden + 0.3 * normal(n, width)
    targets = torch.randint(vocab, (n,), generator=generator, device=device)
    return *(x.to(dtype) for x in (hidden, other, weight)), targets


def errors(n: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> dict[str, dict[str, float] | str]:
    """By head: the error of each result, or why the head can't be run."""
    tensors = inputs(n, width, vocab, device, dtype)
    truth = results(HEADS["eager"], *(x.double() for x in tensors[:3]), tensors[3])
    found = {}
    for name, head in HEADS.items():
        try:
            values = results(head, *tensors)
        except ModuleNotFoundError as error:
            found[name] = f"{(error.name or name).partition('.')[0]} isn't installed"
            continue
        found[name] = {key: float((x - truth[key]).abs().max() / truth[key].abs().max()) for key, x in values.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found, help=f"here {found}")
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 18992), metavar=("D", "V"))
    parser.add_argument("--tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=("float32", "bfloat16")
    )
    options = parser.parse_args()
    columns = ("log p", "entropy", "symmetric KL", "∂hidden", "∂weight")
    print(f"D = {options.shape[0]}, V = {options.shape[1]}, N = {options.tokens}, {options.device}\n")
    print("| | | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns)), sep="\n")
    for dtype in options.dtype:
        for name, found in errors(options.tokens, *options.shape, options.device, getattr(torch, dtype)).items():
            if isinstance(found, str):
                cells = [found, *[""] * (len(columns) - 1)]
            else:
                cells = [f"{found[column]:.1e}" if column in found else "–" for column in columns]
            print("| " + " | ".join((dtype, name, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
