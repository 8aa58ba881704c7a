"""A run's configuration: all its sections together, and how it is read and written.

A run is described by one YAML file plus `key=value` overrides, merged by OmegaConf and checked here: an unknown
key, a wrong type or a value out of range ends the program with one sentence that names it. `method` is a preset:
it fixes the settings that make it what it is (`vogue.config.presets`), and contradicting it is an error rather than
another method.
"""

# pydantic's defaults stand first in Field, where pyright doesn't look for them; a Literal may be of a table's keys.
# pyright: reportCallIssue=false, reportInvalidTypeForm=false

from math import ceil
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from vogue.config.method_sections import (
    AdvantageConfig,
    BranchConfig,
    CriticConfig,
    CuriosityConfig,
    GuidanceConfig,
    KlConfig,
    LossConfig,
    PerturbConfig,
    SamplingConfig,
    UncertaintyConfig,
)
from vogue.config.presets import METHODS, with_method
from vogue.config.sections import ALL_TOKENS, DataConfig, ModelConfig, ReplayConfig, RewardConfig, RolloutConfig
from vogue.config.training_sections import LoraConfig, OptimizerConfig, TrainerConfig
from vogue.config.view_sections import CreditConfig, PerceptionConfig, RobustConfig
from vogue.estimates import powers_of_two
from vogue.method.pairs import pair_count
from vogue.settings import ConfigError, Section, check, read_settings

VLLM_HOTTEST = 2.0  # temperature


