"""Low-rank adapters (LoRA, arXiv 2106.09685): W' = W + (alpha / rank) B A, of which A and B alone are trained.

PEFT puts A (rank, in) and B (out, rank) beside each adapted layer, in place. The rollout engine and merged checkpoints
get W' under the names that the model has without adapters, so neither has to know of them. There is no dropout: a
branch that drops other activations than the other one would be taken for one that sees another image.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vogue.config.training_sections import LoraConfig
from vogue.families import family_of
from vogue.model.files import read_checkpoint, write_as_published
from vogue.settings import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
NAME = "default"  # PEFT's, of a model's one adapter
PREFIX = "base_model.model."  # of PEFT's files: a model within PeftModel
ALL = "all-linear"
EXPERTS = ".mlp.experts."  # within the names of weights of three dimensions, one of all experts of a layer


class Whole(NamedTuple):
    """A parameter by the name that it has without adapters, and what is merged into it."""

    name: str
    parameter: nn.Parameter
    adapter: tuple[nn.Parameter, nn.Parameter, float] | None  # A, B and alpha / rank

    @property
    def pieces(self) -> list[nn.Parameter]:
        return [self.parameter, *(self.adapter or ())[:2]]

    def merged(self) -> Tensor:
        """W', in the dtype of W; the pieces must be gathered."""
        weight = self.parameter.detach()
        if self.adapter is None:
            return weight
        a, b, scale = self.adapter
        return torch.addmm(weight.float(), b.detach().float(), a.detach().float(), alpha=scale).to(weight.dtype)


