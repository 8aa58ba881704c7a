"""The one place for what a run remembers that is not a function of its seed and step, saved with every checkpoint.

Its values are tensors, numbers, strings, lists and dictionaries, and the same on all ranks, so that any number of them
can go on with it: what a rank alone has seen is gathered before it comes here. Whoever reads `current` sees all that
has happened. The loader works ahead of the training and reads `settled`: the state as it was when the step before the
one that it loads began, so that it sees the same whether it is early or late, and in a resumed run. `training` is for
what the loader doesn't read, and isn't copied with every step: it may be large.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from vogue import distributed

Values = dict[str, Any]


class RunState:
    """`current` and `training` may be changed at any time but while a checkpoint is written; `settled` only be read."""

    def __init__(self) -> None:
        self.current: Values = {}
        self.settled: Values = {}
        self.training: Values = {}

    def settle(self) -> None:
        """Let the loader see what has happened up to now."""
        self.settled = copy.deepcopy(self.current)

    def digests(self) -> dict[str, str]:
        """A sum of each value, whatever objects it is made of: of equal ones the same."""
        both = [(when, *item) for when, part in vars(self).items() for item in part.items()]
        return {f"{when}[{name!r}]": _digest(value) for when, name, value in both}

    def check_alike(self) -> None:
        """Raise RuntimeError where ranks don't remember the same, which only one of them writes; every rank calls."""
        digests = distributed.gather(self.digests())
        names = sorted(set().union(*digests))
        if odd := [name for name in names if len({digest.get(name) for digest in digests}) > 1]:
            raise RuntimeError(f"the ranks don't remember the same: the run's state differs in {', '.join(odd)}")

    def save(self, path: Path) -> None:
        torch.save({"current": self.current, "settled": self.settled, "training": self.training}, path)

    def load(self, path: Path) -> None:
        """Raises what torch raises for a file that holds anything but plain values."""
        values = torch.load(path, map_location="cpu", weights_only=True)
        self.current, self.settled = values["current"], values["settled"]
        self.training = values["training"]


def _digest(value: Any) -> str:
    found = xxhash.xxh3_64()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """The bytes that a value is made of, with what tells it from others."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield f"{key!r}: ".encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} ".encode()
        for part in value:
            yield from _parts(part)
    else:
        yield f"{value!r} ".encode()
