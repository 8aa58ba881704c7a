"""The loss of a token, given its advantage: surrogates of the policy gradient, and the correction for the engine.

    ppo     −min(r A, clip(r, 1 − ε_low, 1 + ε_high) A)                          PPO, arXiv 1707.06347
    cispo   −stopgrad(clip(r, 1 − ε_low, 1 + ε_high)) A log π                    CISPO, arXiv 2506.13585
    sapo    −(4 / τ) σ(τ (r − 1)) A,  τ = τ_pos where A > 0, else τ_neg          SAPO, arXiv 2511.20347

    r = π / π_old of the token, or the geometric mean of its sequence's          GSPO, arXiv 2507.18071
    c = π_old / π_engine, limited to [floor, cap]: multiplies any of them, where another engine has sampled

At r = 1 each has the gradient −A ∇ log π. They differ in what becomes of a token whose probability has changed: PPO's
sends nothing beyond its clip, CISPO's always sends something, and SAPO's fades out.

Tensors are per token, of any one shape, float32.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("ppo", "cispo", "sapo")
LEVELS = ("token", "sequence")
MODES = (
    *("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    *("geometric_truncate", "geometric_mask"),
)
LOG_RATIO_LIMIT = 20.0  # nats; e^88.8 is infinite in float32, and a clipped token's gradient then 0 · ∞ = NaN


def one_of(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")


@dataclass(frozen=True)
class SurrogateConfig:
    """Which surrogate, and its constants: ε_low and ε_high of ppo and cispo, τ_pos and τ_neg of sapo.

    clip_dual: as in `clipped_surrogate`, of ppo alone. importance_level: what has a ratio r, each "token" or each
    "sequence". Raises ValueError for an unknown name and for a constant out of range.
    """

    kind: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None
    importance_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    def __post_init__(self):
        one_of("kind", self.kind, KINDS)
        one_of("importance_level", self.importance_level, LEVELS)
        if self.clip_dual is not None and not self.clip_dual > 1:
            raise ValueError(f"clip_dual must be above 1, got {self.clip_dual}")
        if self.clip_dual is not None and self.kind != "ppo":
            raise ValueError(f"clip_dual={self.clip_dual} bounds the loss of kind=ppo, not of {self.kind}")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class CorrectionConfig:
    """Bounds of c = π_old / π_engine, and what becomes of a ratio outside of them.

    importance_floor, importance_cap: None for no bound on that side. importance_mode: first what has a ratio, a
    "token", a "sequence" (the product of its tokens') or, "geometric", a sequence's geometric mean; then whether a
    ratio outside becomes the bound ("truncate") or 0 ("mask", which leaves the tokens out). "token_mask" with both
    bounds is IcePop (arXiv 2510.18855). Raises ValueError for an unknown mode and for bounds that hold nothing.
    """

    importance_cap: float | None = None
    importance_floor: float | None = None
    importance_mode: str = "token_truncate"

    def __post_init__(self):
        one_of("importance_mode", self.importance_mode, MODES)
        floor, cap = self.importance_floor, self.importance_cap
        for name, bound in (("importance_floor", floor), ("importance_cap", cap)):
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} must be positive, got {bound}")
        if floor is not None and cap is not None and not floor < cap:
            raise ValueError(f"importance_floor={floor} must be below importance_cap={cap}")

    @property
    def on(self) -> bool:
        """Whether anything is corrected."""
        return self.importance_cap is not None or self.importance_floor is not None


class Sequences(NamedTuple):
    """Which tokens are one sequence's. A token that doesn't count has values of 0 in what is summed."""

    ids: Tensor  # int64 in [0, S), of the tokens' shape
    lengths: Tensor  # (S,) tokens of each that count

    def sums(self, values: Tensor) -> Tensor:
        """At each token the sum of `values` over its sequence."""
        ids = self.ids.flatten()
        found = values.new_zeros(len(self.lengths)).index_add(0, ids, values.flatten())
        return found[ids].view_as(values)

    def means(self, values: Tensor) -> Tensor:
        """At each token the mean of `values` over its sequence."""
        return self.sums(values) / self.lengths.clamp(min=1)[self.ids]


def policy_loss(
    logprob: Tensor, old_logprob: Tensor | None, advantage: Tensor, config: SurrogateConfig, sequences: Sequences | None
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether its ratio was clipped (bool; with sapo, which has no clip, nowhere).

    logprob: nats, with gradient. old_logprob: nats, None where the policy that generated is the one trained, so that r
    is exactly 1. sequences: read with importance_level="sequence" alone, and needed there (ValueError).
    """
    old_logprob = logprob.detach() if old_logprob is None else old_logprob
    of_level = logprob
    if config.importance_level == "sequence":
        if sequences is None:
            raise ValueError("importance_level=sequence needs sequence_ids: which tokens are one sequence's")
        of_level = with_sequence_ratio(logprob, old_logprob, sequences)
    clips = config.clip_low, config.clip_high
    if config.kind == "cispo":
        return cispo(logprob, ratio_of(of_level.detach(), old_logprob), advantage, *clips)
    if config.kind == "sapo":
        temperatures = config.sapo_temperature_pos, config.sapo_temperature_neg
        loss = sapo(ratio_of(of_level, old_logprob), advantage, *temperatures)
        return loss, torch.zeros_like(loss, dtype=torch.bool)
    return clipped_surrogate(of_level, old_logprob, advantage, *clips, config.clip_dual)


def clipped_surrogate(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss −min(r A, clip(r, 1 − clip_low, 1 + clip_high) A) of each token, and whether its clipped term was taken.

    r = exp(logprob − old_logprob); old_logprob None means the policy that generated is the one trained: r is exactly 1
    and its gradient that of the log-probability. r ends at e^20 = 5e8, beyond which it sends no gradient. clip_dual
    c > 1 bounds the loss of A < 0 by −c A (dual-clip PPO, arXiv 1912.09729), so that a token that became much likelier
    is not pushed back without limit.
    """
    old_logprob = logprob.detach() if old_logprob is None else old_logprob
    ratio = ratio_of(logprob, old_logprob)
    surrogate = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    objective, taken = torch.minimum(surrogate, clipped), clipped.detach() < surrogate.detach()
    if clip_dual is not None:
        floor = clip_dual * advantage
        bounded = (advantage < 0) & (objective.detach() < floor)
        objective, taken = torch.where(bounded, floor, objective), taken | bounded
    return -objective, taken


def cispo(
    logprob: Tensor, ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The loss −stopgrad(clip(r, 1 − clip_low, 1 + clip_high)) A log π of each token, and whether r was clipped.

    Its value is no estimate of the objective; its gradient is what it is for: every token's, scaled by the clipped
    ratio. Its authors leave ratios unbounded from below, which is clip_low = 1.
    """
    ratio = ratio.detach()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -bounded * advantage * logprob, bounded != ratio


def sapo(ratio: Tensor, advantage: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """The loss −(4 / τ) σ(τ (r − 1)) A of each token, with τ by the sign of A.

    Its gradient is that of −r A times 4 s (1 − s), s = σ(τ (r − 1)): 1 at r = 1, and falling on both sides of it, the
    faster the larger τ is.
    """
    temperature = torch.full_like(advantage, temperature_neg).masked_fill(advantage > 0, temperature_pos)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage


def ratio_of(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    return (logprob - old_logprob).clamp(max=LOG_RATIO_LIMIT).exp()


def with_sequence_ratio(logprob: Tensor, old_logprob: Tensor, sequences: Sequences) -> Tensor:
    """Log-probabilities whose ratio to the old ones is, at every token, that of their whole sequence.

    s = exp(mean_t (log π_t − log π_old,t)), and at every token the gradient s ∇ log π_t: GSPO-token (arXiv 2507.18071,
    eq. 14), which is GSPO where a sequence's tokens have one advantage, and takes VOGUE's where they haven't.
    """
    found = logprob.detach()
    means = sequences.means(found - old_logprob)
    return old_logprob + means + (logprob - found)


def engine_correction(
    mismatch: Tensor, config: CorrectionConfig, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """What multiplies each token's loss since the engine's policy generated it, and whether its ratio is out of bounds.

    mismatch: nats, log (π_old / π_engine) of each token, 0 where the engine's isn't known. sequences: read by all but
    the token modes, which need none (ValueError where it is needed and None).
    """
    level, action = config.importance_mode.split("_")
    if level != "token":
        if sequences is None:
            raise ValueError(
                f"importance_mode={config.importance_mode} needs sequence_ids: which tokens are one sequence's"
            )
        mismatch = sequences.sums(mismatch) if level == "sequence" else sequences.means(mismatch)
    ratio = mismatch.clamp(max=LOG_RATIO_LIMIT).exp()
    bounded = ratio.clamp(config.importance_floor, config.importance_cap)
    outside = bounded != ratio
    return (torch.where(outside, 0.0, ratio) if action == "mask" else bounded), outside
