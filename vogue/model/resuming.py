"""From which checkpoint a run goes on, whether it is whole, and what there is to do where it isn't."""

import json
import warnings
from pathlib import Path

import torch.distributed as dist

from vogue import distributed
from vogue.model import checksums, optimizer_state
from vogue.model.checkpoint import FORMAT, HF, RUN, STATE, TRAINING, USABLE, State, usable
from vogue.run.folder import NEWEST_WHOLE
from vogue.run.kept_checkpoints import BEST, best_of, checkpoints, step_of
from vogue.settings import ConfigError
from vogue.step.run_state import RunState


def find(root: Path, wanted: str) -> tuple[Path, int] | None:
    """The checkpoint with the `wanted` name, the newest one for "", and its step; None where there is none at all.

    "best" is the one that the link of this name leads to, "whole" the newest one that a run can go on from. All ranks
    call, and share the checking of its files. Raises `ConfigError` for one that isn't there, is another version's, has
    the model alone, or is damaged, with the way on.
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
    damage = _damage(folder, (TRAINING,))
    if damage:
        raise ConfigError(f"--resume: {folder} is damaged: {'; '.join(damage)}. {_way_on(folder, found)}")
    state = _state(folder)
    if state.model_only:
        raise ConfigError(
            f"--resume: {folder} was written with trainer.save_model_only=true, so that no run can go on from it. "
            f"{_way_on(folder, found)}"
        )
    if state.format != FORMAT:
        raise ConfigError(
            f"--resume: {folder} was written by another version of vogue, whose optimizer state this one can't read. "
            f"{_way_on(folder, found)}"
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
    return State(values["step"], sums, values.get("model_only", False), values.get("format", 1))


def _way_on(damaged: Path, found: list[Path]) -> str:
    """What can be done without a damaged checkpoint: the newest whole one before it, or its weights in a new run."""
    before = [path for path in reversed(found) if step_of(path) < step_of(damaged)]
    whole = next((path for path in before if not _damage(path, (TRAINING,)) and _is_for_training(path)), None)
    ways = [f"--resume={whole.name} goes on from the whole one before it"] if whole else []
    weights = next((path for path in (damaged, *before) if not _damage(path, USABLE)), None)
    if weights:
        setting = "model.path" if usable(weights).name == HF else "lora.adapter"
        ways.append(f"{setting}={usable(weights)} with another trainer.output_dir begins a new run from its weights")
    return "; ".join(ways) or "There is no whole one before it"


def _is_for_training(checkpoint: Path) -> bool:
    state = _state(checkpoint)
    return not state.model_only and state.format == FORMAT


def load_state(state: RunState, checkpoint: Path) -> None:
    """Put the run's state back."""
    state.load(checkpoint / TRAINING / RUN)


def load(engine, checkpoint: Path) -> None:
    """Put weights, optimizer and its schedule back; raises `ConfigError` where other weights are trained."""
    optimizer_state.read(engine, checkpoint / TRAINING)
