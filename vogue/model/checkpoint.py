"""Checkpoints: a Hugging Face folder to use, and DeepSpeed's shards to go on from.

    output_dir/checkpoints/step_000020/hf          config, tokenizer, image processor, model.safetensors
    output_dir/checkpoints/step_000020/adapter     with LoRA: PEFT's adapter; hf is there where lora.save_merged
    output_dir/checkpoints/step_000020/deepspeed   optimizer and master weights of every rank
    output_dir/checkpoints/step_000020/run/0.pt    the run's state of rank 0, of each rank one
    output_dir/checkpoints/step_000020/state.json  step, number of ranks, size and checksum of every file
    output_dir/checkpoints/best                    with trainer.save_best: a link to the best one

With `trainer.save_model_only` there is neither deepspeed nor run: nothing can go on from such a checkpoint.

A checkpoint is written beside its place, and renamed when all of it is on the disk, so that a stop in the middle leaves
the one before it. An old one is renamed before it is deleted. Everything random in a run (order of data,
perturbation, branch draws, sampling) is a function of the seed and the step, so no generator's state needs saving;
`vogue.state` holds what isn't.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from vogue import distributed
from vogue.config import Config
from vogue.model import checksums, lora
from vogue.run.folder import NEWEST_WHOLE, FolderError, remove, replace, sync, writing
from vogue.settings import ConfigError
from vogue.state import RunState

STATE = "state.json"
HF, ADAPTER, DEEPSPEED, RUN = "hf", "adapter", "deepspeed", "run"
USABLE = (HF, ADAPTER)  # of which a checkpoint has at least one
UNFINISHED = (".step_*.partial", ".step_*.old")
BEST = "best"  # a link's name, and that of what the run's state knows of the best checkpoint: {"step": …}


class State(NamedTuple):
    """What state.json says."""

    step: int
    ranks: int
    sums: checksums.Sums
    model_only: bool = False


def gathered_weights(model: torch.nn.Module, byte_budget: int = 256 << 20) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `model` whole, gathered by at most `byte_budget` bytes at a time on every rank.

    All ranks must exhaust the iterator. A tied parameter comes once, under its first name; adapters are merged. Buffers
    that checkpoints hold come last.
    """
    chunk: list[lora.Whole] = []
    size = 0
    for whole in lora.whole_parameters(model):
        bytes_needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in whole.pieces)
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


def root_of(config: Config) -> Path:
    """The folder of a run's checkpoints."""
    return config.trainer.output_dir / "checkpoints"


def save(engine, model: PreTrainedModel, processor, state: RunState, config: Config, step: int) -> Path:
    """Save everything after `step` steps, and delete all but the newest `trainer.keep` checkpoints and the best one.

    Raises `FolderError` on every rank where one of them can't write its part; nothing of it is left then.
    """
    root = root_of(config)
    final = root / name_of(step)
    partial = root / f".{final.name}.partial"
    try:
        _write(engine, model, processor, state, config, partial, step)
        with _together(root, step):
            if dist.get_rank() == 0:
                remove(final)
                partial.rename(final)
                sync(root)
                mark_best(root, state)
                kept = (*checkpoints(root)[-config.trainer.keep :], best_of(root))
                for old in checkpoints(root):
                    if old not in kept:
                        remove(old)
    except FolderError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _write(
    engine, model: PreTrainedModel, processor, state: RunState, config: Config, partial: Path, step: int
) -> None:
    """Write the whole checkpoint to `partial`; raises `FolderError` on every rank where one of them can't."""
    root, rank, goes_on = partial.parent, dist.get_rank(), not config.trainer.save_model_only
    with _together(root, step):
        if rank == 0:
            clear(root)
            partial.mkdir(parents=True)
            if goes_on:
                (partial / RUN).mkdir()
    if goes_on:
        with _together(root, step):
            state.save(partial / RUN / f"{rank}.pt")
    if config.lora.on:
        weights = _adapter(model)
        with _together(root, step):
            if rank == 0:
                lora.save_adapter(weights, model, config.model.path, partial / ADAPTER)
                processor.save_pretrained(partial / ADAPTER)
    if config.lora.save_merged or not config.lora.on:
        weights = _weights(model)
        with _together(root, step):
            if rank == 0:
                model.save_pretrained(partial / HF, state_dict=weights)
                processor.save_pretrained(partial / HF)
    if goes_on:
        with _together(root, step), _failing_late(engine):
            left_out = _without_frozen(config)
            engine.save_checkpoint(
                str(partial / DEEPSPEED), tag="state", save_latest=False, exclude_frozen_parameters=left_out
            )
    with _together(root, step):
        sums = checksums.written(partial, rank)
    sums = {name: entry for part in distributed.gather(sums) for name, entry in part.items()}
    with _together(root, step):
        if rank == 0:
            told = State(step, dist.get_world_size(), sums, model_only=not goes_on)
            replace(partial / STATE, json.dumps(told._asdict()))
            for folder, _, _ in os.walk(partial, topdown=False):
                sync(Path(folder))


