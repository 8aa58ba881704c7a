"""The settings of a run, section by section, with their units and defaults; `vogue.config` puts them together.

Those of adapters, optimizer and trainer are in `vogue.training_sections`, those of methods beside VOGUE's own in
`vogue.method_sections`.
"""

# pydantic's defaults stand first in Field, where pyright doesn't look for them; a Literal may be of a table's keys.
# pyright: reportCallIssue=false, reportInvalidTypeForm=false

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vogue.presets import COMPONENTS, DESIGNS, JUDGING
from vogue.settings import Count, Finite, NonNegative, Positive, PositiveShare, Section, Share

FUNCTION = r"^(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*$"
ALL_TOKENS: dict[str, float] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # values that leave no token out


class ModelConfig(Section):
    """The model that is trained."""

    path: str = Field(description="Hugging Face model folder or hub name", min_length=1)
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the weights, in training and in rollouts"
    )
    attention: Literal["auto", "flex_attention", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="attention of the text model; with auto, flex_attention and sdpa a group shares its prompt. auto "
        "takes flash attention without a mask, on CPUs and on GPUs (there for bfloat16; else sdpa); flex_attention "
        "compiles anew for new shapes",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass instead of keeping them"
    )
    keep_logits_gb: NonNegative = Field(
        0.0,
        description="memory in GB within which the head keeps a micro-batch's logits for its backward pass, which then "
        "needs three matrix products where it needs four; it pays where memory is left over and the head takes a large "
        "share of a step (a small model, a large vocabulary). All logits are tokens x vocabulary x 2 bytes in bfloat16",
    )
    liger: bool = Field(
        False,
        description="Liger's Triton kernels for norms, MLPs and rotations of the text model, on GPUs, for Qwen2-VL, "
        "Qwen2.5-VL and Qwen3-VL",
    )
    freeze_vision: bool = Field(False, description="don't train the vision tower")


