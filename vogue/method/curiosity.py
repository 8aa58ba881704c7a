r"""CDE's actor bonus: a completion that the policy itself finds unlikely earns more (arXiv 2509.09675).

B  = −(1/T) Σ_t log π(o_t | prompt, o_<t)       log-perplexity of a completion, nats a token
r̃  = r + ω min(|r| / κ, α B)                    what is trained on, before the group's mean is subtracted
ω  = ω₀ · schedule(step / steps)

The cap |r| / κ keeps the bonus from turning a wrong answer's reward around, so a wrong answer needs a reward other
than 0: the paper has −1. It then loses less where the policy was unsure, and the policy stays calibrated.

The schedules' forms are ours: the paper names them and draws the staircase, whose height and drop it doesn't state.
"""

from collections.abc import Sequence
from math import cos, pi


def log_perplexity(logprobs: Sequence[float]) -> float:
    """B (nats a token, ≥ 0) of a completion, from the log-probabilities (T,) of its tokens, T ≥ 1."""
    return -sum(logprobs) / len(logprobs)


def bonus(reward: float, surprise: float, *, weight: float, alpha: float, cap: float) -> float:
    """ω min(|r| / κ, α B) of a completion with this reward r and log-perplexity B; `weight` is ω, `cap` is κ > 0."""
    return weight * min(abs(reward) / cap, alpha * surprise)


def weight_at(step: int, steps: int, weight: float, schedule: str, drop_at: float) -> float:
    """ω at `step`, counted from 0, of a run of `steps`, which begins with `weight`.

    schedule  none: it stays; linear, cosine: it falls to 0 at the end, in a line or along half a cosine; staircase: it
              stays until the share `drop_at` of the run is over, and is 0 from there on

    Raises ValueError for another schedule.
    """
    done = step / steps
    match schedule:
        case "none":
            return weight
        case "linear":
            return weight * (1 - done)
        case "cosine":
            return weight * (1 + cos(pi * done)) / 2
        case "staircase":
            return weight if done < drop_at else 0.0
    raise ValueError(f"schedule {schedule!r} is none of none, linear, cosine, staircase")
