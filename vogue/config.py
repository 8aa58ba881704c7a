"""Every setting of a run, with its unit and default, in one place.

A run is described by one YAML file plus `key=value` overrides, merged by OmegaConf and checked here: an unknown
key, a wrong type or a value out of range ends the program with one sentence that names it. `method` is a preset:
it fixes the settings that make it what it is, and contradicting it is an error rather than another method.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# What each method is, next to VOGUE's defaults (papers.md's symbols in the field descriptions below).
GRPO: dict[str, Any] = {
    "branch.probability": 0.0,
    "rollout.noisy_share": 0.0,
    "guidance.alpha_out": 0.0,
    "guidance.alpha_per": 0.0,
    "advantage.kind": "group",
}
METHODS: dict[str, dict[str, Any]] = {
    "vogue": {"rollout.noisy_share": 0.0},
    "grpo": GRPO,
    "dapo": GRPO | {"loss.clip_low": 0.2, "loss.clip_high": 0.28, "loss.aggregation": "token-mean"},
    "noisy_rollout": {name: value for name, value in GRPO.items() if name != "rollout.noisy_share"},
    "entropy": {name: value for name, value in GRPO.items() if name != "guidance.alpha_out"},
    "passk": GRPO | {"advantage.kind": "passk"},
    "dupl": {
        "branch.rollout": "raw",
        "branch.granularity": "step",
        "rollout.noisy_share": 0.0,
        "uncertainty.estimator": "sampled",
        "uncertainty.entropy": "drawn",
        "guidance.order": "sequential",
        "loss.clip_dual": 3.0,
        "loss.aggregation": "token-mean",
    },
}

# Where a method starts from other defaults; these may be set to something else. DAPO's buffer is the paper's 4,096 of
# 20,480 tokens; its limit of rounds is ours (the paper has none). NoisyRollout's half is the paper's 6 + 6 completions,
# and its strength has halved at step 40 of the 60 that the paper trains on Geometry3K. DUPL, the name of VOGUE's
# official code, adds little noise to much else, and leaves its clipping to EasyR1's defaults.
STARTS: dict[str, dict[str, Any]] = {
    "dapo": {"rollout.rounds": 4, "reward.overlong_buffer": 0.2},
    "noisy_rollout": {"rollout.noisy_share": 0.5, "perturb.anneal_at": 2 / 3},
    "dupl": {"perturb.preset": "paper", "perturb.sigma": 0.2, "loss.clip_high": 0.3},
}

# What each reward design adds up, and with which weights. VOGUE's; the six of arXiv 2601.00215, whose weights are known
# from a secondary source; Vision-SR1's (arXiv 2508.19652), as in its code. A weight of 0: asked for, not rewarded.
DESIGNS: dict[str, dict[str, float]] = {
    "verifiable": {"accuracy": 0.9, "format": 0.1},
    "vanilla": {"think": 0.1, "answer": 0.9},
    "only_accuracy": {"think": 0.0, "answer": 1.0},
    "mixture": {"description": 0.06, "think": 0.06, "rethink": 0.08, "answer": 0.8},
    "continuous": {"description": 0.06, "think": 0.06, "rethink": 0.08, "answer": 0.8},
    "visual_fusion": {"think": 0.1, "visual": 0.1, "answer": 0.8},
    "no_accuracy": {"description": 0.3, "think": 0.3, "rethink": 0.3, "answer": 0.1},
    "vision_sr1": {"accuracy": 0.9, "format": 0.1, "blind": 1.0},
}
COMPONENTS = tuple(dict.fromkeys(name for weights in DESIGNS.values() for name in weights))

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A setting that can't be used; the message names it and says what would do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(Section):
    path: str = Field(description="Hugging Face model folder or hub name", min_length=1)
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the weights in training and rollout")
    attention: Literal["auto", "flex_attention", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="transformers' attention of the text model; the first three let a group share its prompt, `auto` "
        "by a CPU's flash kernel or by flex_attention on GPUs",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    freeze_vision: bool = Field(False, description="leave the vision tower as it is")


class DataConfig(Section):
    train: str | None = Field(None, description="parquet, JSON, JSONL, folder, or hub:owner/name@split (EasyR1 schema)")
    test: str | None = Field(None, description="the same, for evaluation during training and in `vogue eval`")
    test_limit: Count | None = Field(None, description="use only the first so many of those")
    limit: Count | None = Field(None, description="use only the first so many training samples")
    system_prompt: str | None = Field(None, description="in place of that of reward.design; empty for none")
    max_prompt_tokens: Count = Field(2048, description="a longer prompt is refused with its length, never cut")


class PerturbConfig(Section):
    preset: Literal["noise", "paper"] = Field("noise", description="T: Gaussian noise alone, or the paper's mix")
    sigma: NonNegative = Field(0.4, description="standard deviation of the noise on [0, 1] pixels")
    anneal_at: Share | None = Field(
        None, description="share of trainer.steps after which a sigmoid has taken sigma to half; unset: it stays"
    )


class BranchConfig(Section):
    rollout: Literal["drawn", "raw"] = Field(
        "drawn",
        description="what completions are generated from and trained on: the image that was drawn (Algorithm 1), or "
        "the raw one, where a draw only decides whether u_per is paid (the authors' code)",
    )
    granularity: Literal["prompt", "response", "step"] = Field(
        "prompt", description="what one draw decides; `response` is the paper's Algorithm 1"
    )
    probability: Share | None = Field(None, description="fixed p_noi; unset: max(0, 1 - step / trainer.steps)")


class GuidanceConfig(Section):
    alpha_out: NonNegative = Field(0.4, description="weight of the output entropy; 0 switches u_out off")
    beta_out: Positive = Field(2.0, description="cap of g_out: |A| / beta_out")
    alpha_per: NonNegative = Field(1.0, description="weight of the divergence of the branches; 0 switches u_per off")
    beta_per: Positive = Field(2.0, description="cap of g_per: |A| / beta_per")
    order: Literal["parallel", "sequential"] = Field(
        "parallel", description="cap g_out by |A| / beta_out as well, or by |A + g_per| / beta_out (the authors' code)"
    )
    sign_transition: tuple[Share, Share] | None = Field(
        None,
        description="shares of trainer.steps between which the sign of g_per goes from 1 (rewards tokens that "
        "the perturbation changes) to -1 (those that it leaves alone); unset: 1 throughout",
    )


class UncertaintyConfig(Section):
    entropy: Literal["trained", "drawn"] = Field(
        "trained",
        description="u_out is that of the branch that is trained, or of the one that was drawn; they differ with "
        "branch.rollout=raw alone",
    )
    estimator: Literal["exact", "k3", "sampled"] = Field(
        "exact",
        description="u_out and u_per from the whole vocabulary, from the sampled token without bias, or as VOGUE's "
        "official code has it: that token's term alone",
    )
    divergence: Literal["symmetric", "forward", "reverse"] = Field(
        "symmetric", description="u_per: half the sum of both KLs, KL(raw||noisy), or KL(noisy||raw)"
    )


class AdvantageConfig(Section):
    kind: Literal["group", "passk"] = Field("group", description="GRPO's, or Pass@k Training's by right and wrong")
    k: Count = Field(4, description="of passk")


class RewardConfig(Section):
    design: Literal[*DESIGNS] = Field(
        "verifiable", description=f"a prompt and a sum of weight * score, see vogue/rewards: {', '.join(DESIGNS)}"
    )
    accuracy: NonNegative | None = Field(
        None, description="weight of a right \\boxed{} (0.9); this and all weights here: unset, the design's"
    )
    format: NonNegative | None = Field(
        None, description="weight of <think>...</think> followed by \\boxed{} (0.1); vision_sr1: <description> first"
    )
    answer: NonNegative | None = Field(
        None, description="weight of <answer>: right, nearly right (continuous), or just there (no_accuracy)"
    )
    think: NonNegative | None = Field(None, description="weight of the sentences in <think>")
    description: NonNegative | None = Field(None, description="weight of the sentences in <description>")
    rethink: NonNegative | None = Field(None, description="weight of the sentences in <rethink>")
    visual: NonNegative | None = Field(None, description="weight of the sentences in <visual> within <think>")
    blind: NonNegative | None = Field(
        None, description="weight of a right answer from the own <description>, without the image (1.0)"
    )
    function: str | None = Field(
        None,
        pattern=r"^.+\.py:[A-Za-z_]\w*$",
        description="path/to/file.py:name of your own reward in place of that sum: "
        "def name(completions: list[str], samples: list[dict[str, str]]) -> list[float]",
    )
    overlong_buffer: Share = Field(
        0.0, description="last share of rollout.max_tokens, in which a completion's reward falls by up to 1 (DAPO's)"
    )
    timeout: Positive = Field(60.0, description="seconds a call of reward.function may take: a step's completions")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each component of the design; empty where a function takes the place of the sum."""
        return {} if self.function else {name: getattr(self, name) for name in DESIGNS[self.design]}

    @model_validator(mode="before")
    @classmethod
    def _fill_weights(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("function"):
            return values
        given = {name: value for name, value in values.items() if value is not None or name not in COMPONENTS}
        return DESIGNS.get(str(values.get("design", "verifiable")), {}) | given

    @model_validator(mode="after")
    def _only_weights_of_the_design(self) -> "RewardConfig":
        for name in COMPONENTS:
            value = getattr(self, name)
            if value is None or name in self.weights:
                continue
            if self.function:
                raise ValueError(f"reward.{name}={value}: reward.function takes the place of all weights")
            parts = ", ".join(self.weights)
            raise ValueError(f"reward.{name}={value}: design {self.design} weighs {parts} and nothing else")
        return self


class RolloutConfig(Section):
    engine: Literal["vllm", "hf"] = Field("vllm", description="what generates")
    prompts: Count = Field(32, description="prompts a step, over all ranks")
    rounds: Count = Field(
        1, description="rollouts a step at most, of new prompts, until enough groups have right and wrong answers"
    )
    n: int = Field(8, ge=2, description="G, completions a prompt")
    noisy_share: Share = Field(
        0.0, description="share of each group's completions that are generated from T(x), yet trained on x"
    )
    max_tokens: Count = Field(1024, description="tokens a completion at most")
    temperature: Positive = Field(1.0, description="of sampling; the policy's logits are divided by it in training too")
    memory: Share = Field(0.4, description="share of a GPU's memory for vLLM")
    kv_cache_gb: Positive = Field(1.0, description="vLLM's KV cache on a CPU, GB a rank")

    @property
    def noisy(self) -> int:
        """Completions of each group that are generated from T(x), yet trained on x."""
        return round(self.noisy_share * self.n)


class LossConfig(Section):
    clip_low: Share = Field(0.2, description="the ratio is clipped below at 1 - clip_low")
    clip_high: NonNegative = Field(0.2, description="and above at 1 + clip_high (the paper states neither)")
    aggregation: Literal["token-mean", "sequence-mean"] = Field("token-mean", description="how token losses add up")
    drop_unfinished: bool = Field(
        False, description="no loss on completions that rollout.max_tokens cut off (DAPO's overlong filtering)"
    )
    clip_dual: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        None, description="the loss of a negative advantage A is at most -clip_dual A (dual-clip PPO); unset: no bound"
    )
    importance_cap: Positive | None = Field(
        None, description="multiply each token by min(cap, trainer's / engine's probability); unset: don't"
    )


