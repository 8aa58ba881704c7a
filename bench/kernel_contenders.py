"""What competes in bench/kernels.py: each kind of work on the head, and whoever does it.

A contender is what it computes, in words, and a function of no arguments that does. What a peer lacks stands in the
words; a peer that isn't installed, or needs a GPU, raises when it is first run.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vogue_kernels import (
    GuidanceConfig,
    VogueLoss,
    clipped_surrogate,
    linear_branch_stats,
    linear_logprob,
    shaped_advantage,
)

ENOUGH = 1 << 40  # bytes: all logits are kept for the backward pass
Kept = Mapping[str, Callable[[], int]]  # contenders that keep logits, and bytes for them: asked for when they run
ALL_KEPT: Kept = {"vogue-kept": lambda: ENOUGH}


class Contender(NamedTuple):
    computes: str
    run: Callable[[], object]


class Inputs(NamedTuple):
    """Of a model's scale, all of one dtype and device."""

    hidden_p: Tensor  # (N, D)
    hidden_q: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64


def inputs(n: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    p = torch.randn(n, width, device=device)
    q = p + 0.3 * torch.randn(n, width, device=device)
    weight = torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5
    return Inputs(p.to(dtype), q.to(dtype), weight, torch.randint(vocab, (n,), device=device))


# ------------------------------------------------------------------------------------------------- plain PyTorch


def eager_logp(hidden, weight, bias=None):
    return torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias).float(), dim=-1)


def eager_forward(p, q, weight, targets):
    logp, logq = (eager_logp(hidden, weight) for hidden in (p, q))
    logprobs = [x.gather(1, targets[:, None])[:, 0] for x in (logp, logq)]
    entropies = [-(x.exp() * x).sum(dim=-1) for x in (logp, logq)]
    return *logprobs, *entropies, (logp.exp() * (logp - logq)).sum(dim=-1), (logq.exp() * (logq - logp)).sum(dim=-1)


def eager_logprob(hidden, weight, targets):
    return eager_logp(hidden, weight).gather(1, targets[:, None])[:, 0]


def eager_trained(other, hidden, weight, bias, targets):
    """(log-probability, entropy and symmetric KL without gradient) of the trained branch."""
    logq = eager_logp(hidden, weight, bias)
    with torch.no_grad():
        logp, logq_ = eager_logp(other, weight, bias), logq.detach()
        entropy = -(logq_.exp() * logq_).sum(dim=-1)
        symmetric = ((logp.exp() - logq_.exp()) * (logp - logq_)).sum(dim=-1) / 2
    return logq.gather(1, targets[:, None])[:, 0], entropy, symmetric


def eager_symmetric_kl(p, q, weight):
    logp, logq = eager_logp(p, weight), eager_logp(q, weight)
    return ((logp.exp() - logq.exp()) * (logp - logq)).sum(dim=-1) / 2


# --------------------------------------------------------------------------------------------------------- peers


