"""What is trained, by AdamW with a linear warm-up, and how DeepSpeed holds it.

lr(u) = lr min(1, (u + 1) / (warmup_steps + 1))          of optimizer update u, counted from 0
"""

from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from omegaconf import OmegaConf

from vogue import distributed
from vogue.config import Config
from vogue.model.policy import Policy
from vogue.settings import ConfigError

# Weights that ZeRO-3 updates at a time, of a rank's. It makes their gradients float32 first: 0.8 GB, where DeepSpeed's
# own 1e9 take 4 GB, in the moment at which a step has the least to spare.
SUB_GROUP = 200_000_000
ACCUMULATORS = {"float32": "fp32", "bfloat16": "bf16"}  # DeepSpeed's names


def deepspeed_settings(config: Config) -> dict:
    """What `deepspeed.initialize` takes: vogue's own settings with `trainer.deepspeed` merged into them."""
    merged: Any = OmegaConf.to_container(OmegaConf.merge(own_settings(config), config.trainer.deepspeed))
    return merged


def own_settings(config: Config) -> dict[str, Any]:
    """vogue's own settings of DeepSpeed.

    ZeRO's stage is 3, and 1 for a single rank that asks for nothing else: there is nothing to partition then, and stage
    3's hooks take a quarter of a small model's step.
    """
    trainer = config.trainer
    given = trainer.deepspeed.get("zero_optimization")
    partitions = distributed.rank_count() > 1 or given is not None or trainer.offload_params
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
    """DeepSpeed's engine of the policy: all but what is frozen is trained, by AdamW with a linear warm-up.

    Raises `ConfigError` where `trainer.offload_optimizer` needs what can't be compiled here.
    """
    settings, model = config.optimizer, config.model
    if model.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()  # transformers ignores it in a model that isn't training
    if model.freeze_vision:
        getattr(policy.model.model, policy.family.tower).requires_grad_(False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = _adamw(trained, config)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min(1.0, (update + 1) / (settings.warmup_steps + 1))
    )
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        lr_scheduler=warmup,  # pyright: ignore[reportArgumentType]
        config=deepspeed_settings(config),
    )
    return engine


def _adamw(trained: list[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW where its state is: on the GPU, on the CPU, or on the CPU beside a GPU."""
    settings = config.optimizer
    given: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if not config.trainer.offload_optimizer:
        # One kernel reads and writes each state once. Without it, torch holds a square root of every moment at a time.
        # On a CPU it would round otherwise than it has, and there is no memory to gain.
        return torch.optim.AdamW(trained, **given, fused=True if torch.cuda.is_available() else None)
    try:
        return DeepSpeedCPUAdam(trained, **given)  # which is AdamW unless told otherwise
    except RuntimeError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(
            f"trainer.offload_optimizer=true: DeepSpeed can't compile its CPUAdam, which takes g++ and ninja: {why}"
        ) from error