class DataConfig(Section):
    """Samples to train and evaluate on, and their prompts."""

    train: str | None = Field(
        None,
        description="samples to train on, see docs/data.md: parquet, JSON, JSONL, CSV, folder, folder@split, or "
        "hub:owner/name@split",
    )
    test: str | None = Field(
        None, description="samples to evaluate on, during training and in `vogue eval`; of the same kinds as data.train"
    )
    test_limit: Count | None = Field(None, description="use only the first so many samples of data.test")
    limit: Count | None = Field(None, description="use only the first so many samples of data.train")
    skip: str | None = Field(
        None, description="file of row numbers of data.train to leave out, one a line, as `vogue data check` writes it"
    )
    problem_key: str | None = Field(
        None, description="column of the question: text or messages; unset: found by its name, see docs/data.md"
    )
    answer_key: str | None = Field(
        None,
        description="column of the right answer, with dots into a record (reward_model.ground_truth); unset: found by "
        "its name",
    )
    images_key: str | None = Field(
        None, description="column of the image or images; empty: there are none; unset: found by its name"
    )
    image_folder: Path | None = Field(
        None, description="folder that images' relative paths start from; unset: the one of the data file"
    )
    format_prompt: str | None = Field(
        None,
        description="Jinja template, or path of one, that makes the problem of {{ content }}, the question, and the "
        "row's other columns; unset: the question is the problem",
    )
    system_prompt: str | None = Field(
        None,
        description="system prompt of every sample; empty: none; unset: the row's own system message, else the one of "
        "reward.design, or none with data.format_prompt",
    )
    min_pixels: Count | None = Field(
        None, description="least pixels of an image, smaller ones are enlarged; unset: what the model's processor does"
    )
    max_pixels: Count | None = Field(
        None,
        description="most pixels of an image, larger ones are made smaller for trainer, engine and evaluation alike; "
        "unset: what the model's processor does",
    )
    max_prompt_tokens: Count = Field(2048, description="most tokens of a prompt with its images; none is ever cut")
    overlong: Literal["refuse", "drop"] = Field(
        "refuse",
        description="samples of more than data.max_prompt_tokens end the run before its start (refuse), or are left "
        "out and counted (drop)",
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse",
        description="an image that turns out broken in the middle of a run ends it, with a checkpoint (refuse), or the "
        "next sample takes its place and it is counted (skip)",
    )


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

    kind: Literal["group", "rloo", "passk"] = Field(
        "group",
        description="group: (reward - mean) / std, as in GRPO; rloo: reward - mean of the group's others; passk: by "
        "right and wrong answers, as in Pass@k Training",
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


class OwnReward(Section):
    """A reward function of your own: one of `reward.functions`."""

    function: str = Field(
        pattern=FUNCTION, description="path/to/file.py:name or an importable package.module:name, see docs/rewards.md"
    )
    options: dict[str, Any] = Field({}, description="further arguments of the function, by their names")


class RewardConfig(Section):
    """What a completion is asked for, and what it earns."""

    design: Literal[*DESIGNS] = Field(
        "verifiable", description=f"system prompt and sum of weight * score, see docs/rewards.md: {', '.join(DESIGNS)}"
    )
    weights: dict[str, Finite] = Field(
        {},
        description="weight of each score in the sum, by its name: the design's scores, unset the design's weight "
        "(0.9 accuracy and 0.1 format in verifiable), and your own functions, unset 1",
    )
    function: str | None = Field(
        None,
        pattern=FUNCTION,
        description="path/to/file.py:name, or an importable package.module:name, of a reward function of your own, in "
        "place of the design's sum: def name(completions: list[str], samples: list[dict]) -> list[float]",
    )
    functions: dict[str, OwnReward] = Field(
        {},
        description="reward functions of your own by name, each {function: FILE.py:NAME, options: {}}, whose values "
        "times their weights are added to the design's sum; see docs/rewards.md",
    )
    scorer: OwnReward | None = Field(
        None,
        description="what measures how well a description fits its image, with reward.design=pebr_perception: a "
        "function as in reward.functions, whose samples have the paths of their images as `images`; for a model of "
        "CLIP's kind {function: 'vogue.rewards.similarity:clip', options: {model: FOLDER}}",
    )
    similar_enough: Positive = Field(
        0.4, description="value of reward.scorer from which on a description has the whole score of similarity"
    )
    expected_length: Count = Field(
        512, description="tokens up to which a completion has the whole score of length, with pebr_perception"
    )
    wrong: Annotated[float, Field(le=0, allow_inf_nan=False)] = Field(
        0.0,
        description="value of a wrong answer in the design's sum, where a right one has 1 and one with partial credit "
        "stands between them; -1 in CDE",
    )
    overlong_buffer: Share = Field(
        0.0,
        description="a completion that ends in this last share of rollout.max_tokens loses up to 1 of its reward "
        "(DAPO); 0: none",
    )
    timeout: Positive = Field(
        60.0,
        description="seconds that a call of a reward function may take, and importing its file; a call is of all "
        "completions of a step",
    )

    def unweighed(self) -> "RewardConfig":
        """The same where accuracy alone is read: what a completion earns isn't worked out, and costs nothing."""
        return self.model_copy(update={"weights": dict.fromkeys(self.functions, 0.0)})

    @model_validator(mode="before")
    @classmethod
    def _fill_weights(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("function"):
            return values
        given, functions = values.get("weights") or {}, values.get("functions") or {}
        if not isinstance(given, dict) or not isinstance(functions, dict):
            return values  # as the check of each setting will say
        weights = DESIGNS.get(str(values.get("design", "verifiable")), {}) | dict.fromkeys(functions, 1.0)
        return values | {"weights": weights | {name: weight for name, weight in given.items() if weight is not None}}

    @model_validator(mode="after")
    def _scores_have_names(self) -> "RewardConfig":
        if self.function and (self.functions or self.weights):
            raise ValueError(f"reward.function={self.function} takes the place of all weights and of reward.functions")
        if self.scorer and (self.function or self.design != "pebr_perception"):
            raise ValueError(f"reward.scorer={self.scorer.function}: only reward.design=pebr_perception reads it")
        if self.weights.get("similarity") and self.design == "pebr_perception" and self.scorer is None:
            weight = self.weights["similarity"]
            raise ValueError(
                f"reward.scorer is not set: what measures the similarity of reward.weights.similarity={weight}"
            )
        if self.wrong and (self.function or self.design not in JUDGING):
            where = f"reward.function={self.function}" if self.function else f"reward.design={self.design}"
            raise ValueError(f"reward.wrong={self.wrong}: {where} has no score of right and wrong answers")
        for name in self.functions:
            if name in (*COMPONENTS, *DESIGNS[self.design], "accuracy", "format", "overlong"):
                raise ValueError(f"reward.functions.{name}: this is the name of a score of the designs")
        scores = [*DESIGNS[self.design], *self.functions]
        for name, weight in self.weights.items():
            if name not in scores:
                raise ValueError(f"reward.weights.{name}={weight}: the scores are {', '.join(scores)}")
            if weight < 0 and name not in self.functions:
                raise ValueError(f"reward.weights.{name}={weight}: a score of the design has a weight of 0 or more")
        return self


class RolloutConfig(Section):
    """How completions are generated."""

    engine: Literal["vllm", "hf"] = Field("vllm", description="what generates completions: vLLM, or transformers (hf)")
    prompts: Count = Field(32, description="prompts a step, of all ranks together")
    rounds: Count = Field(
        1,
        description="most rollouts a step: new prompts are taken until enough groups have right and wrong answers "
        "(DAPO's "
        "dynamic sampling); 1: none of that",
    )
    n: int = Field(8, ge=2, description="completions a prompt: the group's size G")
    noisy_share: Share = Field(
        0.0,
        description="share of each group's completions that are generated from T(x), yet trained on x (NoisyRollout)",
    )
    max_tokens: Count = Field(1024, description="most tokens of a completion")
    temperature: Positive = Field(
        1.0, description="sampling temperature of rollouts; the policy's logits are divided by it in training too"
    )
    top_p: PositiveShare = Field(
        1.0,
        description="sample from the likeliest tokens alone whose probabilities sum to this; 1: from all. What is "
        "trained stays the whole distribution, see docs/rollouts.md",
    )
    top_k: int = Field(0, ge=0, description="sample from so many of the likeliest tokens alone; 0: from all")
    min_p: Share = Field(
        0.0, description="sample from tokens alone that are at least this times as likely as the likeliest; 0: from all"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="strings that end a completion, which counts as finished and keeps the string, in rollouts and "
        "evaluations: [</answer>]",
    )
    memory: Share = Field(0.4, description="share of a GPU's memory that vLLM takes")
    kv_cache_gb: Positive = Field(1.0, description="size of vLLM's KV cache on a CPU, in GB a rank")
    tensor_parallel: Count = Field(
        1,
        description="ranks that share one engine of vLLM, each with its part of every layer (tensor parallelism); "
        "divides the number of ranks",
    )
    sleep: bool = Field(
        False,
        description="while the policy trains, vLLM gives the memory of its weights and KV cache away, and takes it "
        "back for the next rollout; on GPUs only",
    )
    engine_args: dict[str, Any] = Field(
        {},
        description="further arguments of vLLM's engine, by its own names: {max_num_seqs: 64, enforce_eager: true}",
    )

    @model_validator(mode="after")
    def _arguments_have_an_engine(self) -> "RolloutConfig":
        if self.engine_args and self.engine != "vllm":
            raise ValueError(f"rollout.engine_args are vLLM's, but rollout.engine={self.engine}")
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel} is vLLM's, but rollout.engine={self.engine}"
            )
        if self.sleep and self.engine != "vllm":
            raise ValueError(f"rollout.sleep=true is vLLM's, but rollout.engine={self.engine}")
        return self

    @property
    def truncation(self) -> list[str]:
        """The settings that keep unlikely tokens from being sampled, as key=value; none where every token may be."""
        given = {
            name: getattr(self, name) for name, all_tokens in ALL_TOKENS.items() if getattr(self, name) != all_tokens
        }
        return [f"rollout.{name}={value}" for name, value in given.items()]

    @property
    def noisy_count(self) -> int:
        """Completions of each group that are generated from T(x), yet trained on x."""
        return round(self.noisy_share * self.n)


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
