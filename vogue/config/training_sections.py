"""The settings of what is trained, by which steps, and of the run: adapters, optimizer and trainer."""

# pydantic's defaults stand first in Field, where pyright doesn't look for them.
# pyright: reportCallIssue=false

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vogue.config.sections import ALL_TOKENS
from vogue.settings import Count, NonNegative, Positive, PositiveShare, Section, Share


class LoraConfig(Section):
    """Adapters of low rank that are trained in the model's place (LoRA), W + (alpha / rank) B A."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0: none, the model itself is trained")
    alpha: Positive = Field(32.0, description="adapters are scaled by alpha / rank")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="last names of the layers that get an adapter, [q_proj, v_proj] say; all-linear: every linear one "
        "but the head",
    )
    vision: bool = Field(False, description="adapt the vision tower too, which is frozen otherwise")
    adapter: Path | None = Field(
        None,
        description="folder of an adapter in PEFT's format, a checkpoint's for one, to go on training from, or to "
        "evaluate; its rank, alpha and layers count then",
    )
    save_merged: bool = Field(
        False, description="checkpoints have the whole model too, with the adapter merged into it"
    )

    @model_validator(mode="after")
    def _adapters_are_asked_for(self) -> "LoraConfig":
        if self.target_modules == []:
            raise ValueError("lora.target_modules=[]: no layer would have an adapter")
        for name, field in type(self).model_fields.items():
            if not self.on and getattr(self, name) != field.default:
                raise ValueError(f"lora.{name}={getattr(self, name)}: without lora.rank the model itself is trained")
        return self

    @property
    def on(self) -> bool:
        """Whether there are adapters."""
        return self.rank > 0 or self.adapter is not None


class OptimizerConfig(Section):
    """AdamW."""

    lr: Positive = Field(1e-6, description="learning rate of AdamW")
    weight_decay: NonNegative = Field(0.01, description="AdamW's decoupled weight decay")
    betas: tuple[Share, Share] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the mean and the mean square of gradients"
    )
    eps: Positive = Field(1e-8, description="AdamW's epsilon, added to the root of the mean square of gradients")
    vision_lr: Positive | None = Field(
        None, description="learning rate of the vision tower, without its projector; unset: optimizer.lr"
    )
    projector_lr: Positive | None = Field(
        None,
        description="learning rate of the projector between vision tower and text model; unset: optimizer.lr",
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="learning rate after the warm-up: constant, or falling to optimizer.min_lr_ratio of itself at the "
        "end of trainer.steps, linearly or along half a cosine",
    )
    min_lr_ratio: Share = Field(
        0.0, description="share of the learning rate that a schedule that falls ends at, with linear or cosine"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer updates in which the learning rate rises linearly")
    warmup_ratio: Share = Field(
        0.0, description="the same as a share of all optimizer updates, in place of optimizer.warmup_steps"
    )
    max_grad_norm: Positive = Field(1.0, description="norm that gradients are clipped to")

    @model_validator(mode="after")
    def _says_one_schedule(self) -> "OptimizerConfig":
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} and optimizer.warmup_ratio={self.warmup_ratio} say the "
                "same thing twice: set one of them"
            )
        if self.min_lr_ratio and self.lr_scheduler_type == "constant":
            raise ValueError(
                f"optimizer.min_lr_ratio={self.min_lr_ratio}: the rate of lr_scheduler_type=constant doesn't fall"
            )
        return self


class TrainerConfig(Section):
    """The run: its length, batches, checkpoints, evaluations and logs."""

    steps: int = Field(
        200,
        ge=0,
        description="steps of the run, each a rollout and its updates; s_total of the draws' schedule. 0: those of "
        "trainer.epochs",
    )
    epochs: Positive | None = Field(
        None,
        description="the same as passes over data.train, in place of trainer.steps: the fewest steps in whose order of "
        "prompts every sample comes so often; unset: trainer.steps",
    )
    updates: Count = Field(
        1, description="optimizer updates a step, each on its part of the step's prompts; divides rollout.prompts"
    )
    shuffle: int = Field(
        0,
        ge=0,
        description="sub-batches in which a step's pairs of completions are drawn by the size of their advantages, a "
        "pair maybe in several, before they are shared by trainer.updates (Shuffle-R1); 0: every prompt once",
    )
    output_dir: Path = Field(
        Path("runs/vogue"), description="folder of the run: metrics, completions, plots and checkpoints"
    )
    micro_batch_tokens: Count = Field(
        8192,
        description="most tokens of a forward, of prompts with their images and completions together; a longer group "
        "is cut, but a prompt with one completion isn't",
    )
    shared_prefix: bool = Field(True, description="compute a prompt once for all completions of its group")
    save_every: int = Field(50, ge=0, description="steps between checkpoints; 0: only one at the end")
    save_minutes: Positive | None = Field(
        None, description="a checkpoint is written after a step, too, if none was for so many minutes; unset: not so"
    )
    keep: Count = Field(2, description="checkpoints to keep, the newest ones")
    save_best: str | None = Field(
        None,
        description="metric of evaluations, pass@1 for one, whose best checkpoint is written and kept beside the "
        "newest ones, as checkpoints/best; unset: none is",
    )
    save_model_only: bool = Field(
        False,
        description="checkpoints have the model or adapter alone, without the optimizer: no run can go on from them",
    )
    save_command: str | None = Field(
        None,
        min_length=1,
        description="shell command after each checkpoint, whose folder is $VOGUE_CHECKPOINT; the run waits for its "
        "end, half of trainer.timeout at most",
    )
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="repository of the Hugging Face hub, owner/name, that the last model or adapter goes to at the "
        "run's end, or the best with trainer.save_best; a new one is private",
    )
    eval_every: int = Field(
        0,
        ge=0,
        description="steps between evaluations on data.test, with one before the first and after the last step; 0: "
        "none",
    )
    eval_samples: Count = Field(
        4, description="completions a problem in evaluations, during training and in `vogue eval`"
    )
    eval_temperature: NonNegative | None = Field(
        None,
        description="sampling temperature of evaluations; 0: the likeliest token each time; unset: rollout.temperature",
    )
    eval_top_p: PositiveShare | None = Field(None, description="top_p of evaluations; unset: rollout.top_p")
    eval_top_k: int | None = Field(None, ge=0, description="top_k of evaluations; unset: rollout.top_k")
    eval_min_p: Share | None = Field(None, description="min_p of evaluations; unset: rollout.min_p")
    measure_every: int = Field(
        10,
        ge=0,
        description="every so many steps both branches of every group are computed, to log measured/...; 0: never",
    )
    log_completions: int = Field(8, ge=0, description="completions a step that are written to completions.jsonl")
    log_rotation_mb: Positive | None = Field(
        None,
        description="MB beyond which metrics.jsonl, evaluations.jsonl or completions.jsonl is put aside as "
        "metrics.1.jsonl, metrics.2.jsonl and so on, and a new file begun; all are read as one; unset: never",
    )
    timeout: Positive = Field(
        1800.0,
        description="seconds that a rank waits for the others before the run ends; what each was doing is then in "
        "stacks_rank*.txt of trainer.output_dir. A rollout by servers may take half of it, all of it with one rank",
    )
    grad_accum_dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="dtype in which the gradients of an update's micro-batches are summed; unset: float32, but for "
        "ZeRO's stage 0, where DeepSpeed takes model.dtype",
    )
    offload_optimizer: bool = Field(
        False,
        description="keep AdamW's state and the float32 weights in the host's memory, 12 bytes a weight, and update "
        "them there, by DeepSpeed's CPUAdam, which is compiled at its first use",
    )
    offload_params: bool = Field(
        False, description="keep the partitioned weights in the host's memory, too, until a layer needs them (ZeRO-3)"
    )
    report_to: list[Literal["wandb", "swanlab", "mlflow", "trackio", "comet_ml", "clearml"]] = Field(
        [], description="trackers that the run's metrics, evaluations and completions go to, beside its folder"
    )
    project: str = Field("vogue", description="project, or experiment in MLflow, of trainer.report_to")
    run_name: str | None = Field(
        None, description="name of the run in trainer.report_to; unset: that of trainer.output_dir's last folder"
    )
    tracker_args: dict[str, dict[str, Any]] = Field(
        {},
        description="further arguments of each tracker, as its own start takes them: {wandb: {entity: me, tags: [a]}}",
    )
    deepspeed: dict[str, Any] = Field(
        {}, description="DeepSpeed settings, merged into vogue's own (ZeRO-3, or ZeRO-1 for a single rank)"
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_are_steps(cls, values: Any) -> Any:
        """With `epochs` alone the number of steps is not known before the data is."""
        if not isinstance(values, dict) or values.get("epochs") is None or values.get("steps") is not None:
            return values
        return values | {"steps": 0}

    @model_validator(mode="after")
    def _is_of_some_length(self) -> "TrainerConfig":
        if self.steps == 0 and self.epochs is None:
            raise ValueError("trainer.steps=0: input should be greater than or equal to 1")  # as of other numbers
        return self

    @property
    def evaluation_sampling(self) -> dict[str, Any]:
        """What the `eval_` settings say of sampling, by its name; `Config` fills them in where they are unset."""
        return {name: getattr(self, f"eval_{name}") for name in ("temperature", *ALL_TOKENS)}

    def measures(self, step: int) -> bool:
        """Whether all that the step keeps is computed on both branches, rather than what the loss needs."""
        return self.measure_every > 0 and step % self.measure_every == 0
