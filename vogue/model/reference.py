"""The reference that `kl` keeps the policy near: its own model below its adapters, or a frozen one beside it."""

from typing import Any

import torch
from transformers import PreTrainedModel

from vogue.config import Config
from vogue.config.training_sections import LoraConfig
from vogue.model.files import read_checkpoint
from vogue.model.loading import load_model
from vogue.settings import ConfigError


def reference_path(config: Config) -> str | None:
    """Where the reference is that has to stand beside the policy, if one has to."""
    if not config.kl.coef or (config.lora.on and config.kl.reference is None):
        return None
    return config.kl.reference or config.model.path


def check_reference(model: PreTrainedModel, config: Config) -> str:
    """Which model is the reference of the policy `model`; raises `ConfigError` where the two don't fit each other.

    It reads the same inputs and has the same words; its layers may be of other widths and numbers.
    """
    path = reference_path(config)
    if path is None:
        return "the model below the adapters"
    if config.kl.reference is None:
        return f"a frozen copy of {path}"
    ours: Any = model.config
    try:
        theirs: Any = read_checkpoint(path).model.config
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"model.path={path}", f"kl.reference={path}")) from None
    text, other = ours.get_text_config(), theirs.get_text_config()
    same = {"model_type": (ours.model_type, theirs.model_type), "vocab_size": (text.vocab_size, other.vocab_size)}
    if config.rollout.latent_steps:  # it reads the policy's states
        same["hidden_size"] = text.hidden_size, other.hidden_size
    for name, (mine, its) in same.items():
        if mine != its:
            raise ConfigError(f"kl.reference={path}: its {name} is {its}, that of model.path={mine}")
    return path


def load_reference(config: Config, device: torch.device) -> PreTrainedModel | None:
    """The model that stands beside the policy, frozen, as `load_model` loads it; None where none has to.

    All ranks call this together. Raises `ConfigError` as `load_model`.
    """
    path = reference_path(config)
    if path is None:
        return None
    model = config.model.model_copy(update={"path": path})
    alone = config.model_copy(update={"model": model, "lora": LoraConfig()})  # pyright: ignore[reportCallIssue]
    try:
        frozen: Any = load_model(alone, device).requires_grad_(False)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"model.path={path}", f"kl.reference={path}")) from None
    return frozen
