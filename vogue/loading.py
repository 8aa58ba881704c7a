"""The policy's model from its checkpoint, where ZeRO-3 trains it: partitioned from the start.

transformers then makes every layer under `deepspeed.zero.Init`, so that a rank keeps its share of it alone, and reads
the checkpoint on rank 0, a module at a time. Nobody ever holds the whole model: not the host's memory once for every
rank, and not a GPU's, which is no larger than training needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import OmegaConf
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vogue.config import Config


def deepspeed_settings(config: Config) -> dict:
    """What `deepspeed.initialize` takes: vogue's own settings with `trainer.deepspeed` merged into them."""
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
    }
    return OmegaConf.to_container(OmegaConf.merge(own, config.trainer.deepspeed))


def load_model(config: Config) -> PreTrainedModel:
    """The model of `config.model`, equal on all ranks, which call this together once they have joined the run.

    Its parameters are partitioned over the ranks where DeepSpeed's stage is 3, and whole otherwise; its buffers are
    whole. Raises RuntimeError (on rank 0, if partitioned) where a weight's shape isn't the model's.
    """
    model = config.model
    with _partitioned(config):
        return AutoModelForImageTextToText.from_pretrained(
            model.path,
            dtype=model.dtype,
            attn_implementation="sdpa" if model.attention in ("auto", "flex_attention") else model.attention,
        )


@contextmanager
def _partitioned(config: Config) -> Iterator[HfDeepSpeedConfig]:
    """Models that transformers makes within are partitioned if the stage is 3; a rollout engine's, later, is whole."""
    settings = deepspeed_settings(config) | {
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        # Of buffers: zero.Init rounds them to the parameters' type, rotary frequencies too. In float32, they are
        # computed again when the weights are there.
        "data_types": {"keep_in_fp32_modules": ["*"]},
    }
    alive = HfDeepSpeedConfig(settings)  # transformers itself keeps a weak reference
    try:
        yield alive
    finally:
        unset_hf_deepspeed_config()
