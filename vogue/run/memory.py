"""What a run needs of memory and disk, by arithmetic from its model's configuration, before anything is loaded.

    a token's keys and values    2 layers kv_heads head_dim bytes         of the layers with full attention
    a checkpoint                 weights bytes + 12 trained weights       hf; float32 master weights and two moments
    with save_model_only         weights bytes                            hf, or the adapter, alone
    the same with LoRA           adapters bytes + 12 adapters             plus weights bytes with lora.save_merged

`bytes` is what a weight of `model.dtype` takes: 2 or 4.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vogue.config import Config
from vogue.distributed import rank_count
from vogue.families import Family, family_of
from vogue.model.lora import adapter_parameters, whole_parameters
from vogue.run.folder import FolderError
from vogue.settings import ConfigError

GB = 1e9


def weight_count(model: torch.nn.Module) -> int:
    """Weights of a model without its adapters, tied ones once."""
    return sum(whole.parameter.numel() for whole in whole_parameters(model))


def adapter_count(model: torch.nn.Module) -> int:
    """Weights of a model's adapters."""
    return sum(parameter.numel() for parameter in adapter_parameters(model).values())


def checkpoint_bytes(model: PreTrainedModel, config: Config) -> int:
    """Size of a checkpoint: weights to use and, unless that is all, master weights and AdamW's two moments."""
    whole, saved = model.model, weights_on_disk(model, config)
    if config.trainer.save_model_only:
        return saved
    if config.lora.on:
        return saved + 12 * adapter_count(model)
    frozen = weight_count(getattr(whole, family_of(model).tower)) if config.model.freeze_vision else 0
    return saved + 12 * (weight_count(model) - frozen)


def check_room(what: str, folder: Path, needed: int) -> None:
    """Raise `FolderError` where the disk of `folder` has less room than the `needed` bytes of what is to be written."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # some file systems of a network don't know their size
        raise FolderError(
            f"the disk is full: {what} can't be written to {folder}: it takes {shown(needed)}, {shown(disk.free)} are "
            "free"
        )


def weights_on_disk(model: PreTrainedModel, config: Config) -> int:
    """Size of a checkpoint's weights as transformers and PEFT read them: `hf`, `adapter` or both."""
    adapters, weights = adapter_count(model), weight_count(model)
    return (adapters + weights * (config.lora.save_merged or not config.lora.on)) * weight_bytes(config)


def weight_bytes(config: Config) -> int:
    return getattr(torch, config.model.dtype).itemsize


def sequence_bytes(text: Any, config: Config) -> int:
    """Size of one longest sequence's keys and values in the engine; `text` is the model's text configuration."""
    return longest_sequence(config) * cache_bytes(text, config)


def cache_bytes(text: Any, config: Config) -> int:
    """Size of a token's keys and values."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * attending_layers(text) * text.num_key_value_heads * head * weight_bytes(config)


def attending_layers(text: Any) -> int:
    """Layers that hold a token's keys and values: those of sliding windows too, which let them go after a while."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return sum(kind in ("full_attention", "sliding_attention") for kind in kinds)


def longest_sequence(config: Config) -> int:
    """Most tokens of a prompt and its completion."""
    return config.data.max_prompt_tokens + config.rollout.max_tokens


def check_length(text: Any, config: Config) -> str:
    """How long sequences may be; raises `ConfigError` where one is longer than the model has positions for."""
    longest, positions = longest_sequence(config), text.max_position_embeddings
    scaled = (getattr(text, "rope_parameters", None) or {}).get("factor")
    if longest > positions * (scaled or 1):
        raise ConfigError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and rollout.max_tokens="
            f"{config.rollout.max_tokens} are {longest} together, but the model has {positions} positions"
        )
    return f"at most {longest} with the completion; the model has {positions} positions"


MANY_WEIGHTS = 1e9


def keeps_activations(count: int, config: Config, on_gpu: bool) -> str | None:
    """A warning where a GPU is to keep the activations of every layer of a model with `count` weights."""
    if config.model.gradient_checkpointing or not on_gpu or count < MANY_WEIGHTS:
        return None
    return (
        f"model.gradient_checkpointing=false with {count / 1e9:.3g} billion weights: a GPU keeps all that every layer "
        "computes for the backward pass, and may run out of memory in the middle of a run"
    )


def check_engine(model: PreTrainedModel, config: Config) -> str:
    """What vLLM needs and has on each of the ranks that share it.

    Raises `ConfigError` where ranks can't share it, or one longest sequence doesn't fit beside the weights.
    """
    _check_sharing(model, config)
    check_images(family_of(model))
    text, shared = model.config.get_text_config(), config.rollout.tensor_parallel
    # A rank has its part of the heads of keys and values, and one whole where there are fewer of them than ranks.
    cache = sequence_bytes(text, config) // min(shared, text.num_key_value_heads)
    if not torch.cuda.is_available():
        given = config.rollout.kv_cache_gb * GB
        if cache > given:
            raise ConfigError(
                f"rollout.kv_cache_gb={config.rollout.kv_cache_gb} is less than one longest sequence takes, "
                f"{shown(cache)}"
            )
        return f"a longest sequence takes {shown(cache)} of vLLM's {shown(given)}"
    weights = weight_count(model) * weight_bytes(config) // shared
    total = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory
    given = config.rollout.memory * total
    if weights + cache > given:
        raise ConfigError(
            f"rollout.memory={config.rollout.memory} of the GPU's {shown(total)} is {shown(given)}: less than vLLM "
            f"needs for the weights, {shown(weights)}, and one longest sequence, {shown(cache)}"
        )
    return f"weights {shown(weights)} and a longest sequence {shown(cache)} of vLLM's {shown(given)}"


def check_images(family: Family) -> None:
    """Raise `ConfigError` where vLLM would compute an image's tokens otherwise than the trainer does."""
    if family.both_ways and not torch.cuda.is_available():
        raise ConfigError(
            "rollout.engine=vllm: on a CPU vLLM lets an image's token attend to none after it, where this model's "
            "attend to their whole image; set rollout.engine=hf"
        )


def _check_sharing(model: PreTrainedModel, config: Config) -> None:
    """Raise `ConfigError` where `rollout.tensor_parallel` ranks can't share the model in equal parts."""
    shared, ranks = config.rollout.tensor_parallel, rank_count()
    told = f"rollout.tensor_parallel={shared}"
    if ranks % shared and config.rollout.engine == "vllm":  # a server's GPUs aren't ranks
        alone = ": a single process, as `vogue eval` is, takes 1" if ranks == 1 else ""
        raise ConfigError(f"{told} doesn't divide the number of ranks, {ranks}{alone}")
    text, vision = model.config.get_text_config(), model.config.vision_config
    sees = getattr(vision, "num_heads", None) or vision.num_attention_heads
    for count, of in (
        (text.num_attention_heads, "heads of attention"),
        (sees, "heads of the vision tower's attention"),
    ):
        if count % shared:
            raise ConfigError(f"{told} doesn't divide the model's {count} {of}")
    few, many = sorted((shared, text.num_key_value_heads))
    if many % few:
        raise ConfigError(
            f"{told} and the model's {text.num_key_value_heads} heads of keys and values: one must divide the other"
        )


def shown(size: float) -> str:
    return f"{size / GB:.3g} GB" if size >= GB / 10 else f"{size / 1e6:.3g} MB"
