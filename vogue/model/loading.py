"""The policy's model from its checkpoint.

Where ZeRO-3 trains, no rank ever holds the whole model, neither in its host's memory nor on its GPU. transformers maps
the checkpoint's files and reads a weight when it is first used; partitioning uses them one at a time, and a rank keeps
its share of each. `deepspeed.initialize` would move the whole model to every GPU first.

Every weight comes from the checkpoint and is finite, or nothing is trained: transformers would draw what is missing at
random and go on.
"""

from functools import wraps
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap
from deepspeed.runtime.zero.utils import is_zero_param
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vogue import distributed
from vogue.config import Config
from vogue.model.files import TIED_BUT_DIFFERENT, is_finite, listed, misfit, write_as_published
from vogue.model.liger import apply_liger
from vogue.model.lora import add_adapters
from vogue.model.optimizer import deepspeed_settings
from vogue.settings import ConfigError


def load_model(config: Config, device: torch.device) -> PreTrainedModel:
    """The model of `config.model`, with the adapters of `config.lora`; all ranks call this together.

    Where DeepSpeed's stage is 3, parameters are partitioned over the ranks and buffers are on `device`; else all is
    whole and on the CPU. A checkpoint in another dtype than `model.dtype` is converted whole, on every rank, first.
    Raises `ConfigError`, on all ranks, where a weight is missing, left over, of another shape, NaN or infinite.
    """
    model = config.model
    found: Any = AutoModelForImageTextToText.from_pretrained(
        model.path,
        dtype=model.dtype,
        attn_implementation="sdpa" if model.attention in ("auto", "flex_attention") else model.attention,
        ignore_mismatched_sizes=True,  # which is an error of several lines otherwise
        output_loading_info=True,
    )
    loaded, info = found
    is_tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    told = misfit(info, loaded.config) or (TIED_BUT_DIFFERENT if loaded.config.tie_word_embeddings > is_tied else "")
    if told:
        raise ConfigError(f"model.path={model.path}: {told}")
    write_as_published(loaded)
    settings = deepspeed_settings(config)
    if settings["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=loaded, config_dict_or_path=settings)
        _linear_of_partitioned_weights()
        for buffer in loaded.buffers():
            buffer.data = buffer.data.to(device)
    wrong = {name for name, weight in loaded.named_parameters() if not is_finite(_share(weight))}
    if found := set().union(*distributed.gather(wrong)):
        raise ConfigError(f"model.path={model.path}: NaN or infinity in {listed(found)}")
    if model.liger:
        apply_liger(loaded)
    if config.lora.on:
        add_adapters(loaded, config.lora, config.seed)
    return loaded


def _share(weight: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a weight: all of it, or its part, without the padding that makes all parts as long."""
    if not is_zero_param(weight):
        return weight.detach()
    part: Any = weight.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    if part.status is not PartitionedParamStatus.AVAILABLE:  # on a disk already
        return torch.empty(0)
    before = part.ds_numel * dist.get_rank(weight.ds_process_group)  # pyright: ignore[reportAttributeAccessIssue]
    return part.data.flatten()[: max(0, weight.ds_numel - before)]  # pyright: ignore[reportAttributeAccessIssue]


def _linear_of_partitioned_weights() -> None:
    """Keep DeepSpeed's `linear`, which it gives the whole process, to partitioned weights.

    It holds no gathered weight until the backward pass, at some host time a call and without fusing the bias: the
    rollout engine would pay that for nothing. A forward without gradient takes its arithmetic alone, so that both
    branches round alike.
    """
    plain = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]

    @wraps(plain)
    def linear(input, weight, bias=None):
        if not is_zero_param(weight):
            return plain(input, weight, bias)
        function = zero3_linear_wrap if torch.is_grad_enabled() else LinearFunctionForZeroStage3.forward
        return function(input, weight, bias)

    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = linear
