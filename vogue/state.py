"""The one place for what a run remembers that is not a function of its seed and step, saved with every checkpoint.

Its values are tensors, numbers, strings, lists and dictionaries, each rank's own. Whoever reads `current` sees all that
has happened. The loader works ahead of the training and reads `settled`: the state as it was when the step before the
one that it loads began, so that it sees the same whether it is early or late, and in a resumed run. `training` is for
what the loader doesn't read, and isn't copied with every step: it may be large.
"""

import copy
from pathlib import Path
from typing import Any

import torch

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

    def save(self, path: Path) -> None:
        torch.save({"current": self.current, "settled": self.settled, "training": self.training}, path)

    def load(self, path: Path) -> None:
        """Raises what torch raises for a file that holds anything but plain values."""
        values = torch.load(path, weights_only=True)
        self.current, self.settled = values["current"], values["settled"]
        self.training = values.get("training", {})  # a checkpoint of before there was any has none