def liger_logprob(hidden, weight, targets):
    """Of Liger's chunked GRPO loss."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None])


def liger_scaled_logprob(hidden, weight, targets):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def liger_scaled_with_entropy(hidden, weight, targets):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, return_entropy=True)


def liger_cross_entropy(hidden, weight, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def cce_logprob(hidden, weight, targets):
    _needs_a_gpu(weight)
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def _needs_a_gpu(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise NotImplementedError("needs a GPU: its kernels are Triton's")


# ---------------------------------------------------------------------------------------------------- contenders


def products(*factors: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """A function that only multiplies: a @ b into out, one after the other."""

    @torch.no_grad()
    def run():
        for a, b, out in factors:
            torch.mm(a, b, out=out)

    return run


def gradients_of(results: Callable[[], Tensor], *wanted: Tensor) -> Callable[[], object]:
    """A function that computes results and the gradients of their sum."""
    return lambda: torch.autograd.grad(results().sum(), wanted)


def forward(given: Inputs, kept: Kept = ALL_KEPT) -> dict[str, Contender]:
    p, q, weight, targets = given
    compiled = torch.compile(eager_forward, dynamic=False)
    logits = weight.new_empty(len(p), len(weight))
    everything = "log-probabilities, entropies, both KLs"

    def both(function):
        return torch.no_grad()(lambda: [function(x, weight, targets) for x in (p, q)])

    return {
        "vogue": Contender(everything, lambda: linear_branch_stats(*given)),
        "reference": Contender(everything, lambda: linear_branch_stats(*given, backend="torch")),
        "eager": Contender(everything, lambda: eager_forward(*given)),
        "compile": Contender(everything, lambda: compiled(*given)),
        "liger-scaled": Contender("log-probabilities and entropies only", both(liger_scaled_with_entropy)),
        "liger": Contender("both log-probabilities only", both(liger_logprob)),
        "cce": Contender("both log-probabilities only", both(cce_logprob)),
        "floor": Contender("two matrix products", products(*((x, weight.T, logits) for x in (p, q)))),
    }


def backward(given: Inputs, kept: Kept = ALL_KEPT) -> dict[str, Contender]:
    hidden, weight, targets = given.hidden_p.requires_grad_(), given.weight.requires_grad_(), given.targets
    logits = weight.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    per_token = "log-probability per token, its gradients"

    def contender(computes, logprob):
        return Contender(computes, gradients_of(lambda: logprob(hidden, weight, targets), hidden, weight))

    def keeping(room):
        return lambda *x: linear_logprob(*x, keep_logits_bytes=room()).logprob

    return {
        "vogue": contender(f"{per_token}; entropy too", lambda *x: linear_logprob(*x).logprob),
        **{name: contender(f"{per_token}; entropy too; logits kept", keeping(room)) for name, room in kept.items()},
        "reference": contender(f"{per_token}; entropy too", lambda *x: linear_logprob(*x, backend="torch").logprob),
        "eager": contender(per_token, eager_logprob),
        "compile": contender(per_token, torch.compile(eager_logprob, dynamic=False)),
        "liger-scaled": contender(per_token, liger_scaled_logprob),
        "liger": contender(f"{per_token} (of its GRPO loss)", liger_logprob),
        "liger-ce": contender("sum of the log-probabilities, its gradients", liger_cross_entropy),
        "cce": contender(f"{per_token}, the small ones left out", cce_logprob),
        "floor": Contender(
            "three matrix products and the logits' again",
            products(
                *((hidden, weight.T, logits),) * 2,  # a backward without stored logits computes them again
                (logits, weight, grad_hidden),  # of the logits' gradient, were it one
                (logits.T, hidden, grad_weight),
            ),
        ),
    }


def trainer(given: Inputs, kept: Kept = ALL_KEPT) -> dict[str, Contender]:
    """As `vogue.model.policy.PolicyHead` calls it: a bias that bans tokens, gradients of one branch alone."""
    other, hidden, weight = given.hidden_p, given.hidden_q.requires_grad_(), given.weight.requires_grad_()
    bias = weight.new_zeros(len(weight)).detach()
    bias[:3] = -100.0
    logits = weight.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    compiled = torch.compile(eager_trained, dynamic=False)
    computes = "both branches' statistics, gradients of one log-probability"

    def vogue(room=lambda: 0, backend="auto"):
        def logprob():
            options = {"backend": backend, "keep_logits_bytes": room()}
            return linear_branch_stats(other, hidden, weight, given.targets, bias, **options).logprob_q

        return Contender(computes, gradients_of(logprob, hidden, weight))

    plain = other, hidden, weight, bias, given.targets
    multiplied = *((x, weight.T, logits) for x in (other, hidden, hidden)), (logits, weight, grad_hidden)
    return {
        "vogue": vogue(),
        **{name: vogue(room) for name, room in kept.items()},
        "reference": vogue(backend="torch"),
        "eager": Contender(computes, gradients_of(lambda: eager_trained(*plain)[0], hidden, weight)),
        "compile": Contender(computes, gradients_of(lambda: compiled(*plain)[0], hidden, weight)),
        "floor": Contender("five matrix products", products(*multiplied, (logits.T, hidden, grad_weight))),
    }


def divergence(given: Inputs, kept: Kept = ALL_KEPT) -> dict[str, Contender]:
    p, q, weight = (x.requires_grad_() for x in given[:3])
    logits = [weight.new_empty(len(p), len(weight)) for _ in range(2)]
    grad_hidden, grad_weight = torch.empty_like(p), torch.empty_like(weight)
    compiled = torch.compile(eager_symmetric_kl, dynamic=False)
    computes = "symmetric KL per token, gradients of both branches and the weight"

    def contender(function):
        return Contender(computes, gradients_of(function, p, q, weight))

    multiplied = [(x, weight.T, out) for x, out in ((p, logits[0]), (q, logits[1]))]
    multiplied += [(out, weight, grad_hidden) for out in logits]
    multiplied += [(out.T, x, grad_weight) for x, out in ((p, logits[0]), (q, logits[1]))]

    def vogue(room=lambda: 0, backend="auto"):
        def symmetric_kl():
            options = {"backend": backend, "keep_logits_bytes": room()}
            return linear_branch_stats(p, q, weight, given.targets, **options).symmetric_kl

        return contender(symmetric_kl)

    return {
        "vogue": vogue(),
        **{name: vogue(room) for name, room in kept.items()},
        "reference": vogue(backend="torch"),
        "eager": contender(lambda: eager_symmetric_kl(p, q, weight)),
        "compile": contender(lambda: compiled(p, q, weight)),
        "floor": Contender("six matrix products and the logits' again", products(*multiplied[:2], *multiplied)),
    }


def loss(given: Inputs, kept: Kept = ALL_KEPT) -> dict[str, Contender]:
    """A whole loss: z = 1 for all tokens, ratio 1, advantages of both signs."""
    hidden, other, weight = given.hidden_p.requires_grad_(), given.hidden_q, given.weight.requires_grad_()
    targets, n = given.targets, len(given.targets)
    advantages = torch.ones(n, device=hidden.device)
    advantages[::2] = -1.0
    compiled = torch.compile(eager_trained, dynamic=False)
    drawn = torch.ones(n, dtype=torch.bool, device=hidden.device)

    def plain(statistics):
        logprob, entropy, symmetric = statistics(other, hidden, weight, None, targets)
        shaped = shaped_advantage(advantages, entropy, symmetric, drawn, GuidanceConfig())
        return clipped_surrogate(logprob, None, shaped.advantage, 0.2, 0.2)[0] / n

    def liger():
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        rows = max(x for x in (8, 4, 2, 1) if n % x == 0)
        shape = rows, n // rows
        function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=hidden.is_cuda)
        mask = torch.ones(shape, device=hidden.device)
        given = hidden.view(*shape, -1), weight, targets.view(shape), mask, advantages[:rows]
        return function(*given)[0]

    def contender(computes, results):
        return Contender(computes, gradients_of(results, hidden, weight))

    whole, taken = "VOGUE's loss, its gradients", (hidden, weight, targets, advantages)

    def vogue(room=lambda: 0):
        return lambda: VogueLoss(keep_logits_bytes=room())(*taken, hidden_other=other, noisy=True)[0]

    return {
        "vogue": contender(whole, vogue()),
        **{name: contender(f"{whole}; logits kept", vogue(room)) for name, room in kept.items()},
        "vogue-grpo": contender("the loss with z = 0, one branch", lambda: VogueLoss()(*taken)[0]),
        "eager": contender(whole, lambda: plain(eager_trained)),
        "compile": contender(f"{whole}; its statistics compiled", lambda: plain(compiled)),
        "liger": contender("GRPO's loss, its gradients (chunked)", liger),
    }


class Work(NamedTuple):
    title: str
    make: Callable[..., dict[str, Contender]]  # of the inputs, and of what is kept
    steps: tuple[str, ...]  # of roofline.py, whose bounds add up


WORK = {
    "forward": Work("forward, both branches", forward, ("forward, both branches",)),
    "backward": Work(
        "forward and backward of one branch's logprob",
        backward,
        ("forward of one branch", "backward of one branch's logprob"),
    ),
    "trainer": Work(
        "the trainer's own: bias, both branches, gradients of one",
        trainer,
        ("forward, both branches", "backward of one branch's logprob"),
    ),
    "kl": Work(
        "forward and backward of the symmetric KL",
        divergence,
        ("forward, both branches", "backward of both branches' KL"),
    ),
    "loss": Work(
        "the whole VogueLoss, forward and backward",
        loss,
        ("forward, both branches", "backward of one branch's logprob"),
    ),
}
CONTENDERS = (
    *("vogue", "vogue-kept", "vogue-grpo", "reference", "eager", "compile"),
    *("liger-scaled", "liger", "liger-ce", "cce", "floor"),
)
