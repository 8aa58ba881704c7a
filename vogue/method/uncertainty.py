r"""What the loss reads of a token: its log-probability and both uncertainties, as `uncertainty` in the settings says.

v is the sampled token, s the branch that it was sampled from and is trained on, o the other one, r = o(v) / s(v).

             u_out               KL(s‖o)       KL(o‖s)           symmetric
    exact    H(s)                sums over the whole vocabulary
    k3       −log s(v)           r − 1 − log r  r log r − r + 1   ½ (r − 1) log r
    sampled  −s(v) log s(v)                                       ½ (o(v) − s(v)) (log o(v) − log s(v))

With p the raw and q the noisy branch, "forward" is KL(p‖q) and "reverse" KL(q‖p): which of the two columns that is
depends on the branch that s is.

Under v ~ s the means of k3 are the exact values, and its divergences are never negative (k3 is the name of the first
one in J. Schulman, "Approximating KL divergence", 2020). `sampled` is what VOGUE's official code computes: one term of
each sum, which is no estimate of it; its entropy is at most 1/e.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vogue.method.kl import Reference


class OtherBranch(NamedTuple):
    """The first M of N tokens on the branch that they are not trained on.

    No result has a gradient but, where `perception` asks for it, those of the first one.
    """

    logprob: Tensor  # (M,) nats
    entropy: Tensor  # (M,) nats
    kl_own_other: Tensor  # (M,) nats, KL(s‖o)
    kl_other_own: Tensor  # (M,) nats, KL(o‖s)
    symmetric_kl: Tensor  # (M,) nats, half the sum of both


class TokenStats(NamedTuple):
    """N tokens on the branch that they are trained on, and the first M of them on those it is compared with."""

    logprob: Tensor  # (N,) nats, with gradient
    entropy: Tensor  # (N,) nats, with gradient
    others: tuple[OtherBranch, ...]  # M falls from each to the next; none where nothing is compared
    reference: Reference | None = None  # None where the step doesn't read it
    degraded: tuple[OtherBranch, ...] = ()  # the first M tokens on degraded views, with gradients
    hidden: Tensor | None = None  # (N, D) states that predict the tokens, without gradient; None: unread

    @property
    def other(self) -> OtherBranch | None:
        """The first one: the noisy branch of tokens trained on the raw one, and the raw one of those on the noisy."""
        return self.others[0] if self.others else None


class Signals(NamedTuple):
    """What the loss reads of N tokens."""

    logprob: Tensor  # (N,) nats, with gradient
    u_out: Tensor  # (N,) nats
    u_per: Tensor | None  # (N,) nats, 0 where the branches aren't compared; None where none are
    # (N,) nats, exact, of the trained branch, with gradient: what an entropy bonus reads, whatever u_out is
    entropy: Tensor | None = None
    # (N,) bool, the tokens that are trained on, where `loss.top_entropy_quantile` leaves others out; None: all
    chosen: Tensor | None = None
    reference: Reference | None = None
    other: OtherBranch | None = None  # of the first M tokens, with the gradients that `perception` asks for
    degraded: tuple[OtherBranch, ...] = ()


def read_signals(
    stats: TokenStats, noisy: Tensor, paid: Tensor, estimator: str, divergence: str, entropy: str
) -> Signals:
    """The signals of N tokens.

    noisy (N,) bool: tokens that are trained on the noisy branch. paid (N,) bool: tokens whose u_per is paid, which are
    those that the draw gave to the noisy branch. entropy: u_out is that of the branch that is "trained", or of the one
    that was "drawn".
    """
    u_out = output_uncertainty(stats.entropy, stats.logprob, estimator)
    rest = {name: getattr(stats, name) for name in ("entropy", "reference", "other", "degraded")}
    if stats.other is None:
        return Signals(stats.logprob, u_out, None, **rest)
    other = OtherBranch(*(value.detach() for value in stats.other))
    m = len(other.logprob)
    u_per = perception_uncertainty(stats.logprob[:m], other, noisy[:m], estimator, divergence)
    if entropy == "drawn":
        elsewhere = (paid & ~noisy)[:m]
        of_drawn = torch.where(elsewhere, output_uncertainty(other.entropy, other.logprob, estimator), u_out[:m])
        u_out = torch.cat([of_drawn, u_out[m:]])
    return Signals(stats.logprob, u_out, nn.functional.pad(u_per, (0, len(u_out) - m)), **rest)


def output_uncertainty(entropy: Tensor, logprob: Tensor, estimator: str) -> Tensor:
    """u_out (N,) in nats from entropies and the sampled tokens' log-probabilities (N,)."""
    logprob = logprob.detach()
    return {"exact": entropy.detach(), "k3": -logprob, "sampled": -logprob.exp() * logprob}[estimator]


def perception_uncertainty(
    logprob: Tensor, other: OtherBranch, noisy: Tensor, estimator: str, divergence: str
) -> Tensor:
    """u_per (M,) in nats of tokens with `logprob` (M,), sampled from the noisy branch where `noisy` (M,) bool.

    "sampled" is symmetric whatever `divergence` says.
    """
    own, log_ratio = logprob.detach(), other.logprob - logprob.detach()
    if estimator == "sampled":
        return (other.logprob.exp() - own.exp()) * log_ratio / 2
    ratio = log_ratio.exp()
    symmetric, own_other, other_own = {
        "exact": (other.symmetric_kl, other.kl_own_other, other.kl_other_own),
        "k3": (
            (ratio - 1) * log_ratio / 2,
            log_ratio.expm1() - log_ratio,
            ratio * log_ratio - log_ratio.expm1(),
        ),
    }[estimator]
    if divergence == "symmetric":
        return symmetric
    # KL(p‖q) is from the other branch to one's own where one's own is the noisy q.
    return torch.where(noisy == (divergence == "forward"), other_own, own_other)
