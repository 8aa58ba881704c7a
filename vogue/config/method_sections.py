"""The settings of the methods: views and draws, VOGUE's bonuses, advantages and losses, and what other methods add."""

# pydantic's defaults stand first in Field, where pyright doesn't look for them.
# pyright: reportCallIssue=false

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vogue.settings import Count, Finite, NonNegative, Positive, PositiveShare, Section, Share


class PerturbConfig(Section):
    """T(x): how an image is perturbed."""

    preset: Literal["noise", "paper", "mask"] = Field(
        "noise",
        description="noise: Gaussian noise alone; paper: flips, rotation and jitter of brightness and contrast, then "
        "noise; mask: black squares (PAPO)",
    )
    patch: Count = Field(14, description="side in pixels of the squares of perturb.preset=mask")
    share: Share = Field(0.6, description="probability that a square of perturb.preset=mask is black")
    sigma: NonNegative = Field(0.4, description="standard deviation of the Gaussian noise on pixels in [0, 1]")
    anneal_at: Share | None = Field(
        None,
        description="share of trainer.steps after which perturb.sigma has fallen to half, along a sigmoid; unset: it "
        "is constant",
    )

    @model_validator(mode="after")
    def _is_read(self) -> "PerturbConfig":
        masks = self.preset == "mask"
        for name in ("sigma", "anneal_at") if masks else ("patch", "share"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"perturb.{name}={getattr(self, name)}: perturb.preset={self.preset} doesn't read it")
        return self


class BranchConfig(Section):
    """The draw z between the raw image x and the noisy image T(x)."""

    rollout: Literal["raw", "drawn"] = Field(
        "raw",
        description="image that completions are generated from and trained on. drawn: the one that was drawn "
        "(Algorithm 1); raw: always the raw one, and the draw only decides whether g_per is paid (the authors' code)",
    )
    granularity: Literal["prompt", "response", "step"] = Field(
        "prompt",
        description="what one draw z decides: a prompt, a response (Algorithm 1) or a step (the authors' code)",
    )
    probability: Share | None = Field(
        None, description="probability of the noisy branch, throughout the run; unset: max(0, 1 - step / trainer.steps)"
    )


class GuidanceConfig(Section):
    """The bonuses on the advantage: g_out of the output entropy u_out, g_per of the branches' divergence u_per."""

    alpha_out: NonNegative = Field(
        0.4, description="weight of u_out in g_out = min(|A| / beta_out, alpha_out u_out); 0 switches it off"
    )
    beta_out: Positive = Field(2.0, description="g_out is at most |A| / beta_out")
    alpha_per: NonNegative = Field(
        1.0, description="weight of u_per in g_per = min(|A| / beta_per, alpha_per u_per); 0 switches it off"
    )
    beta_per: Positive = Field(2.0, description="g_per is at most |A| / beta_per")
    order: Literal["parallel", "sequential"] = Field(
        "parallel",
        description="parallel: g_out is capped by |A| / beta_out (the paper); sequential: by |A + g_per| / beta_out "
        "(the authors' code)",
    )
    sign_transition: tuple[Share, Share] | None = Field(
        None,
        description="[start, end] as shares of trainer.steps, between which the sign of g_per goes from 1 (it rewards "
        "tokens that the perturbation changes) to -1 (tokens that it leaves alone); unset: the sign is 1 throughout",
    )


class UncertaintyConfig(Section):
    """How u_out and u_per are computed."""

    entropy: Literal["trained", "drawn"] = Field(
        "trained",
        description="branch whose entropy u_out is: the one that is trained, or the one that was drawn (the authors' "
        "code); "
        "they differ with branch.rollout=raw alone",
    )
    estimator: Literal["exact", "k3", "sampled"] = Field(
        "exact",
        description="u_out and u_per are computed from the whole vocabulary (exact), estimated without bias from the "
        "sampled token (k3), or are the sampled token's term of the sum alone (sampled, the authors' code)",
    )
    divergence: Literal["symmetric", "forward", "reverse"] = Field(
        "symmetric",
        description="u_per is half the sum of both KLs (symmetric), KL(raw||noisy) (forward), or KL(noisy||raw) "
        "(reverse)",
    )