class OptimizerConfig(Section):
    lr: Positive = Field(1e-6, description="learning rate of AdamW")
    weight_decay: NonNegative = Field(0.01, description="decoupled")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="AdamW's")
    warmup_steps: int = Field(0, ge=0, description="optimizer updates of linear warm-up; constant after that")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")


class TrainerConfig(Section):
    steps: Count = Field(200, description="rollout steps; s_total of the branch schedule")
    updates: Count = Field(1, description="optimizer updates a step: the rollout is split into so many parts")
    output_dir: Path = Field(Path("runs/vogue"), description="metrics, completions, plots and checkpoints go here")
    micro_batch_tokens: Count = Field(8192, description="tokens (prompts and completions) a forward at most")
    shared_prefix: bool = Field(True, description="a group is one row: its prompt is computed once")
    save_every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(2, description="checkpoints to keep")
    eval_every: int = Field(
        0, ge=0, description="steps between evaluations on data.test, and before and after; 0: none"
    )
    eval_samples: Count = Field(4, description="completions a problem in these evaluations and in `vogue eval`")
    eval_temperature: NonNegative | None = Field(
        None, description="of sampling there; 0: the likeliest token each time; unset: rollout.temperature"
    )
    measure_every: int = Field(
        10, ge=0, description="steps between those that compute both branches of every group, to log; 0: none does"
    )
    log_completions: int = Field(8, ge=0, description="completions a step in completions.jsonl")
    wandb: str | None = Field(None, description="Weights & Biases project, if it is to be used")
    deepspeed: dict[str, Any] = Field({}, description="merged into vogue's settings (ZeRO-3; ZeRO-1 of one rank)")

    def measures(self, step: int) -> bool:
        """Whether all that the step keeps is computed on both branches, rather than what the loss needs."""
        return self.measure_every > 0 and step % self.measure_every == 0


