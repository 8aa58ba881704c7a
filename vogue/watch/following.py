"""A run's folder, read again and again while the run writes to it: what is new is read, and nothing is written."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vogue.config import Config, load_config
from vogue.run.alarms import Alarm, alarms, stalled
from vogue.run.folder import is_worked_in, parts, row_of
from vogue.settings import ConfigError

LATEST = 60  # completions
BLOCK = 1 << 20  # bytes of a file's end that are read at a time
SETTLED = 0.05  # seconds after which a log that is being rotated has its new name


@dataclass(frozen=True)
class Seen:
    """A run at one moment. `completions` are the latest ones, the newest last; `silent` is seconds since it wrote."""

    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    alarms: list[Alarm]
    silent: float
    working: bool | None  # as `is_worked_in`

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will come, unless the run is resumed."""
        return self.working is False or (self.working is None and self.steps >= self.config.trainer.steps)

    @property
    def state(self) -> str:
        """How the run is, in a word or two."""
        if self.ended:
            return "finished" if self.steps >= self.config.trainer.steps else "stopped"
        return "running" if self.metrics else "before its first step"


class Log:
    """The rows of a log and of its parts, of which `read` reads what is new."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._read: list[tuple[int, int]] = []  # of each file: its number on the disk, and the bytes that were read

    def read(self) -> list[dict[str, Any]]:
        """All rows; those of a resumed run, which writes its logs anew, from the beginning.

        Raises `ConfigError` for a line that is no object with a step.
        """
        files = parts(self.path)
        if len(files) < len(self._read):
            time.sleep(SETTLED)
            files = parts(self.path)
        with ExitStack() as held:
            opened = [held.enter_context(open(file, "rb")) for file in files]
            stats = [os.fstat(file.fileno()) for file in opened]
            same = [number for number, _ in self._read] == [stat.st_ino for stat in stats[: len(self._read)]]
            if not same or any(stat.st_size < done for stat, (_, done) in zip(stats, self._read, strict=False)):
                self.rows, self._read = [], []
            before = [*(done for _, done in self._read), *[0] * (len(files) - len(self._read))]
            self._read = []
            for file, stat, done in zip(opened, stats, before, strict=True):
                file.seek(done)
                whole = file.read().rpartition(b"\n")[0]
                place = f"{file.name}, after byte {done}"
                self.rows += [row_of(line, place) for line in whole.split(b"\n")] if whole else []
                self._read.append((stat.st_ino, done + len(whole) + bool(whole)))
        return self.rows


class Follower:
    """Looks at a run's folder; raises `ConfigError` where it is none."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time):
        self.folder = folder
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder} is no run: it has no config.yaml")
        self._now = now
        self._metrics, self._evaluations = Log(folder / "metrics.jsonl"), Log(folder / "evaluations.jsonl")
        self._alarms: tuple[int, list[Alarm]] = (0, [])
        self._settings: tuple[float, Config] | None = None  # when they were written

    def look(self) -> Seen:
        """The run as it is now. Raises `ConfigError` for a file that can't be read."""
        config = self._config()
        working = is_worked_in(self.folder)  # before the logs: one that ends meanwhile has written all of them
        metrics, evaluations = self._metrics.read(), self._evaluations.read()
        if self._alarms[0] != len(metrics):
            self._alarms = (len(metrics), alarms(metrics, config))
        silent = max(0.0, self._now() - self._last_written())
        done = working is False or len(metrics) >= config.trainer.steps
        late = None if done else stalled(metrics, silent)
        return Seen(
            folder=self.folder,
            config=config,
            metrics=metrics,
            evaluations=evaluations,
            completions=latest_rows(self.folder / "completions.jsonl", LATEST),
            alarms=[late, *self._alarms[1]] if late else self._alarms[1],
            silent=silent,
            working=working,
        )

    def _config(self) -> Config:
        """The run's settings, which a resumed run may change; reading them takes a while."""
        path = self.folder / "config.yaml"
        written = _time_of(path)
        if self._settings is None or self._settings[0] != written:
            try:
                self._settings = (written, load_config(path, []))
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
        return self._settings[1]

    def _last_written(self) -> float:
        """When something of the run was last written: a log, or a checkpoint, which may be in the making."""
        checkpoints = self.folder / "checkpoints"
        logs = (self.folder / f"{name}.jsonl" for name in ("metrics", "evaluations", "completions"))
        making = checkpoints.iterdir() if checkpoints.is_dir() else ()
        return max(_time_of(path) for path in (self.folder / "config.yaml", *logs, checkpoints, *making))


def latest_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The last rows of a log and its parts, at most `count` of them, without reading what is before them."""
    rows: list[dict[str, Any]] = []
    for file in reversed(parts(path)):
        with ExitStack() as held:
            try:
                opened = held.enter_context(open(file, "rb"))
            except FileNotFoundError:  # it has just been put aside
                continue
            lines = _last_lines(opened, count - len(rows))
        rows = [*(row_of(line, f"{file}, near its end") for line in lines), *rows]
        if len(rows) >= count:
            break
    return rows


def _last_lines(file, count: int) -> list[bytes]:
    """The last whole lines of a file."""
    start, found = file.seek(0, os.SEEK_END), b""
    while start > 0 and found.count(b"\n") <= count:
        size = min(BLOCK, start)
        start -= size
        file.seek(start)
        found = file.read(size) + found
    return found.split(b"\n")[:-1][-count:]  # what is behind the last end of a line is still being written


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