@contextmanager
def _together(root: Path, step: int) -> Iterator[None]:
    """All ranks write in the block; where one can't, all raise its `FolderError` at its end."""
    what = f"the checkpoint after {step} steps"
    with distributed.together(FolderError), writing(what, root, RuntimeError, SafetensorError):
        yield


@contextmanager
def _failing_late(engine) -> Iterator[None]:
    """What DeepSpeed's engine can't write fails at the end of the block: the other ranks wait for this one within."""
    failed: list[Exception] = []

    def noting(write):
        def noted(*arguments, **named):
            try:
                return write(*arguments, **named)
            except (OSError, RuntimeError) as error:
                failed.append(error)

        return noted

    writers = ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script"))
    for owner, name in writers:
        setattr(owner, name, noting(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writers:
            delattr(owner, name)
    if failed:
        raise failed[0]


def _without_frozen(config: Config) -> bool:
    """Whether DeepSpeed's part is without what is frozen and lies in model.path: beside adapters, and a reference.

    A tower that is frozen alone stays in, as few weights as it has.
    """
    return config.lora.on or config.kl.coef > 0


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter whole, on the first rank's CPU; every rank calls."""
    weights = {}
    for name, tensor in gathered_weights(model):
        if dist.get_rank() == 0:
            weights[name] = tensor.to("cpu", copy=True)
    return weights


def _adapter(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter of the adapters whole, on the first rank's CPU; every rank calls."""
    found = lora.adapter_parameters(model)
    with deepspeed.zero.GatheredParameters([*found.values()]):
        if dist.get_rank() > 0:
            return {}
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in found.items()}


def clear(root: Path) -> None:
    """Delete what saving and deleting left behind where they were stopped in the middle."""
    for pattern in UNFINISHED:
        for path in root.glob(pattern):
            shutil.rmtree(path)


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root` by their step, whole or damaged."""
    found = (path for path in root.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return sorted(found, key=step_of)


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def mark_best(root: Path, state: RunState) -> None:
    """Let the link `best` lead to the best checkpoint that the run's state knows; there is none where it is gone."""
    known = state.current.get(BEST)
    best, new = root / name_of(known["step"]) if known else None, root / f".{BEST}.new"
    new.unlink(missing_ok=True)
    if best and best.is_dir():
        new.symlink_to(best.name)  # relative: the run's folder may be moved
        new.rename(root / BEST)
    else:
        (root / BEST).unlink(missing_ok=True)
    sync(root)


def best_of(root: Path) -> Path | None:
    """The checkpoint that the link `best` leads to, if there is one."""
    link = root / BEST
    return root / link.readlink() if link.is_symlink() and link.exists() else None


def usable(checkpoint: Path) -> Path:
    """The folder of a checkpoint that transformers or PEFT reads."""
    return next(checkpoint / part for part in USABLE if (checkpoint / part).is_dir())


def forget_after(root: Path, step: int) -> None:
    """Delete the checkpoints after `step`, whose steps run again."""
    for path in checkpoints(root):
        if step_of(path) > step:
            remove(path)


def find(root: Path, wanted: str) -> tuple[Path, int] | None:
    """The checkpoint with the `wanted` name, the newest one for "", and its step; None where there is none at all.

    "best" is the one that the link of this name leads to, "whole" the newest one that a run can go on from. All ranks
    call, and share the checking of its files. Raises `ConfigError` for one that isn't there, was written by another
    number of ranks, has the model alone, or is damaged, with the way on.
    """
    found = {path.name: path for path in checkpoints(root)}
    if wanted == BEST and (best := best_of(root)):
        wanted = best.name
    if wanted and wanted not in (*found, NEWEST_WHOLE):
        there = f"there are: {', '.join(found)}" if found else "there are none"
        raise ConfigError(f"--resume={wanted}: there is no such checkpoint in {root}; {there}")
    if not found:
        return None
    all_found = [*found.values()]
    if wanted != NEWEST_WHOLE:
        return _checked(found[wanted or all_found[-1].name], all_found)
    for folder in reversed(all_found):
        try:
            return _checked(folder, all_found)
        except ConfigError as error:
            if folder == all_found[0]:
                raise
            if dist.get_rank() == 0:
                warnings.warn(f"passed over: {error}", stacklevel=2)


def _checked(folder: Path, found: list[Path]) -> tuple[Path, int]:
    """A checkpoint and its step; raises `ConfigError`, with the way on, where a run can't go on from it."""
    damage = _damage(folder, (RUN, DEEPSPEED))
    if damage:
        raise ConfigError(f"--resume: {folder} is damaged: {'; '.join(damage)}. {_way_on(folder, found)}")
    state = _state(folder)
    if state.model_only:
        raise ConfigError(
            f"--resume: {folder} was written with trainer.save_model_only=true, so that no run can go on from it. "
            f"{_way_on(folder, found)}"
        )
    if state.ranks != dist.get_world_size():
        raise ConfigError(
            f"--resume: {folder} was written by {state.ranks} ranks, this run has {dist.get_world_size()}; ZeRO-3's "
            "shards fit the number of ranks they were written by"
        )
    if (unneeded := _damage(folder, USABLE)) and dist.get_rank() == 0:
        warnings.warn(f"{folder} can be gone on from, but not used: {'; '.join(unneeded)}", stacklevel=2)
    return folder, state.step


def _damage(folder: Path, parts: tuple[str, ...]) -> list[str]:
    """What is wrong with these folders of a checkpoint; all ranks share the work and know the result."""
    try:
        state = _state(folder)
    except (OSError, ValueError, TypeError, KeyError):
        return [f"{STATE} is missing, empty or cut"]
    sums = {name: entry for name, entry in state.sums.items() if name.split("/")[0] in parts}
    mine = checksums.damage(folder, sums, dist.get_rank(), dist.get_world_size())
    return sorted(text for part in distributed.gather(mine) for text in part)


def _state(folder: Path) -> State:
    values = json.loads((folder / STATE).read_text())
    sums = {name: tuple(entry) for name, entry in values["sums"].items()}
    return State(values["step"], values["ranks"], sums, values.get("model_only", False))


def _way_on(damaged: Path, found: list[Path]) -> str:
    """What can be done without a damaged checkpoint: the newest whole one before it, or its weights in a new run."""
    before = [path for path in reversed(found) if step_of(path) < step_of(damaged)]
    whole = next((path for path in before if not _damage(path, (RUN, DEEPSPEED)) and not _state(path).model_only), None)
    ways = [f"--resume={whole.name} goes on from the whole one before it"] if whole else []
    weights = next((path for path in (damaged, *before) if not _damage(path, USABLE)), None)
    if weights:
        setting = "model.path" if usable(weights).name == HF else "lora.adapter"
        ways.append(f"{setting}={usable(weights)} with another trainer.output_dir begins a new run from its weights")
    return "; ".join(ways) or "There is no whole one before it"


def load_state(state: RunState, checkpoint: Path) -> None:
    """Put this rank's part of the run's state back."""
    state.load(checkpoint / RUN / f"{dist.get_rank()}.pt")


def load(engine, checkpoint: Path, config: Config) -> None:
    """Put weights, optimizer and its schedule back."""
    path, _ = engine.load_checkpoint(
        str(checkpoint / DEEPSPEED), tag="state", load_module_strict=not _without_frozen(config)
    )
    if path is None:
        raise ConfigError(f"--resume: DeepSpeed found nothing to load in {checkpoint}")
    # A run whose optimizer was offloaded, and no longer is, or the other way round, has saved another class' settings.
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        group.update({name: value for name, value in optimizer.defaults.items() if name not in group})
