"""What is trained, by AdamW with a schedule of its rates, and how DeepSpeed holds it.

lr(u) = lr factor(u)                                     of optimizer update u of U, counted from 0; W of them warm up
factor = (u + 1) / (W + 1)                               u < W
       = 1                                               constant
       = f + (1 − f) (1 − t)                             linear,  t = (u − W) / (U − W),  f = min_lr_ratio
       = f + (1 − f) (1 + cos π t) / 2                   cosine
"""

from math import cos, pi
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from omegaconf import OmegaConf

from vogue import distributed
from vogue.config import Config
from vogue.config.training_sections import OptimizerConfig
from vogue.model.policy import Policy
from vogue.settings import ConfigError

# Weights that ZeRO-3 updates at a time, of a rank's. It makes their gradients float32 first: 0.8 GB, where DeepSpeed's
# own 1e9 take 4 GB, in the moment at which a step has the least to spare.
SUB_GROUP = 200_000_000
ACCUMULATORS = {"float32": "fp32", "bfloat16": "bf16"}  # DeepSpeed's names


def deepspeed_settings(config: Config, ranks: int | None = None) -> dict:
    """What `deepspeed.initialize` takes: vogue's own settings with `trainer.deepspeed` merged into them."""
    merged: Any = OmegaConf.to_container(OmegaConf.merge(own_settings(config, ranks), config.trainer.deepspeed))
    return merged


def own_settings(config: Config, ranks: int | None = None) -> dict[str, Any]:
    """vogue's own settings of DeepSpeed, on so many ranks, unset on those of this run.

    ZeRO's stage is 3, and 1 for a single rank that asks for nothing else: there is nothing to partition then, and stage
    3's hooks take a quarter of a small model's step.
    """
    trainer = config.trainer
    given = trainer.deepspeed.get("zero_optimization")
    partitions = (ranks or distributed.rank_count()) > 1 or given is not None or trainer.offload_params
    zero: dict[str, Any] = {"stage": 3 if partitions else 1, "sub_group_size": SUB_GROUP}
    # Pinned memory lets a GPU copy while it computes; without a GPU there is none.
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero |= {"offload_optimizer": host} if trainer.offload_optimizer else {}
    zero |= {"offload_param": host} if trainer.offload_params else {}
    stage = given.get("stage", zero["stage"]) if isinstance(given, dict) else zero["stage"]
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
    }
    if dtype := trainer.grad_accum_dtype or ("float32" if stage != 0 else None):
        # Else each of an update's micro-batches would lose what is below 2^-8 of the sum so far.
        own["data_types"] = {"grad_accum_dtype": ACCUMULATORS[dtype]}
    return own


def start_deepspeed(policy: Policy, config: Config) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine of the policy: all but what is frozen is trained, by AdamW.

    Raises `ConfigError` where `trainer.offload_optimizer` needs what can't be compiled here.
    """
    settings, model = config.optimizer, config.model
    if model.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()  # transformers ignores it in a model that isn't training
    if model.freeze_vision:
        getattr(policy.model.model, policy.family.tower).requires_grad_(False)
    optimizer = _adamw(parameter_groups(policy, settings), config)
    updates = config.trainer.steps * config.trainer.updates
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(update, updates, settings))
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        lr_scheduler=schedule,  # pyright: ignore[reportArgumentType]
        config=deepspeed_settings(config),
    )
    if config.trainer.offload_optimizer and engine.zero_optimization_stage() < 3:
        _drop_gradients_of_skipped_updates(engine.optimizer)
    return engine


def _drop_gradients_of_skipped_updates(optimizer: Any) -> None:
    """Have ZeRO's stages 1 and 2 begin anew after an update that isn't finite, where the optimizer is offloaded.

    DeepSpeed leaves the sums of that update's gradients in place there, so that no later one would be finite.
    """
    reset = optimizer.reset_cpu_buffers  # after every update, done or skipped

    def reset_all() -> None:
        reset()
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    optimizer.reset_cpu_buffers = reset_all


def _adamw(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """AdamW where its state is: on the GPU, on the CPU, or on the CPU beside a GPU."""
    settings = config.optimizer
    given: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    given["weight_decay"] = settings.weight_decay
    if not config.trainer.offload_optimizer:
        # One kernel reads and writes each state once. Without it, torch holds a square root of every moment at a time.
        # On a CPU it would round otherwise than it has, and there is no memory to gain.
        return torch.optim.AdamW(groups, **given, fused=True if torch.cuda.is_available() else None)
    try:
        return DeepSpeedCPUAdam(groups, **given)  # which is AdamW unless told otherwise
    except RuntimeError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(
            f"trainer.offload_optimizer=true: DeepSpeed can't compile its CPUAdam, which takes g++ and ninja: {why}"
        ) from error


def parameter_groups(policy: Policy, settings: OptimizerConfig) -> list[dict[str, Any]]:
    """What is trained, as AdamW takes it: all at one rate, or in groups where a part of the model has its own.

    Raises `ConfigError` for a rate of a part of which nothing is trained.
    """
    rest = {name: x for name, x in policy.named_parameters() if x.requires_grad}
    if settings.vision_lr is None and settings.projector_lr is None:
        return [{"params": list(rest.values())}]
    family = policy.family
    projectors = tuple(f"model.model.{module}." for module in family.projectors)
    of_projector = {key for key in rest if key.startswith(projectors)}  # with Qwen it lies in the vision tower
    of_tower = {key for key in rest if key.startswith(f"model.model.{family.tower}.")} - of_projector
    groups = []
    parts = {"vision_lr": ("the vision tower", of_tower), "projector_lr": ("the projector", of_projector)}
    for name, (part, keys) in parts.items():
        rate = getattr(settings, name)
        if rate and not keys:
            raise ConfigError(f"optimizer.{name}={rate}: nothing of {part} is trained")
        if rate:
            groups.append({"params": [rest.pop(key) for key in list(rest) if key in keys], "lr": rate})
    # Those without a rate of their own first: theirs is the rate that is logged.
    return [group for group in ({"params": list(rest.values())}, *groups) if group["params"]]


def lr_factor(update: int, updates: int, settings: OptimizerConfig) -> float:
    """What the learning rate of an optimizer update, counted from 0, is multiplied by; see above."""
    warmup = settings.warmup_steps or round(settings.warmup_ratio * updates)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if settings.lr_scheduler_type == "constant":
        return 1.0
    passed = min(1.0, (update - warmup) / max(updates - warmup, 1))
    falls = 1 - passed if settings.lr_scheduler_type == "linear" else (1 + cos(pi * passed)) / 2
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * falls