class AdvantageConfig(Section):
    """How rewards become the advantage A of a completion in its group."""

    kind: Literal["group", "rloo", "passk", "gae"] = Field(
        "group",
        description="group: (reward - mean) / std, as in GRPO; rloo: reward - mean of the group's others; passk: by "
        "right and wrong answers, as in Pass@k Training; gae: of each token, by the value heads of critic (PPO)",
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group",
        description="what advantage.kind=group divides by: the group's std; the std of all rewards of the step that "
        "are trained on (batch); or nothing, as in Dr. GRPO",
    )
    k: Count = Field(4, description="k of Pass@k Training, with advantage.kind=passk; at most rollout.n")
    pairs: Share = Field(
        1.0,
        description="share of a group's pairs that are trained on, best completion with worst, second with second last "
        "and so on, the widest pairs first (Shuffle-R1); all G completions count in the advantages; 1: all",
    )
    shape: NonNegative = Field(
        0.0,
        description="lambda by which a completion's first and last token have a larger advantage than its middle one "
        "(AVATAR), A (1 + lambda (2 t / (L - 1) - 1)^2) at token t of L; 0: all have the same",
    )

    @property
    def valued(self) -> bool:
        """Whether advantages are of tokens, from values of their states."""
        return self.kind == "gae"


class CriticConfig(Section):
    """The value heads of advantage.kind=gae, on the policy's hidden states, and CDE's bonus of their spread."""

    heads: Count = Field(4, description="K: value heads, each a linear function of a token's hidden state")
    share: PositiveShare = Field(1.0, description="zeta: share of all prefixes that each head learns of")
    lr: Positive = Field(1e-5, description="learning rate of the heads, which have an AdamW of their own")
    warmup_steps: int = Field(
        10, ge=0, description="steps at the run's start in which the heads learn and all advantages are 0"
    )
    gamma: Share = Field(1.0, description="discount of the next token's value")
    lam: Share = Field(1.0, description="lambda of the generalised advantages: 1 is the reward less the value")
    weight: NonNegative = Field(
        1.0, description="weight of the bonus min(|A| / cap, alpha std of the heads) on advantages; 0: plain PPO"
    )
    alpha: Positive = Field(0.5, description="alpha of the bonus: the weight of the heads' std below the cap")
    cap: Positive = Field(3.0, description="kappa: the bonus is at most weight * |A| / cap")