class Config(Section):
    seed: int = Field(
        0, ge=0, description="seed of all that is random: order of data, perturbations, draws and sampling"
    )
    method: Literal[*METHODS] = Field(
        "vogue", description=f"preset of other settings, see docs/methods.md: {', '.join(METHODS)}"
    )
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    perturb: PerturbConfig = PerturbConfig()
    branch: BranchConfig = BranchConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    critic: CriticConfig = CriticConfig()
    reward: RewardConfig = RewardConfig()
    curiosity: CuriosityConfig = CuriosityConfig()
    rollout: RolloutConfig = RolloutConfig()
    replay: ReplayConfig = ReplayConfig()
    loss: LossConfig = LossConfig()
    kl: KlConfig = KlConfig()
    perception: PerceptionConfig = PerceptionConfig()
    robust: RobustConfig = RobustConfig()
    credit: CreditConfig = CreditConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _evaluations_sample_as_rollouts(self) -> "Config":
        asked = self.trainer.evaluation_sampling.items()
        unset = {f"eval_{name}": getattr(self.rollout, name) for name, value in asked if value is None}
        if unset:
            object.__setattr__(self, "trainer", self.trainer.model_copy(update=unset))  # frozen from here on
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
        if self.advantage.kind != "group" and self.advantage.scale != "group":
            scale, kind = self.advantage.scale, self.advantage.kind
            raise ValueError(f"advantage.scale={scale}: only advantage.kind=group is scaled, not {kind}")
        if self.method == "noisy_rollout" and not 0 < self.rollout.noisy_count < n:
            share = self.rollout.noisy_share
            raise ValueError(
                f"rollout.noisy_share={share} of rollout.n={n} is {self.rollout.noisy_count} of them, not some"
            )
        if self.uncertainty.estimator == "sampled" and self.uncertainty.divergence != "symmetric":
            raise ValueError(
                f"uncertainty.divergence={self.uncertainty.divergence} could be negative with estimator=sampled"
            )
        if self.uncertainty.entropy == "drawn" and self.uncertainty.estimator == "k3" and self.branch.rollout == "raw":
            raise ValueError(
                "uncertainty.entropy=drawn with estimator=k3 and branch.rollout=raw: tokens of the raw branch say "
                "nothing without bias of the noisy one's entropy"
            )
        if self.uncertainty.estimator == "k3" and self.rollout.truncation:
            raise ValueError(
                f"uncertainty.estimator=k3 is without bias under tokens of the whole distribution, but "
                f"{' and '.join(self.rollout.truncation)} samples from a part of it: use estimator=exact"
            )
        transition = self.guidance.sign_transition
        if transition and transition[0] > transition[1]:
            raise ValueError(f"guidance.sign_transition={list(transition)} ends before it begins")
        if self.trainer.eval_temperature == 0 and self.trainer.eval_samples > 1:
            raise ValueError(
                f"trainer.eval_samples={self.trainer.eval_samples} completions would be alike with "
                "trainer.eval_temperature=0, which takes the likeliest token each time: set it to 1"
            )
        if (self.compares or self.robust.on) and self.branch.rollout == "drawn" and self.branch.probability != 0:
            name = f"robust.kl_coef={self.robust.kl_coef}"
            name = f"perception.kl_coef={self.perception.kl_coef}" if self.perception.on else name
            name = f"credit.kind={self.credit.kind}" if self.credit.on and not self.perception.on else name
            raise ValueError(f"{name}: with branch.rollout=drawn completions are trained on T(x) itself")
        self._check_passk()
        if self.kl.in_reward and self.advantage.pairs < 1:
            raise ValueError("kl.placement=reward: advantage.pairs chooses completions before the KL is known")
        self._check_critic()
        for name, value in (
            ("rollout.temperature", self.rollout.temperature),
            ("trainer.eval_temperature", self.trainer.eval_temperature),
        ):
            if self.rollout.engine != "hf" and value is not None and value > VLLM_HOTTEST:
                raise ValueError(f"{name}={value}: vLLM samples at temperatures up to {VLLM_HOTTEST:g}")
        for name, all_tokens in ALL_TOKENS.items():
            value = getattr(self.trainer, f"eval_{name}")
            if self.trainer.eval_temperature == 0 and value not in (all_tokens, getattr(self.rollout, name)):
                raise ValueError(
                    f"trainer.eval_{name}={value}: nothing reads it with trainer.eval_temperature=0, which takes the "
                    "likeliest token each time: set it to null"
                )
        if self.trainer.grad_accum_dtype == "bfloat16" and self.model.dtype == "float32":
            raise ValueError(
                "trainer.grad_accum_dtype=bfloat16 would round the gradients of model.dtype=float32: leave it unset"
            )
        if self.trainer.eval_every and not self.data.test:
            raise ValueError("trainer.eval_every is set, but data.test is not")
        self._check_best()
        return self

    @model_validator(mode="after")
    def _ahead_of_what_it_reads(self) -> "Config":
        if not self.rollout.ahead:
            return self
        told, loss = f"rollout.ahead={self.rollout.ahead}", self.loss
        if self.rollout.engine != "server":
            raise ValueError(
                f"{told}: rollout.engine={self.rollout.engine} generates where the policy trains, and not at the same "
                "time: use rollout.engine=server"
            )
        if loss.importance_cap is None and loss.importance_floor is None:
            raise ValueError(
                f"{told}: completions are of an older policy than the one that trains on them, which the loss must "
                "weigh: set loss.importance_cap=2"
            )
        if self.rollout.rounds > 1:
            raise ValueError(f"{told}: how many of rollout.rounds={self.rollout.rounds} are needed is known too late")
        if self.sampling.kind != "uniform":
            raise ValueError(
                f"{told}: sampling.kind={self.sampling.kind} chooses prompts by what the step before finds"
            )
        if self.replay.size:
            raise ValueError(f"{told}: replay.size={self.replay.size} replays what the step before generated")
        return self

    @property
    def compares(self) -> bool:
        """Whether completions that are trained on x are compared with T(x), whatever was drawn.

        Beside degraded views all are, where VOGUE's bonuses read some: rows that are compared are so with the same
        views, so that ranks have as many forwards.
        """
        guided = self.branch.probability != 0 and self.guidance.alpha_per + self.guidance.alpha_out > 0
        return self.perception.on or self.credit.on or (self.robust.on and guided)

    @property
    def moving_views(self) -> int:
        """Views beside the trained one that are in a forward with gradient, which holds as many activations."""
        return len(self.robust.views) + (self.perception.gradient == "both")

    def _check_critic(self) -> None:
        """Raise ValueError where value heads are set and nothing reads them, or advantages of completions are read."""
        valued, default = self.advantage.valued, CriticConfig()
        for name in type(default).model_fields:
            value = getattr(self.critic, name)
            if not valued and value != getattr(default, name):
                raise ValueError(f"critic.{name}={value}: advantage.kind={self.advantage.kind} has no value heads")
        read = {"advantage.pairs": (self.advantage.pairs, 1.0), "advantage.shape": (self.advantage.shape, 0.0)}
        read["trainer.shuffle"] = self.trainer.shuffle, 0
        for name, (value, off) in read.items():
            if valued and value != off:
                raise ValueError(f"{name}={value} goes by a completion's advantage, which advantage.kind=gae hasn't")

    def _check_best(self) -> None:
        """Raise ValueError where the run's evaluations don't have the metric of `trainer.save_best`."""
        best, n = self.trainer.save_best, self.trainer.eval_samples
        if best and not self.trainer.eval_every:
            raise ValueError(f"trainer.save_best={best}: without trainer.eval_every nothing is evaluated")
        names = [f"pass@{k}" for k in powers_of_two(n)]
        if best and best not in names:
            raise ValueError(
                f"trainer.save_best={best}: evaluations with trainer.eval_samples={n} have {', '.join(names)}"
            )

    @model_validator(mode="after")
    def _methods_have_their_parts(self) -> "Config":
        if self.method == "cde" and not self.curiosity.weight:
            raise ValueError("curiosity.weight=0: method=cde without its bonus is method=grpo")
        if self.method == "mmr1" and not self.sampling.scored(self.rollout.prompts):
            raise ValueError(
                f"sampling.share={self.sampling.share} of rollout.prompts={self.rollout.prompts} is none: method=mmr1 "
                "without prompts drawn by their scores is method=grpo"
            )
        if self.method in ("roma", "dvrp") and not self.robust.on:
            raise ValueError(f"robust.kl_coef=0: method={self.method} without its degraded views is another method")
        pairs, n = self.advantage.pairs, self.rollout.n
        if self.method == "shuffle_r1" and pairs == 1 and not self.trainer.shuffle:
            raise ValueError("advantage.pairs=1 and trainer.shuffle=0: method=shuffle_r1 without both is method=grpo")
        if (pairs < 1 or self.trainer.shuffle) and n % 2:
            raise ValueError(
                f"rollout.n={n} completions can't be paired, as advantage.pairs={pairs} and "
                f"trainer.shuffle={self.trainer.shuffle} ask: their number must be even"
            )
        if pair_count(n, pairs) == 0:
            raise ValueError(f"advantage.pairs={pairs} of rollout.n={n} completions is no pair")
        if self.curiosity.weight and "curiosity" in self.reward.functions:
            raise ValueError("reward.functions.curiosity: this is the name of the bonus of curiosity.weight")
        return self

    def _check_passk(self) -> None:
        if self.advantage.kind != "passk":
            return
        reads = {
            "kl.placement=reward": self.kl.in_reward,
            f"curiosity.weight={self.curiosity.weight}": self.curiosity.weight,
            f"reward.wrong={self.reward.wrong}": self.reward.wrong,
            f"reward.overlong_buffer={self.reward.overlong_buffer}": self.reward.overlong_buffer,
        }
        for told, reward in reads.items():
            if reward:
                raise ValueError(f"{told}: advantage.kind=passk reads right and wrong alone, not the reward")

    @model_validator(mode="after")
    def _replay_fits(self) -> "Config":
        if self.method == "avatar" and not self.replay.size and not self.advantage.shape:
            raise ValueError("replay.size=0 and advantage.shape=0: method=avatar without both is method=grpo")
        refused = {
            "advantage.kind=passk": (self.advantage.kind == "passk", "it reads right and wrong of one group alone"),
            "advantage.pairs": (self.advantage.pairs < 1, "a replayed completion has no place in a pair"),
            "trainer.shuffle": (self.trainer.shuffle > 0, "a replayed completion has no place in a pair"),
            "advantage.kind=gae": (self.advantage.valued, "value heads learn from today's policy's completions"),
            "kl.placement=reward": (self.kl.in_reward, "stored rewards are without today's KL"),
            "rollout.latent_steps": (self.rollout.latent_steps > 0, "the buffer keeps tokens, and no states"),
            "replay.share": (
                self.sampling.kind == "variance" and self.replay.share > 0,
                "with sampling.kind=variance both would draw the step's prompts: set it to 0",
            ),
        }
        for name, (wrong, why) in refused.items():
            if self.replay.size and wrong:
                raise ValueError(f"replay.size={self.replay.size} with {name}: {why}")
        return self

    def uses_steps(self) -> list[str]:
        """The settings whose schedule ends with `trainer.steps`, so that another number of steps is another run."""
        schedules = {
            "branch.probability's schedule": self.branch.probability is None,
            "perturb.anneal_at": self.perturb.anneal_at is not None and self.perturb.sigma > 0,
            "guidance.sign_transition": self.guidance.sign_transition is not None and self.guidance.alpha_per > 0,
            "optimizer.lr_scheduler_type": self.optimizer.lr_scheduler_type != "constant",
            "optimizer.warmup_ratio": self.optimizer.warmup_ratio > 0,
            "curiosity.schedule": self.curiosity.scheduled,
            "rollout.ahead": self.rollout.ahead > 0,  # the last step begins no rollout, as a longer run's does
        }
        return [name for name, used in schedules.items() if used]


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Read a YAML file (optional), apply `key=value` overrides, check everything.

    Raises `ConfigError` with one line per wrong setting.
    """
    values = read_settings(path, overrides)
    return check(Config, with_method({"model": {}, "data": {}} | values), "vogue train")


def with_steps(config: Config, samples: int) -> Config:
    """The settings with the number of steps that `trainer.epochs` of so many samples are; unset, as they are.

    A step has the places of rollout.prompts x rollout.rounds samples in their order, less those that are drawn by
    scores or from the replay buffer. Raises `ConfigError` where `trainer.steps` says another number.
    """
    asked, prompts = config.trainer, config.rollout.prompts
    if asked.epochs is None:
        return config
    a_step = (prompts - config.sampling.scored(prompts) - config.replay.drawn(prompts)) * config.rollout.rounds
    if not a_step:
        raise ConfigError(f"trainer.epochs={asked.epochs:g}: no prompt of a step is taken in order: set trainer.steps")
    steps = ceil(round(asked.epochs * samples / a_step, 9))  # 0.1 epochs of 30 samples by 3 are one step
    if asked.steps not in (0, steps):
        raise ConfigError(
            f"trainer.steps={asked.steps} and trainer.epochs={asked.epochs:g} say how long the run is: set one of "
            f"them, the other to null. {asked.epochs:g} epochs of {samples} samples, {a_step} a step, are {steps} steps"
        )
    return config.model_copy(update={"trainer": asked.model_copy(update={"steps": steps})})


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back."""
    path.write_text(dumped(config))


def dumped(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


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
