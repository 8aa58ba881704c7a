"""A model's files, looked at before any weight is read: are they all there, whole, and of the model of config.json?

The headers of safetensors have every weight's name and shape. Loaded into a model on torch's meta device, they show
what transformers would miss, in milliseconds. Whether the head is tied to the embedding is said by
`tie_word_embeddings` of the outer configuration, as transformers reads it: trainer, engine and saved folder follow it,
and a checkpoint whose weights say otherwise is refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import Transpose
from transformers.utils import logging

from vogue.families import FAMILIES
from vogue.settings import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FETCHED = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]  # of a model on the hub
LFS = b"version https://git-lfs"
HUB_NAME = r"[\w-][\w.-]*/[\w.-]+"
SHOWN = 3  # names of a list that a message says in full
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
TIED_BUT_DIFFERENT = (
    f"config.json ties the head to the embedding, but {HEAD} differs from it: set tie_word_embeddings=false"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, its weights' files, and the model that they are of, on the meta device."""

    folder: Path
    files: tuple[Path, ...]
    model: PreTrainedModel


def find_folder(path: str) -> Path:
    """The folder of the model at `path`: that one, or the hub's cache, into which a model of that name is fetched.

    Raises `ConfigError` for a folder that isn't there, without asking the hub, and for a model that can't be fetched.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"model.path={path}: this is a file; the model's folder is wanted")
    if not re.fullmatch(HUB_NAME, path) or folder.parent.is_dir():  # no name on the hub
        raise ConfigError(f"model.path={path}: no such folder")
    offline = constants.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(path, allow_patterns=FETCHED, etag_timeout=10, local_files_only=offline))
    except OSError as error:
        why = "HF_HUB_OFFLINE is set" if offline else " ".join(str(error).split())[:200]
        raise ConfigError(f"model.path={path}: no such folder, and it can't be fetched from the hub: {why}") from None


def read_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at `path`, looked at without reading its weights; raises `ConfigError` for the first thing wrong.

    One in pickled files is refused: reading those can run what they say.
    """
    folder = find_folder(path)
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix == ".json":
                _read_json(file)
            elif file.is_file():
                _refuse_pointer(file)
        model = _planned(folder)
        files = _weight_files(folder)
        stored = {name: weight for file in files for name, weight in _header(file).items()}
        model = _on_meta(model, stored)
        _check_tied(model, files)
    except ConfigError as error:
        raise ConfigError(f"model.path={path}: {error}") from None
    return Checkpoint(folder, files, model)


def configured_model(path: str) -> PreTrainedModel:
    """The model of the config.json at `path`, on the meta device, whether its weights are there or not.

    path  a folder, or a name on the hub whose config.json is in the hub's cache; nothing is fetched

    Raises `ConfigError` where there is none, or it isn't of a model that vogue trains.
    """
    folder = Path(path)
    if not folder.exists() and re.fullmatch(HUB_NAME, path):
        cached = try_to_load_from_cache(path, "config.json")
        if not isinstance(cached, str):
            raise ConfigError(
                f"model.path={path}: no such folder, and its config.json isn't in the hub's cache; it alone is needed: "
                f"`hf download {path} config.json`"
            )
        folder = Path(cached).parent
    if not folder.is_dir():
        raise ConfigError(f"model.path={path}: no such folder")
    try:
        return _planned(folder)
    except ConfigError as error:
        raise ConfigError(f"model.path={path}: {error}") from None


def write_as_published(model: PreTrainedModel) -> None:
    """Let a loaded model's weights be written, and sent to vLLM, as those on the hub lie.

    transformers turns Qwen3-VL-MoE's experts round where it loads them. It would look at a weight's shape before it
    turns one back, which says no where the weight is whole and yes where ZeRO-3 partitions it; vLLM reads one way.
    """
    for conversion in getattr(model, "_weight_conversions", None) or ():
        for operation in getattr(conversion, "operations", ()):
            if isinstance(operation, Transpose):
                operation.check_dims = False


