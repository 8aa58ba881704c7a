"""The policy's model from its checkpoint.

Where ZeRO-3 trains, no rank ever holds the whole model, neither in its host's memory nor on its GPU. transformers maps
the checkpoint's files and reads a weight when it is first used; partitioning uses them one at a time, and a rank keeps
its share of each. `deepspeed.initialize` would move the whole model to every GPU first.
"""

from functools import wraps

import deepspeed
import torch
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap
from deepspeed.runtime.zero.utils import is_zero_param
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vogue.config import Config
from vogue.model.optimizer import deepspeed_settings


def load_model(config: Config, device: torch.device) -> PreTrainedModel:
    """The model of `config.model`; all ranks call this together, once they have joined the run.

    Where DeepSpeed's stage is 3, parameters are partitioned over the ranks and buffers are on `device`; else all is
    whole and on the CPU. A checkpoint in another dtype than `model.dtype` is converted whole, on every rank, first.
    """
    model = config.model
    loaded = AutoModelForImageTextToText.from_pretrained(
        model.path,
        dtype=model.dtype,
        attn_implementation="sdpa" if model.attention in ("auto", "flex_attention") else model.attention,
    )
    settings = deepspeed_settings(config)
    if settings["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=loaded, config_dict_or_path=settings)
        _linear_of_partitioned_weights()
        for buffer in loaded.buffers():
            buffer.data = buffer.data.to(device)
    return loaded


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
