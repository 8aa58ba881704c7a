"""The whole weights of a partitioned model: gathered piece by piece, and written as a Hugging Face folder by all ranks.

A rank keeps, in its host's memory, what its own files will hold: about the model's size over the number of ranks. The
files are written at the same time, and named in an index when all are there, as transformers splits a large model:

    model-00001-of-00008.safetensors …     each of at least 1 GB and about 5 GB at most, so that a small model has one,
    model.safetensors.index.json           model.safetensors
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import deepspeed
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vogue.model import lora
from vogue.model.files import INDEX, WEIGHTS
from vogue.run.folder import replace

GATHERED = 256 << 20  # bytes that are whole at a time
LEAST, MOST = 1_000_000_000, 5_000_000_000  # bytes of a file
LAYER = re.compile(r"(.*?\.\d+)\.")  # what a weight's name begins with: its layer, whose weights stay together

Files = dict[int, dict[str, Tensor]]  # weights by the number of the file that they go to


class Written(NamedTuple):
    """A file of weights: under which names it has them, their bytes and their number."""

    file: str
    names: tuple[str, ...]
    size: int
    count: int


def gathered_weights(model: nn.Module, byte_budget: int = GATHERED) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `model` whole, gathered by at most `byte_budget` bytes at a time on every rank.

    All ranks must exhaust the iterator. A tied parameter comes once, under its first name; adapters are merged. Buffers
    that checkpoints hold come last.
    """
    chunk: list[lora.Whole] = []
    size = 0
    for whole in lora.whole_parameters(model):
        bytes_needed = sum(_count(p) * p.element_size() for p in whole.pieces)
        if chunk and size + bytes_needed > byte_budget:
            yield from _gather(chunk)
            chunk, size = [], 0
        chunk.append(whole)
        size += bytes_needed
    yield from _gather(chunk)
    yield from lora.saved_buffers(model).items()


def _gather(chunk: list[lora.Whole]) -> Iterator[tuple[str, Tensor]]:
    with deepspeed.zero.GatheredParameters([piece for whole in chunk for piece in whole.pieces]):
        for whole in chunk:
            yield whole.name, whole.merged()


def _count(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def gathered_adapter(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the adapters whole, on the first rank's CPU; every rank calls."""
    found = lora.adapter_parameters(model)
    with deepspeed.zero.GatheredParameters([*found.values()]):
        if dist.get_rank() > 0:
            return {}
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in found.items()}


def adapter_sizes(model: nn.Module) -> list[int]:
    """Bytes of each of the adapters' weights."""
    return [_count(weight) * weight.element_size() for weight in lora.adapter_parameters(model).values()]


def file_count(total: int, ranks: int) -> int:
    """The number of files that weights of `total` bytes go to."""
    return max(1, -(-total // MOST), min(ranks, total // LEAST))


def planned(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The number of the file, from 0, that each weight goes to, by the weights' bytes; layers stay together."""
    total = sum(sizes.values())
    count = file_count(total, ranks)
    places: dict[str, int] = {}
    found, before = {}, 0
    for name, size in sizes.items():
        layer = LAYER.match(name)
        place = places.setdefault(layer[1] if layer else name.rpartition(".")[0], before * count // total)
        found[name] = place
        before += size
    order = {place: number for number, place in enumerate(sorted(set(found.values())))}  # a large one may skip some
    return {name: order[place] for name, place in found.items()}


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Bytes of each weight and buffer that a folder of the model holds."""
    weights = {x.name: _count(x.parameter) * x.parameter.element_size() for x in lora.whole_parameters(model)}
    return weights | {name: buffer.nbytes for name, buffer in lora.saved_buffers(model).items()}


def gathered_files(model: nn.Module, plan: Mapping[str, int]) -> Files:
    """What this rank writes of the files of `plan`, on its CPU; every rank calls."""
    found: Files = {
        number: {} for number in sorted(set(plan.values())) if number % dist.get_world_size() == dist.get_rank()
    }
    for name, tensor in gathered_weights(model):
        if plan[name] in found:
            found[plan[name]][name] = tensor.to("cpu", copy=True)
    return found


def write(model: PreTrainedModel, files: Files, total: int, folder: Path) -> list[Written]:
    """Write some of a model's `total` files of weights, under the names and in the layout of the hub's."""
    found = []
    for number in sorted(files):
        weights = revert_weight_conversion(model, files.pop(number))
        stored = {name: tensor.contiguous() for name, tensor in weights.items()}
        name = WEIGHTS if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        save_file(stored, folder / name, {"format": "pt"})
        size, count = sum(x.nbytes for x in stored.values()), sum(x.numel() for x in stored.values())
        found.append(Written(name, tuple(stored), size, count))
    return found


def write_rest(model: PreTrainedModel, processor, folder: Path) -> list[Path]:
    """Write what a Hugging Face folder holds beside weights, configuration and processor; returns the files."""
    with TemporaryDirectory(dir=folder) as apart:  # beside weights, it would delete what it doesn't know of
        model.save_pretrained(apart, state_dict={})
        for path in Path(apart).iterdir():
            path.rename(folder / path.name)
    processor.save_pretrained(folder)
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def finish(written: list[Written], folder: Path) -> list[Path]:
    """Write the index of all ranks' files, once all of them are written; returns it, nothing where one file has all."""
    if len(written) == 1:
        return []
    sizes = {"total_parameters": sum(x.count for x in written), "total_size": sum(x.size for x in written)}
    places = {name: one.file for one in written for name in one.names}
    replace(
        folder / INDEX, json.dumps({"metadata": sizes, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
    )
    return [folder / INDEX]
