"""Checkpoints: a Hugging Face folder to use, and what training goes on with.

    output_dir/checkpoints/step_000020/hf          config, tokenizer, image processor, model.safetensors or several
    output_dir/checkpoints/step_000020/adapter     with LoRA: PEFT's adapter; hf is there where lora.save_merged
    output_dir/checkpoints/step_000020/training    AdamW's state, its schedule, and run.pt, the run's state
    output_dir/checkpoints/step_000020/state.json  format, step, size and checksum of every file

With `trainer.save_model_only` there is no training: nothing can go on from such a checkpoint. From the others any
number of ranks can, with any stage of ZeRO (`vogue.model.optimizer_state`).

A checkpoint is written beside its place, by all ranks at once, and renamed when all of it is on the disk, so that a
stop in the middle leaves the one before it. Everything random in a run
(order of data, perturbation, branch draws, sampling) is a function of the seed and the step, so no generator's state
needs saving; `vogue.step.run_state` holds what isn't.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from vogue import distributed
from vogue.config import Config
from vogue.model import checksums, lora, optimizer_state, weights
from vogue.run.folder import FolderError, remove, replace, sync, writing
from vogue.run.kept_checkpoints import (
    clear,
    delete_old,
    mark_best,
    name_of,
    root_of,
)
from vogue.run.memory import check_room
from vogue.step.run_state import RunState

STATE = "state.json"
FORMAT = 2  # of a checkpoint's parts. 1, which didn't say so, had DeepSpeed's own files in place of training
HF, ADAPTER, TRAINING = "hf", "adapter", "training"
RUN = "run.pt"
USABLE = (HF, ADAPTER)  # of which a checkpoint has at least one


class State(NamedTuple):
    """What state.json says."""

    step: int
    sums: checksums.Sums
    model_only: bool = False
    format: int = FORMAT


class Run(NamedTuple):
    """What is saved of a run, as it is after `step` steps."""

    engine: Any  # DeepSpeed's
    model: PreTrainedModel
    processor: Any
    state: RunState
    config: Config
    step: int

    @property
    def goes_on(self) -> bool:
        return not self.config.trainer.save_model_only

    @property
    def has_hf(self) -> bool:
        return self.config.lora.save_merged or not self.config.lora.on


class Whole(NamedTuple):
    """The whole weights that a rank writes: of its own files of `hf`, and of the adapter."""

    files: weights.Files
    total: int  # files of hf, of all ranks
    adapter: dict[str, Tensor]


class Part(NamedTuple):
    """What a rank has written."""

    sums: checksums.Sums
    files: list[weights.Written]
    training: optimizer_state.Index


def save(run: Run) -> Path:
    """Save the run as it is, and delete all but the newest `trainer.keep` checkpoints and the best one.

    Raises `FolderError` on every rank where one of them can't write its part; nothing of it is left then.
    """
    root = root_of(run.config)
    final = root / name_of(run.step)
    partial = root / f".{final.name}.partial"
    try:
        _write(run, partial)
        with _together(root, run.step):
            if dist.get_rank() == 0:
                remove(final)
                partial.rename(final)
                sync(root)
                mark_best(root, run.state)
                delete_old(root, run.config.trainer.keep)
    except FolderError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _write(run: Run, partial: Path) -> None:
    """Write the whole checkpoint to `partial`; raises `FolderError` on every rank where one of them can't."""
    _begin(run, partial)
    whole = _whole(run)
    with _together(partial.parent, run.step):
        part = _own_part(run, partial, whole)
    parts = distributed.gather(part, Part, weights.Written, optimizer_state.Stored, optimizer_state.Place)
    with _together(partial.parent, run.step):
        if dist.get_rank() == 0:
            _finish(run, partial, parts)


def _begin(run: Run, partial: Path) -> None:
    """Make the folders, where the disk has room for all that will be in them."""
    root, first = partial.parent, dist.get_rank() == 0
    needed = optimizer_state.size(run.engine) if run.goes_on else 0
    if first and run.has_hf:
        needed += sum(weights.sizes_of(run.model).values())
    if first and run.config.lora.on:
        needed += sum(weights.adapter_sizes(run.model))
    needed = sum(distributed.gather(needed))
    run.state.check_alike()
    with _together(root, run.step):
        if first:
            root.mkdir(parents=True, exist_ok=True)
            clear(root)
    with distributed.together(FolderError):
        if first:
            check_room(_what(run.step), root, needed)
    with _together(root, run.step):
        if first:
            partial.mkdir()
            for name in [TRAINING] * run.goes_on + [HF] * run.has_hf + [ADAPTER] * run.config.lora.on:
                (partial / name).mkdir()


def _whole(run: Run) -> Whole:
    """Gather the whole weights that this rank is to write; every rank calls."""
    adapter = weights.gathered_adapter(run.model) if run.config.lora.on else {}
    if not run.has_hf:
        return Whole({}, 0, adapter)
    plan = weights.planned(weights.sizes_of(run.model), dist.get_world_size())
    return Whole(weights.gathered_files(run.model, plan), len({*plan.values()}), adapter)


def _own_part(run: Run, partial: Path, whole: Whole) -> Part:
    """Write what this rank writes, without a word to the others."""
    first, index = dist.get_rank() == 0, {}
    files = weights.write(run.model, whole.files, whole.total, partial / HF)
    paths = [partial / HF / one.file for one in files]
    if first and run.has_hf:
        paths += weights.write_rest(run.model, run.processor, partial / HF)
    if first and run.config.lora.on:
        lora.save_adapter(whole.adapter, run.model, run.config.model.path, partial / ADAPTER)
        run.processor.save_pretrained(partial / ADAPTER)
        paths += [path for path in (partial / ADAPTER).rglob("*") if path.is_file()]
    if run.goes_on:
        index, written = optimizer_state.write(run.engine, partial / TRAINING, dist.get_rank())
        paths += written
    if first and run.goes_on:
        run.state.save(partial / TRAINING / RUN)
        paths.append(partial / TRAINING / RUN)
    return Part(checksums.written(partial, paths), files, index)


def _finish(run: Run, partial: Path, parts: list[Part]) -> None:
    """Write what says that all ranks' parts are there, and wait until all of it is on the disk."""
    last = []
    if run.goes_on:
        last.append(optimizer_state.finish(run.engine, [part.training for part in parts], partial / TRAINING))
    if run.has_hf:
        last += weights.finish([one for part in parts for one in part.files], partial / HF)
    sums = {name: entry for part in parts for name, entry in part.sums.items()} | checksums.written(partial, last)
    replace(partial / STATE, json.dumps(State(run.step, sums, model_only=not run.goes_on)._asdict()))
    for folder, _, _ in os.walk(partial, topdown=False):
        sync(Path(folder))


@contextmanager
def _together(root: Path, step: int) -> Iterator[None]:
    """All ranks write in the block; where one can't, all raise its `FolderError` at its end."""
    with distributed.together(FolderError), writing(_what(step), root, RuntimeError, SafetensorError):
        yield


def _what(step: int) -> str:
    return f"the checkpoint after {step} steps"


def usable(checkpoint: Path) -> Path:
    """The folder of a checkpoint that transformers or PEFT reads."""
    return next(checkpoint / part for part in USABLE if (checkpoint / part).is_dir())