class Config(Section):
    seed: int = Field(0, ge=0, description="of data order, perturbation, branch draws and sampling")
    method: Literal[*METHODS] = Field("vogue", description=f"preset, see docs/method.md: {', '.join(METHODS)}")
    model: ModelConfig
    data: DataConfig
    perturb: PerturbConfig = PerturbConfig()
    branch: BranchConfig = BranchConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _fill_eval_temperature(self) -> "Config":
        if self.trainer.eval_temperature is None:
            filled = self.trainer.model_copy(update={"eval_temperature": self.rollout.temperature})
            object.__setattr__(self, "trainer", filled)  # frozen from here on
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.rollout.prompts % self.trainer.updates:
            raise ValueError(
                f"trainer.updates={self.trainer.updates} does not divide rollout.prompts={self.rollout.prompts}"
            )
        n = self.rollout.n
        if self.advantage.kind == "passk" and self.advantage.k > n:
            raise ValueError(f"advantage.k={self.advantage.k} is more than rollout.n={n}")
        if self.method == "noisy_rollout" and not 0 < self.rollout.noisy < n:
            share = self.rollout.noisy_share
            raise ValueError(f"rollout.noisy_share={share} of rollout.n={n} is {self.rollout.noisy} of them, not some")
        if self.uncertainty.estimator == "sampled" and self.uncertainty.divergence != "symmetric":
            raise ValueError(
                f"uncertainty.divergence={self.uncertainty.divergence} could be negative with estimator=sampled"
            )
        if self.uncertainty.entropy == "drawn" and self.uncertainty.estimator == "k3" and self.branch.rollout == "raw":
            raise ValueError(
                "uncertainty.entropy=drawn with estimator=k3 and branch.rollout=raw: tokens of the raw branch say "
                "nothing without bias of the noisy one's entropy"
            )
        transition = self.guidance.sign_transition
        if transition and transition[0] > transition[1]:
            raise ValueError(f"guidance.sign_transition={list(transition)} ends before it begins")
        if self.trainer.eval_temperature == 0 and self.trainer.eval_samples > 1:
            raise ValueError(
                f"trainer.eval_samples={self.trainer.eval_samples} completions would be alike with "
                "trainer.eval_temperature=0, which takes the likeliest token each time: set it to 1"
            )
        if self.trainer.eval_every and not self.data.test:
            raise ValueError("trainer.eval_every is set, but data.test is not")
        return self


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Read a YAML file (optional), apply `key=value` overrides, check everything.

    Raises `ConfigError` with one line per wrong setting.
    """
    values = read_settings(path, overrides)
    return check(Config, _apply_method({"model": {}, "data": {}} | values), "vogue train")


def read_settings(path: str | Path | None, overrides: list[str]) -> dict[str, Any]:
    """A YAML file's settings (optional) under `key=value` overrides, unchecked; raises `ConfigError`."""
    try:
        parts = [OmegaConf.load(path)] if path else []
        merged = OmegaConf.merge(*parts, OmegaConf.from_dotlist(overrides))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path or 'overrides'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings, found a {type(values).__name__}")
    return values