def whole_parameters(model: nn.Module) -> Iterator[Whole]:
    """Every parameter of a model but its adapters'; a tied one once, under its first name."""
    for name, parameter in model.named_parameters():
        if not _is_adapters(name):
            layer: Any = model.get_submodule(name.rpartition(".base_layer.")[0]) if ".base_layer." in name else None
            adapter = None
            if layer is not None and name.endswith(".weight"):
                adapter = (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME])
            yield Whole(name.replace(".base_layer.", "."), parameter, adapter)


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of a checkpoint, by name: those of GLM-4.5V's routers, which no gradient reaches."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's adapters by their names in PEFT's files."""
    return {
        PREFIX + name.replace(f".{NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if _is_adapters(name)
    }


def add_adapters(model: PreTrainedModel, settings: LoraConfig, seed: int) -> None:
    """Give a model the adapters of `settings`, new ones or those of `lora.adapter`, and freeze all else.

    New ones change nothing yet: B is 0, and A of `seed` alone, so that all ranks have the same. Raises `ConfigError`
    where the model has no such layers, or the adapter is of another model or other settings.
    """
    import peft

    config, weights = _read(settings) if settings.adapter else (_new(model, settings), {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:  # it finds no such layer
            raise ConfigError(f"lora.adapter={settings.adapter}: it isn't of this model: {str(error)[:200]}") from None
    found = adapter_parameters(model)
    _check_linear(model, settings)
    model.requires_grad_(False)
    for parameter in found.values():
        parameter.requires_grad_(True)
    if settings.adapter:
        _fill(found, weights, settings.adapter)


def without_adapters(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The model computes as it does without its adapters, to the last bit.

    Their products are made all the same, and counted as 0, so that under ZeRO-3 the order of modules stays.
    """
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(model, multiplier=0.0)


def save_adapter(weights: dict[str, Tensor], model: PreTrainedModel, base: str, folder: Path) -> None:
    """Write an adapter as PEFT reads it; `weights`: those of `adapter_parameters`, whole and on the CPU."""
    config: Any = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def load_adapted(path: str, dtype: str, settings: LoraConfig) -> PreTrainedModel:
    """The model at `path` with the adapter of `settings`, on the CPU."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    write_as_published(model)
    add_adapters(model, settings, seed=0)
    return model


def merge(adapter: Path, base: str | None, folder: Path) -> None:
    """Write a model with an adapter merged into it, in the model's dtype, and its processor, to an empty `folder`.

    base  the model; None for the one that the adapter was trained on, by its configuration

    Raises `ConfigError` for what isn't there or doesn't fit.
    """
    base = base or _config(str(adapter)).base_model_name_or_path
    if not base:
        raise ConfigError(f"{adapter}: {CONFIG} doesn't say of which model it is: give --base")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: it isn't empty")
    found = read_checkpoint(base).folder
    model = load_adapted(str(found), "auto", LoraConfig(adapter=adapter))  # pyright: ignore[reportCallIssue]
    processor = AutoProcessor.from_pretrained(found)
    weights = {whole.name: whole.merged() for whole in whole_parameters(model)}
    model.save_pretrained(folder, state_dict=weights | saved_buffers(model), max_shard_size="5GB")
    processor.save_pretrained(folder)


def _is_adapters(name: str) -> bool:
    return f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name


def _new(model: PreTrainedModel, settings: LoraConfig) -> Any:
    import peft

    targets = _targets(model, settings)
    return peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)  # pyright: ignore


def _targets(model: PreTrainedModel, settings: LoraConfig) -> list[str]:
    """Full names of the linear layers that get an adapter: the text model's, the vision tower's if asked for."""
    tower = f"model.{family_of(model).tower}."
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    linear = [name for name in linear if settings.vision or not _sees(name, tower)]
    if any(EXPERTS in name for name, _ in model.named_parameters()):
        # PEFT would adapt the experts, which were linear layers of these names before transformers 5.
        linear = [name for name in linear if name.rpartition(".")[2] not in ("gate_proj", "up_proj", "down_proj")]
    if settings.target_modules == ALL:
        return linear
    kinds = {name.rpartition(".")[2] for name in linear}
    for kind in settings.target_modules:
        if kind not in kinds:
            raise ConfigError(f"lora.target_modules: no layer is called {kind}; there are {', '.join(sorted(kinds))}")
    return [name for name in linear if name.rpartition(".")[2] in settings.target_modules]


def _sees(name: str, tower: str) -> bool:
    """Whether a layer is part of what makes an image's features, the projector of LLaVA-OneVision included."""
    return name.startswith((tower, "model.multi_modal_projector."))


def _read(settings: LoraConfig) -> tuple[Any, dict[str, Tensor]]:
    """An adapter's configuration and weights; raises `ConfigError` for one that isn't there, or can't be merged."""
    where = f"lora.adapter={settings.adapter}"
    config = _config(str(settings.adapter))
    if settings.rank and settings.rank != config.r:
        raise ConfigError(f"lora.rank={settings.rank}, but {where} has rank {config.r}")
    more = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none",
        "modules_to_save": config.modules_to_save,
        "target_parameters": getattr(config, "target_parameters", None),  # experts, which aren't linear layers
        "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian"),  # others change W
    }
    if names := [name for name, value in more.items() if value]:
        raise ConfigError(f"{where}: {CONFIG} has {', '.join(names)}, which isn't supported")
    config.lora_dropout = 0.0  # see above
    try:
        return config, load_file(Path(str(settings.adapter)) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: {WEIGHTS} can't be read: {error}") from None


def _config(folder: str) -> Any:
    import peft

    if not (Path(folder) / CONFIG).is_file():
        raise ConfigError(f"lora.adapter={folder}: no {CONFIG} is there")
    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"lora.adapter={folder}: {CONFIG} can't be read: {error}") from None
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"lora.adapter={folder}: it is of kind {str(config.peft_type).rpartition('.')[2]}, not LORA")
    return config


def _check_linear(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Raise `ConfigError` where something else than a linear layer of the body is adapted: it couldn't be merged."""
    for name, parameter in model.named_parameters():
        odd = parameter.dim() != 2 or name.startswith("lm_head.") or EXPERTS in name
        if "lora_" in name and (odd or not _is_adapters(name)):
            raise ConfigError(f"lora.adapter={settings.adapter}: {name} is no linear layer of the body's")


def _fill(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], adapter: Path) -> None:
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ConfigError(f"lora.adapter={adapter}: it isn't of this model: {len(odd)} weights have no match, {odd[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(parameter.shape)}"
            raise ConfigError(f"lora.adapter={adapter}: {name} is {shapes}")
        with torch.no_grad():
            parameter.copy_(weights[name])
