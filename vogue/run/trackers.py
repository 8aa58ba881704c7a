"""The trackers of `trainer.report_to`: metrics, evaluations and completions of a run, by accelerate's one interface.

A run that is resumed goes on as the same run there, by an id that trackers.json of its folder keeps. What came after
the checkpoint is then reported a second time: Weights & Biases keeps the first of both, the others the last or both.
One that can't be started ends the run before its first step; one that fails later doesn't.
"""

import json
import uuid
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import imports
from PIL import Image

from vogue.config import Config, flatten
from vogue.run.folder import replace
from vogue.settings import ConfigError

IDS = "trackers.json"
PATIENCE = 3  # failures one after another until a tracker is asked no more; each may take its own time-out
# What each calls the name of a run, and how it is told to go on with one.
NAME = {"wandb": "name", "mlflow": "run_name", "swanlab": "experiment_name", "trackio": "name", "clearml": "task_name"}
COLUMNS = ("step", "problem", "answer", "completion", "reward", "accuracy", "advantage", "branch", "image")


def missing(config: Config) -> list[str]:
    """A sentence for each of `trainer.report_to` that isn't installed, or whose arguments are for no tracker."""
    settings = config.trainer
    told = [
        f"trainer.report_to={name}: {name} isn't installed: pip install {name.replace('comet_ml', 'comet-ml')}"
        for name in settings.report_to
        if not getattr(imports, f"is_{name}_available")()
    ]
    unused = settings.tracker_args.keys() - set(settings.report_to)
    return told + [f"trainer.tracker_args.{name}: trainer.report_to doesn't have {name}" for name in sorted(unused)]


class Trackers:
    """All trackers of a run, started; `missing` has none. `resumed`: it goes on with a run that they know.

    Raises `ConfigError` for one that can't be started.
    """

    def __init__(self, config: Config, resumed: bool):
        self.folder = config.trainer.output_dir
        self.running: dict[str, GeneralTracker] = {}
        self._failures: Counter[str] = Counter()  # since the last success
        known = _known(self.folder) if resumed else {}
        if config.trainer.report_to:
            PartialState()  # accelerate's trackers ask it whether they are on rank 0, where this is called
        for name in config.trainer.report_to:
            kind = LOGGER_TYPE_TO_CLASS[name]
            arguments = _naming(name, config) | _same(name, known.get(name)) | config.trainer.tracker_args.get(name, {})
            try:
                tracker = kind(config.trainer.project, **arguments)
                tracker.start()
                if name not in known:  # a resumed run's are there, and MLflow refuses others
                    tracker.store_init_configuration({key: str(value) for key, value in flatten(config).items()})
            except Exception as error:  # anything: it is another's program, and talks to a server
                self.finish()  # those before it
                raise ConfigError(f"trainer.report_to={name} can't be started: {_told(error)}") from error
            self.running[name] = tracker
            known[name] = _id(name, tracker, arguments)
        if known:
            replace(self.folder / IDS, json.dumps(known))

    def log(self, values: dict[str, float], step: int) -> None:
        def log(name: str, tracker: GeneralTracker) -> None:
            # MLflow takes letters, digits and a few signs, but no @.
            fitting = {key.replace("@", "_at_"): x for key, x in values.items()} if name == "mlflow" else values
            tracker.log(fitting, step=step)

        self._each(log)

    def table(self, records: list[dict], step: int) -> None:
        """Completions as a table, with their images where the tracker's tables hold images; where it has tables."""

        def table(name: str, tracker: Any) -> None:
            if records and hasattr(tracker, "log_table"):
                rows = [self._row(name, record) for record in records]
                tracker.log_table("completions", list(COLUMNS), rows, step=step)

        self._each(table)

    def _row(self, name: str, record: dict) -> list[Any]:
        row = [record[column] for column in COLUMNS[:-1]]
        paths = [self.folder / path for path in record["image"]]
        return [*row, _picture(paths[0]) if name == "wandb" and paths else ", ".join(map(str, paths))]

    def finish(self) -> None:
        self._each(lambda _, tracker: tracker.finish())

    def _each(self, do: Callable[[str, GeneralTracker], None]) -> None:
        """Do this with every tracker; a run doesn't end for one that fails, whose values the run's folder has, too."""
        for name, tracker in tuple(self.running.items()):
            try:
                do(name, tracker)
                self._failures[name] = 0
            except Exception as error:  # as above
                self._failures[name] += 1
                given_up = self._failures[name] == PATIENCE
                if given_up:
                    del self.running[name]
                if given_up or self._failures[name] == 1:
                    then = "isn't asked again in this run" if given_up else "lacks what it was to be told"
                    warnings.warn(f"trainer.report_to={name} {then}: {_told(error)}", stacklevel=3)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _known(folder: Path) -> dict[str, str]:
    return json.loads((folder / IDS).read_text()) if (folder / IDS).exists() else {}


def _naming(name: str, config: Config) -> dict[str, str]:
    called = config.trainer.run_name or config.trainer.output_dir.resolve().name
    return {NAME[name]: called} if name in NAME else {}


def _same(name: str, known: str | None) -> dict[str, Any]:
    """The arguments that make a tracker's run the one with this id, or give a new one an id."""
    if name in ("wandb", "swanlab"):
        return {"id": known or uuid.uuid4().hex[:21], "resume": "allow"}
    if name == "comet_ml":
        return {"experiment_key": known or uuid.uuid4().hex}
    if name == "trackio":
        return {"resume": "allow"}  # by the run's name
    if known is None:
        return {}
    return {"run_id": known} if name == "mlflow" else {"continue_last_task": known} if name == "clearml" else {}


def _id(name: str, tracker: Any, arguments: dict[str, Any]) -> str:
    if name == "mlflow":
        return tracker.tracker.info.run_id
    if name == "clearml":
        return tracker.tracker.id
    return str(arguments.get("id") or arguments.get("experiment_key") or arguments.get("name"))


def _picture(path: Path):
    import wandb  # pyright: ignore[reportMissingImports]

    return wandb.Image(Image.open(path))