def check(model: type[Section], values: dict[str, Any], command: str) -> Section:
    """`values` as a `model`; raises `ConfigError` with one line per wrong setting of `command`."""
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(item, model, command) for item in error.errors())) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON values."""
    sections = config.model_dump(mode="json")
    return {
        key: value
        for name, section in sections.items()
        for key, value in (
            {f"{name}.{field}": value for field, value in section.items()}
            if isinstance(section, dict)
            else {name: section}
        ).items()
    }


def _apply_method(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in what `method` fixes and where it starts; refuse a setting that contradicts it."""
    method = values.get("method", "vogue")
    for key, value in (STARTS.get(method, {}) | METHODS.get(method, {})).items():
        section, name = key.split(".")
        if not isinstance(values.setdefault(section, {}), dict):
            continue  # not a section, as the check of all settings will say
        given = values[section].setdefault(name, value)
        if given != value and key in METHODS[method]:
            raise ConfigError(f"method={method} fixes {key}={value}, but it is set to {given}")
    return values


def _sentence(item: dict[str, Any], model: type[Section], command: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{key} is not set: {_description(item['loc'], model)}"
    if item["type"] == "extra_forbidden":
        return f"unknown setting {key}; `{command} --help` lists them all"
    if item["type"] == "value_error":
        return item["msg"].removeprefix("Value error, ")
    return f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _description(location: tuple, model: Any) -> str:
    for name in location[:-1]:
        model = model.model_fields[name].annotation
    return model.model_fields[location[-1]].description