class LossConfig(Section):
    """The surrogate, its corrections, and how tokens add up in it."""

    kind: Literal["ppo", "cispo", "sapo"] = Field(
        "ppo",
        description="a token's loss: the clipped surrogate (ppo); the log-probability times the clipped ratio, without "
        "gradient (cispo); or the ratio in a sigmoid that fades out (sapo)",
    )
    clip_low: Share = Field(
        0.2, description="the ratio pi / pi_old is clipped below at 1 - clip_low; 1: not clipped below"
    )
    clip_high: NonNegative = Field(
        0.2, description="the ratio pi / pi_old is clipped above at 1 + clip_high; VOGUE's paper states neither clip"
    )
    sapo_temperature_pos: Positive = Field(
        1.0, description="how fast loss.kind=sapo fades out as the ratio leaves 1, where the advantage is positive"
    )
    sapo_temperature_neg: Positive = Field(
        1.05, description="how fast loss.kind=sapo fades out as the ratio leaves 1, where the advantage is negative"
    )
    aggregation: Literal["token-mean", "sequence-mean", "constant"] = Field(
        "token-mean",
        description="mean over all tokens; over completions of each one's token mean; or constant: over completions of "
        "each one's sum / rollout.max_tokens, as in Dr. GRPO",
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token",
        description="what has a ratio pi / pi_old: each token, or each completion, the geometric mean of its tokens' "
        "(GSPO)",
    )
    drop_unfinished: bool = Field(
        False,
        description="leave completions that rollout.max_tokens cut off out of the loss (DAPO's overlong filtering)",
    )
    clip_dual: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        None,
        description="the loss of a token with a negative advantage A is at most -clip_dual A (dual-clip PPO); unset: "
        "no bound",
    )
    importance_cap: Positive | None = Field(
        None,
        description="multiply a token's loss by the trainer's probability / the engine's, bounded above by this; with "
        "neither this nor importance_floor set: by nothing",
    )
    importance_floor: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="multiply a token's loss by the trainer's probability / the engine's, bounded below by this; "
        "IcePop is a floor of 0.5, a cap of 5 and importance_mode=token_mask",
    )
    importance_mode: Literal[
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "geometric_truncate",
        "geometric_mask",
    ] = Field(
        "token_truncate",
        description="what has a ratio of the trainer's probability to the engine's: a token, a completion (sequence), "
        "or a completion as the geometric mean of its tokens (geometric); and what becomes of a ratio out of its "
        "bounds: truncate gives it the bound, mask leaves its loss out",
    )
    entropy_coef: Finite = Field(
        0.0,
        description="weight of the policy's mean entropy, in nats a token, in what is maximised; it is averaged as the "
        "loss is; negative: a punishment. Completions of advantage 0 are computed too",
    )
    entropy_target: Positive | None = Field(
        None,
        description="mean entropy in nats that the weight is steered to: from entropy_coef it rises by "
        "entropy_coef_delta after an update of at most that entropy, falls after any other, and counts after the "
        "former alone; unset: it is constant",
    )
    entropy_coef_delta: Positive = Field(0.005, description="step of the weight with entropy_target, after each update")
    entropy_coef_max: Positive = Field(1.0, description="highest weight with entropy_target; the lowest is 0")
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="share of an update's tokens that are trained on, those of the highest entropy before it; 1: all. "
        "Below 1 everything goes through one more forward, without gradient",
    )

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> "LossConfig":
        read_by = dict.fromkeys(("clip_low", "clip_high"), ("ppo", "cispo")) | {"clip_dual": ("ppo",)}
        read_by |= dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), ("sapo",))
        for name, kinds in read_by.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and self.kind not in kinds:
                raise ValueError(f"loss.{name}={value}: loss.kind={' or '.join(kinds)} reads it, {self.kind} doesn't")
        if self.importance_cap is None and self.importance_floor is None and self.importance_mode != "token_truncate":
            raise ValueError(
                f"loss.importance_mode={self.importance_mode}: without loss.importance_cap or loss.importance_floor "
                "nothing reads it"
            )
        floor, cap = self.importance_floor, self.importance_cap
        if floor is not None and cap is not None and floor >= cap:
            raise ValueError(f"loss.importance_floor={floor} is not below loss.importance_cap={cap}")
        self._check_entropy()
        return self

    def _check_entropy(self) -> None:
        for name in ("entropy_coef_delta", "entropy_coef_max"):
            value = getattr(self, name)
            if self.entropy_target is None and value != type(self).model_fields[name].default:
                raise ValueError(f"loss.{name}={value}: without loss.entropy_target nothing reads it")
        if self.entropy_target is not None and not 0 <= self.entropy_coef <= self.entropy_coef_max:
            raise ValueError(
                f"loss.entropy_coef={self.entropy_coef}: with loss.entropy_target it starts between 0 and "
                f"loss.entropy_coef_max={self.entropy_coef_max}"
            )


class KlConfig(Section):
    """What keeps the policy near a reference model: coef KL(policy || reference) a token."""

    coef: NonNegative = Field(0.0, description="weight of the KL to the reference; 0: there is no reference")
    placement: Literal["loss", "reward"] = Field(
        "loss",
        description="where it counts: in each token's loss, or, summed over its tokens, in each completion's reward",
    )
    estimator: Literal["exact", "k1", "k3", "low_var_kl"] = Field(
        "exact",
        description="over the whole vocabulary (exact), or from the sampled token: k1 and k3, whose mean and gradient "
        "are right, or low_var_kl, as GRPO's paper, verl and EasyR1 have it, whose gradient is KL(reference || "
        "policy)'s",
    )
    reference: str | None = Field(
        None,
        description="model to stay near, a folder or a name as model.path; unset: the one below the adapters with "
        "lora, else a frozen copy of model.path",
    )

    @model_validator(mode="after")
    def _is_read(self) -> "KlConfig":
        for name, field in type(self).model_fields.items():
            if not self.coef and getattr(self, name) != field.default:
                raise ValueError(f"kl.{name}={getattr(self, name)}: with kl.coef=0 there is no reference")
        return self

    @property
    def in_loss(self) -> bool:
        return self.coef > 0 and self.placement == "loss"

    @property
    def in_reward(self) -> bool:
        return self.coef > 0 and self.placement == "reward"


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
