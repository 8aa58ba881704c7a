"""What training goes on with, in a form that no number of ranks and no stage of ZeRO is part of.

    optimizer_00000_00.safetensors   what rank 0 held: of each weight NAME a fragment of its float32 elements, as
                                     NAME/master, NAME/exp_avg and NAME/exp_avg_sq, each (count,)
    optimizer.json                   of each weight its shape, its number of updates, and which elements lie in which
                                     file; of the run the number of updates and of those that were skipped

Every rank writes what it holds, in files of at most `FILE` bytes, and reads what it is to hold, from whichever files
have it: no rank waits for another one's files, and none ever has a whole model. Nothing is rounded. Weights that are
frozen aren't here: they are those of `model.path`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vogue.model import fragments
from vogue.model.files import listed
from vogue.model.fragments import MASTER, MOMENTS, Fragment
from vogue.run.folder import replace
from vogue.settings import ConfigError

INDEX = "optimizer.json"
FILE = 1 << 30  # bytes of a file, which a GPU's rank has in its host's memory at a time


class Place(NamedTuple):
    """Where a fragment lies: `count` elements of a weight from `first` on."""

    first: int
    count: int
    file: str


class Stored(NamedTuple):
    """What is stored of a weight."""

    shape: tuple[int, ...]
    updates: int
    places: tuple[Place, ...]


Index = dict[str, Stored]


def size(engine: Any) -> int:
    """Bytes that this rank writes."""
    optimizer = engine.basic_optimizer
    states = (fragments.state_of(optimizer, fragment) for fragment in fragments.written(engine))
    return sum(tensor.nbytes for state in states for tensor in state.values())


def write(engine: Any, folder: Path, rank: int) -> tuple[Index, list[Path]]:
    """Write this rank's part to `folder`; returns what it holds, and its files."""
    found: Index = {}
    files: list[Path] = []
    optimizer = engine.basic_optimizer
    for part in _parts(optimizer, fragments.written(engine)):
        path = folder / f"optimizer_{rank:05d}_{len(files):02d}.safetensors"
        tensors = {
            f"{fragment.name}/{kind}": tensor.cpu()
            for fragment in part
            for kind, tensor in fragments.state_of(optimizer, fragment).items()
        }
        save_file(tensors, path)
        files.append(path)
        for fragment in part:
            place = Place(fragment.first, fragment.count, path.name)
            found[fragment.name] = Stored(fragment.shape, fragments.updates_of(optimizer, fragment.flat), (place,))
    return found, files


def _parts(optimizer: torch.optim.Optimizer, found: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    """The fragments a file each; one that is larger than `FILE` has a file of its own."""
    part: list[Fragment] = []
    taken = 0
    for fragment in found:
        needed = sum(tensor.nbytes for tensor in fragments.state_of(optimizer, fragment).values())
        if part and taken + needed > FILE:
            yield part
            part, taken = [], 0
        part.append(fragment)
        taken += needed
    if part:
        yield part


def finish(engine: Any, parts: Iterable[Index], folder: Path) -> Path:
    """Write the index of all ranks' parts, once all of them are written; returns its file."""
    weights: Index = {}
    for part in parts:
        for name, stored in part.items():
            before = weights.get(name, stored._replace(places=()))
            weights[name] = before._replace(places=before.places + stored.places)
    run = {"updates": engine.lr_scheduler.last_epoch, "skipped": engine.skipped_steps}
    shown = {name: stored._asdict() for name, stored in weights.items()}
    replace(folder / INDEX, json.dumps({"run": run, "weights": shown}))
    return folder / INDEX


def read(engine: Any, folder: Path) -> None:
    """Put weights, moments and the schedule back, on any number of ranks and any stage of ZeRO; every rank calls.

    Raises `ConfigError`, on all ranks, where other weights are trained than those that are stored.
    """
    content = json.loads((folder / INDEX).read_text())
    weights = {name: _stored(entry) for name, entry in content["weights"].items()}
    _check(engine, weights, folder)
    optimizer, held = engine.basic_optimizer, fragments.held(engine)
    updates = {id(fragment.flat): weights[fragment.name].updates for fragment in held}
    for flat in {id(fragment.flat): fragment.flat for fragment in held}.values():
        fragments.begin(optimizer, flat, updates[id(flat)])
    with ExitStack() as opened, torch.no_grad():

        @cache
        def file(name: str) -> Any:
            return opened.enter_context(safe_open(folder / name, "pt"))

        for fragment in held:
            _fill(fragment, optimizer, weights[fragment.name], file)
    fragments.spread(engine)
    _set_schedule(engine, **content["run"])


def _stored(entry: dict[str, Any]) -> Stored:
    return Stored(tuple(entry["shape"]), entry["updates"], tuple(Place(*place) for place in entry["places"]))


def _fill(fragment: Fragment, optimizer: torch.optim.Optimizer, stored: Stored, file: Callable[[str], Any]) -> None:
    """Copy what is stored of a fragment, from the files that have some of it."""
    targets = {MASTER: fragment.flat}
    if stored.updates:
        targets |= {name: optimizer.state[fragment.flat][name] for name in MOMENTS}
    for place in stored.places:
        start = max(fragment.first, place.first)
        end = min(fragment.first + fragment.count, place.first + place.count)
        if start >= end:
            continue
        for kind, values in targets.items():
            found = file(place.file).get_slice(f"{fragment.name}/{kind}")[start - place.first : end - place.first]
            fragment.of(values).narrow(0, start - fragment.first, end - start).copy_(found)


def _check(engine: Any, weights: Index, folder: Path) -> None:
    """Raise `ConfigError` where the weights that are stored aren't those that are trained."""
    shapes = {name: _shape(weight) for name, weight in fragments.trained(engine).items()}
    if odd := sorted(shapes.keys() ^ weights.keys()):
        raise ConfigError(f"--resume: {folder} is of a run that trained other weights: {listed(odd)}")
    for name, shape in shapes.items():
        if shape != weights[name].shape:
            raise ConfigError(f"--resume: {folder}: {name} is {list(weights[name].shape)} there, here {list(shape)}")
    if odd := sorted(name for name, stored in weights.items() if not _is_complete(stored)):
        raise ConfigError(f"--resume: {folder}: parts are missing of {listed(odd)}")
    if engine.zero_optimization_stage() and len({stored.updates for stored in weights.values()}) > 1:
        raise ConfigError(
            f"--resume: {folder} was written with ZeRO's stage 0, which has updated some weights more often than "
            "others: no other stage can go on from it"
        )


def _is_complete(stored: Stored) -> bool:
    end = 0
    for place in sorted(stored.places):
        if place.first > end:
            return False
        end = max(end, place.first + place.count)
    return end == prod(stored.shape)


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _set_schedule(engine: Any, updates: int, skipped: int) -> None:
    """Let the engine stand after so many updates, with the learning rates of the next one."""
    schedule = engine.lr_scheduler
    rates = [rate * factor(updates) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    stands = {"last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | stands)
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    engine.skipped_steps, engine.global_steps = skipped, updates + skipped
    engine.global_samples = engine.global_steps * engine.train_batch_size()
