"""The runs of a report, read from their folders, and the methods that they are seeds of."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vogue.config import Config, flatten, load_config
from vogue.report.completions import Logged
from vogue.run.folder import parts, read_rows
from vogue.settings import ConfigError

PER_SEED = ("seed", "trainer.output_dir", "model.path")  # every seed may have a warm start of its own


@dataclass(frozen=True)
class Run:
    """A run's folder: its settings, one object a step and an evaluation, and the completions, read when asked for."""

    folder: Path
    name: str
    config: Config
    metrics: list[dict[str, float]]
    evaluations: list[dict[str, Any]]
    completions: Logged


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone; `settings` are what they share, by dotted name."""

    label: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of `folders`, each once, and name them by what their paths don't share.

    Raises `ConfigError` for a folder that holds no run or no step, and for a file that can't be read.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    shared = folders[0].parent if len(folders) == 1 else Path(os.path.commonpath(folders))
    names = [folder.name if folder == shared else str(folder.relative_to(shared)) for folder in folders]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def group_methods(runs: Sequence[Run]) -> list[Method]:
    """Group runs whose settings differ in the seed alone; the model counts as a setting where a seed comes twice."""
    groups = []
    for found in _by_settings(runs, PER_SEED):
        twice = len({run.config.seed for run in found[1]}) < len(found[1])
        groups += _by_settings(found[1], PER_SEED[:2]) if twice else [found]
    labels = _labels([settings for settings, _ in groups])
    return [Method(label, settings, tuple(runs)) for label, (settings, runs) in zip(labels, groups, strict=True)]


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the settings in which the runs differ."""
    names = dict.fromkeys(name for values in settings for name in values)
    return [name for name in names if any(values.get(name) != settings[0].get(name) for values in settings)]


def _read_run(folder: Path, name: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run: it has no config.yaml")
    if not parts(folder / "metrics.jsonl"):
        raise ConfigError(f"{folder} is no run: it has no metrics.jsonl")
    try:
        config = load_config(folder / "config.yaml", [])
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.yaml'}: {error}") from None
    metrics, evaluations = (read_rows(folder / f"{kind}.jsonl") for kind in ("metrics", "evaluations"))
    if not metrics:
        raise ConfigError(f"{folder / 'metrics.jsonl'} has no steps yet")
    return Run(folder, name, config, metrics, evaluations, Logged(folder / "completions.jsonl"))


def _by_settings(runs: Sequence[Run], ignored: Sequence[str]) -> list[tuple[dict[str, Any], list[Run]]]:
    groups: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        settings = {name: value for name, value in flatten(run.config).items() if name not in ignored}
        groups.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(run)
    return list(groups.values())


def _labels(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Name methods: by `method`, and by the settings that tell methods of one name apart."""
    labels = []
    for settings in groups:
        names = differing([other for other in groups if other["method"] == settings["method"]])
        default = flatten(load_config(None, [f"method={settings['method']}", "model.path=model"]))
        own = {name: settings[name] for name in names if name in settings}  # the model of some is no setting
        changed = [f"{name.split('.')[-1]}={value}" for name, value in own.items() if value != default.get(name)]
        labels.append(", ".join([settings["method"], *changed]))
    return labels
