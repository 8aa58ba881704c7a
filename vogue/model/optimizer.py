"""What is trained, by AdamW with a linear warm-up, and how DeepSpeed holds it.

lr(u) = lr min(1, (u + 1) / (warmup_steps + 1))          of optimizer update u, counted from 0
"""

from typing import Any

import deepspeed
import torch
from omegaconf import OmegaConf

from vogue import distributed
from vogue.config import Config
from vogue.model.policy import Policy


def deepspeed_settings(config: Config, ranks: int | None = None) -> dict:
    """What `deepspeed.initialize` takes: vogue's own settings with `trainer.deepspeed` merged into them."""
    merged: Any = OmegaConf.to_container(OmegaConf.merge(own_settings(config, ranks), config.trainer.deepspeed))
    return merged


def own_settings(config: Config, ranks: int | None = None) -> dict[str, Any]:
    """vogue's own settings of DeepSpeed, on so many ranks, unset on those of this run.

    ZeRO's stage is 3, and 1 for a single rank that asks for nothing else: there is nothing to partition then, and stage
    3's hooks take a quarter of a small model's step.
    """
    partitions = (ranks or distributed.rank_count()) > 1 or "zero_optimization" in config.trainer.deepspeed
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": 3 if partitions else 1},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
    }


def start_deepspeed(policy: Policy, config: Config) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine of the policy: all but what is frozen is trained, by AdamW with a linear warm-up."""
    settings, model = config.optimizer, config.model
    if model.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()  # transformers ignores it in a model that isn't training
    if model.freeze_vision:
        getattr(policy.model.model, policy.family.tower).requires_grad_(False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, settings.betas, weight_decay=settings.weight_decay)
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
