r"""How far the policy π is from a reference model, per token, for a loss or a reward: KL(π‖ref), or an estimate of it.

With l = log π(v)/ref(v) of the sampled token v, and ρ = π/π_old of v, through which there is a gradient, too:

    exact        Σ_v π(v) l(v)        the whole vocabulary; so is its gradient
    k1           ρ l                  one token; in the mean over v ~ π_old both the value and the gradient are exact
    k3           ρ (e^-l − 1 + l)     the same, and never negative: DeepSeek-V3.2 (arXiv 2512.02556), and TRL's default
    low_var_kl   e^-l − 1 + l         k3 without ρ, as in GRPO (arXiv 2402.03300), verl and EasyR1

The last one's value is KL(π‖ref) in the mean, where π is π_old. Its gradient isn't that: it is ∇KL(ref‖π), in the mean.
"""

from typing import NamedTuple

from torch import Tensor

from vogue_kernels.surrogates import LOG_RATIO_LIMIT, ratio_of

ESTIMATORS = ("exact", "k1", "k3", "low_var_kl")


class Reference(NamedTuple):
    """N tokens by the reference model."""

    logprob: Tensor  # (N,) nats, without gradient
    kl: Tensor  # (N,) nats, KL(π‖ref) over the vocabulary, with gradient


def divergence(logprob: Tensor, old_logprob: Tensor, reference: Reference, estimator: str) -> Tensor:
    """KL(π‖ref) (N,) in nats by `estimator`, with its gradient; `logprob` (N,) has one, `old_logprob` (N,) has none."""
    if estimator == "exact":
        return reference.kl
    difference = (logprob - reference.logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return ratio_of(logprob, old_logprob) * difference
    found = (-difference).expm1() + difference
    return found if estimator == "low_var_kl" else ratio_of(logprob, old_logprob) * found
