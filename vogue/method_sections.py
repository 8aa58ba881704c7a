"""The settings of methods beside VOGUE's own: which samples a step takes, and what completions earn beyond a reward."""

# pydantic's defaults stand first in Field, where pyright doesn't look for them.
# pyright: reportCallIssue=false

from typing import Literal

from pydantic import Field, model_validator

from vogue.settings import Count, NonNegative, Positive, Section, Share


class SamplingConfig(Section):
    """Which samples a step takes: each once an epoch, or some of them by what the policy makes of them (MMR1)."""

    kind: Literal["uniform", "variance"] = Field(
        "uniform",
        description="uniform: every sample once an epoch; variance: a share of each step's prompts by the score "
        "outcome * P (1 - P) + diversity * D, with P the share of a sample's completions that are right and D that of "
        "distinct trigrams among them",
    )
    share: Share = Field(
        0.5, description="share of each step's prompts that are drawn by their scores, with replacement, with variance"
    )
    source: Literal["rollouts", "history"] = Field(
        "rollouts",
        description="where P and D are from: sampling.n fresh completions of every sample each sampling.every steps "
        "(rollouts, MMR1), which may cost more than the training's; or the latest group that was generated in training "
        "(history), where a sample not yet seen counts as one of the highest score",
    )
    every: Count = Field(35, description="steps between two measurements of all samples, with sampling.source=rollouts")
    n: int = Field(32, ge=2, description="completions of each sample in such a measurement")
    outcome: NonNegative = Field(0.8, description="alpha of the score: the weight of P (1 - P)")
    diversity: NonNegative = Field(0.2, description="beta of the score: the weight of the share of distinct trigrams")
    normalise: bool = Field(
        False,
        description="scale P (1 - P) and D over all samples to [0, 1] first, the lowest to 0 (MMR1's published code, "
        "with sampling.diversity=0)",
    )

    @model_validator(mode="after")
    def _scores_something(self) -> "SamplingConfig":
        if self.kind == "variance" and not self.outcome + self.diversity:
            raise ValueError("sampling.outcome=0 and sampling.diversity=0: every score would be 0")
        return self

    def scored(self, prompts: int) -> int:
        """How many of a step's prompts are drawn by their scores: the share, rounded down."""
        return int(self.share * prompts + 1e-9) if self.kind == "variance" else 0

    @property
    def measures(self) -> bool:
        """Whether all samples are measured every so many steps."""
        return self.kind == "variance" and self.source == "rollouts"

    def refreshes(self, step: int) -> bool:
        """Whether all samples are measured anew before the step chooses its prompts."""
        return self.measures and step % self.every == 0

    @property
    def remembers(self) -> bool:
        """Whether a sample's latest group counts."""
        return self.kind == "variance" and self.source == "history"


class CuriosityConfig(Section):
    """CDE's bonus on rewards, weight * min(|reward| / cap, alpha * B), B a completion's mean -log p a token."""

    weight: NonNegative = Field(
        0.0,
        description="weight of the bonus at the run's start; 0: no bonus. A reward of 0 gets none, so that wrong "
        "answers need reward.wrong",
    )
    schedule: Literal["none", "linear", "cosine", "staircase"] = Field(
        "staircase",
        description="the weight over the run: it stays (none), falls to 0 at the end of trainer.steps (linear, "
        "cosine), or stays until curiosity.drop_at and is 0 from there on (staircase)",
    )
    drop_at: Share = Field(0.5, description="share of trainer.steps after which the weight is 0, with staircase")
    alpha: Positive = Field(1.0, description="alpha of the bonus: the weight of B, in nats a token, below the cap")
    cap: Positive = Field(3.0, description="kappa: the bonus is at most weight * |reward| / cap")

    @property
    def scheduled(self) -> bool:
        """Whether the weight depends on how many steps the run has."""
        return self.weight > 0 and self.schedule != "none"
