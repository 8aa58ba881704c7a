"""A model that runs made one after another: which ones, and what the first of them began with."""

from dataclasses import dataclass
from pathlib import Path

from vogue.config import load_config
from vogue.run.kept_checkpoints import checkpoints, step_of


@dataclass(frozen=True)
class Stage:
    """The first `steps` steps of the run in `folder`."""

    folder: Path
    steps: int


def stages_of(model: str) -> tuple[str, list[Stage]]:
    """What the first run that made a model began with, and the stages from then on, newest first.

    That is the model itself, and none, where it isn't in a checkpoint of a run.
    """
    stages: list[Stage] = []
    while (checkpoint := Path(model).parent.resolve()) in checkpoints(checkpoint.parent):
        folder = checkpoint.parents[1]
        stages.append(Stage(folder, step_of(checkpoint)))
        model = load_config(folder / "config.yaml", []).model.path
    return model, stages