def check_experts(checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` where experts' weights lie as transformers holds them, which vLLM would read the wrong way.

    Of Qwen3-VL-MoE: such a folder was written by `save_pretrained`. Those on the hub lie (experts, in, out).
    """
    if checkpoint.model.config.model_type != "qwen3_vl_moe":
        return
    held = {name: weight.shape for name, weight in checkpoint.model.named_parameters() if ".mlp.experts." in name}
    stored = {name: weight.shape for file in checkpoint.files for name, weight in _header(file).items()}
    if wrong := [name for name, shape in held.items() if stored.get(name) == shape]:
        raise ConfigError(
            f"model.path={checkpoint.folder}: {listed(wrong)} lie as transformers holds them, (experts, out, in): vLLM "
            "reads (experts, in, out), as on the hub; turn their last two dimensions round, or set rollout.engine=hf"
        )


def misfit(info: Mapping[str, Any], config: Any) -> str:
    """What of a checkpoint and the model of `config` doesn't fit together, in a sentence; empty where all does.

    `info`: what `from_pretrained` says with `output_loading_info`; tied weights aren't missing in it.
    """
    if names := info["missing_keys"]:
        return f"the checkpoint lacks {listed(names)}" + (_why_untied(config) if HEAD in names else "")
    if wrong := info["mismatched_keys"]:
        shapes = [f"{name} {list(found)}, not {list(wanted)}" for name, found, wanted in wrong]
        return f"weights have another shape than in the model of config.json: {listed(shapes)}"
    if names := info["unexpected_keys"]:
        return f"the checkpoint holds what the model of config.json has no place for: {listed(names)}"
    return ""


def _why_untied(config: Any) -> str:
    inner = getattr(config.get_text_config(), "tie_word_embeddings", None)
    return "; tie_word_embeddings isn't true in config.json" + (
        ", where it decides, though it is in text_config" if inner else ""
    )


def check_finite(path: str, files: Iterable[Path]) -> None:
    """Raise `ConfigError` naming the weights in these files that hold NaN or infinity; all are read, one at a time."""
    wrong = []
    for file in files:
        with safe_open(file, "pt") as weights:
            wrong += [name for name in weights.keys() if not is_finite(weights.get_tensor(name))]  # noqa: SIM118
    if wrong:
        raise ConfigError(f"model.path={path}: NaN or infinity in {listed(wrong)}")


def is_finite(weight: Tensor) -> bool:
    """Whether no element is NaN or infinite; takes no memory, as an element-wise answer would."""
    if not weight.is_floating_point() or not weight.numel():
        return True
    return all(bool(bound.isfinite()) for bound in weight.aminmax())  # NaN is passed on by both


def listed(names: Iterable[str]) -> str:
    """A few of `names`, sorted, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - SHOWN
    return ", ".join(ordered[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _planned(folder: Path) -> PreTrainedModel:
    """The model of config.json, on the meta device."""
    if (folder / "adapter_config.json").exists():
        raise ConfigError("this is an adapter: model.path is its base model, and lora.adapter this folder")
    config = _read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise ConfigError(f"config.json has model_type={kind}; vogue trains {', '.join(FAMILIES)}")
    try:
        described = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(described)
    # Each family checks its values in its own way, or divides by them.
    except Exception as error:
        raise ConfigError(f"config.json: {' '.join(str(error).split())[:200]}") from None
    if told := FAMILIES[kind].refusal(described):
        raise ConfigError(f"config.json: {told}")
    return model


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(f"there is no {file.name} in it")
    _refuse_pointer(file)
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file.name} is no JSON: {error}") from None


def _refuse_pointer(file: Path) -> None:
    with open(file, "rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ConfigError(f"{file.name} is a git-lfs pointer, not the file itself: `git lfs pull` fetches it")


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that transformers would read; raises `ConfigError` where one is missing, or all are pickled."""
    if (folder / WEIGHTS).exists():
        return (folder / WEIGHTS,)
    if (folder / INDEX).exists():
        index = _read_json(folder / INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or not placed:
            raise ConfigError(f"{INDEX} has no weight_map")
        files = sorted({folder / str(name) for name in placed.values()})
        if missing := [file.name for file in files if not file.exists()]:
            raise ConfigError(f"of {len(files)} files of weights there lack {listed(missing)}")
        return tuple(files)
    if any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"its weights are pickled files, which could run anything: only {WEIGHTS} is read. Where you trust them, "
            "load them with transformers and save_pretrained to another folder"
        )
    found = [file.name for file in folder.glob("*.safetensors")]
    raise ConfigError(f"there is neither {WEIGHTS} nor {INDEX} in it" + (f", only {listed(found)}" if found else ""))


def _header(file: Path) -> dict[str, Tensor]:
    """Every weight of a file, without its values; raises `ConfigError` for a file that isn't whole."""
    _refuse_pointer(file)
    try:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            return {name: torch.empty(weights.get_slice(name).get_shape(), device="meta") for name in names}
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ConfigError(f"{file.name} is damaged or not whole, {size} bytes: {error}") from None


def _on_meta(model: PreTrainedModel, stored: dict[str, Tensor]) -> PreTrainedModel:
    """The model as transformers would load it from `stored`, without values."""
    kind: Any = type(model)
    with _without_report():
        loaded, info = kind.from_pretrained(
            None,
            config=model.config,
            state_dict=stored,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if told := misfit(info, model.config):
        raise ConfigError(told)
    return loaded


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from printing what `misfit` says."""
    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _check_tied(model: PreTrainedModel, files: tuple[Path, ...]) -> None:
    """Raise `ConfigError` for a head that the configuration ties to an embedding which it differs from."""
    if not model.config.tie_word_embeddings:
        return
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if name.endswith((HEAD, EMBEDDING)):
                    found[HEAD if name.endswith(HEAD) else EMBEDDING] = weights.get_tensor(name)
    if set(found) == {HEAD}:  # transformers would take it for the embedding, vLLM wouldn't
        raise ConfigError(f"the checkpoint lacks {EMBEDDING}, though it has {HEAD}")
    if len(found) == 2 and not torch.equal(found[HEAD], found[EMBEDDING]):
        raise ConfigError(TIED_BUT_DIFFERENT)
