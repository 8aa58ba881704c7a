"""A run's folder: whether it can be one, whose it is, and how its files are read and replaced.

The names of a step's phases in its metrics are here too. Nothing slow is imported.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vogue.settings import ConfigError

PHASES = ("data", "rollout", "reward", "train", "sync", "wait")  # of a step; only several ranks wait for one another
TRAIN_PHASES = ("pack", "old", "forward", "backward", "update")  # within "train"
LOCK = ".lock"
IMAGES = "completions"  # of completions.jsonl
NEWEST_WHOLE = "whole"  # as `--resume` takes it: the newest checkpoint that a run can go on from
FULL = (errno.ENOSPC, errno.EDQUOT)
LEAST_FREE = 1 << 20  # bytes; a disk with less is full, whatever the library that failed to write says


class FolderError(RuntimeError):
    """A run's folder that can't be written to any more; the message says why, and what was to be written."""


def parts(path: Path) -> list[Path]:
    """The files of a log, oldest first: NAME.1.jsonl, NAME.2.jsonl, … that `rotate` has put aside, then NAME.jsonl.

    Those that exist, so that there is none where there is no log.
    """
    numbered = re.compile(rf"{re.escape(path.stem)}\.([1-9][0-9]*){re.escape(path.suffix)}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    aside = {int(found[1]): file for file in beside if (found := numbered.fullmatch(file.name))}
    return [*(aside[number] for number in sorted(aside)), *([path] if path.exists() else [])]


def rotate(path: Path) -> None:
    """Put a log aside as the newest of its `parts`, so that what is written next begins a new file."""
    aside = [file for file in parts(path) if file != path]
    newest = int(aside[-1].suffixes[-2][1:]) if aside else 0
    path.rename(path.with_name(f"{path.stem}.{newest + 1}{path.suffix}"))
    sync(path.parent)


def read_rows(path: Path, *, steps: bool = True) -> list[dict[str, Any]]:
    """The objects of a JSONL file, and of the `parts` that were put aside before it: see `iterate_rows`."""
    return list(iterate_rows(path, steps=steps))


def iterate_rows(path: Path, *, steps: bool = True) -> Iterator[dict[str, Any]]:
    """Read the objects of all `parts` of a JSONL file, one at a time; none of no file, and no torn last line.

    Such a line is still being written, or was when the disk was full or the power went. Raises `ConfigError` for any
    other line that is no object, or has no step where `steps` are expected.
    """
    files = parts(path)
    for file in files:
        for _, row in lines_of(file, torn=file == files[-1], steps=steps):
            yield row


def lines_of(file: Path, *, torn: bool, steps: bool = True) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Read the lines of one file with what they hold, as `iterate_rows` does; `torn`: the last line may be."""
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                row = row_of(line, f"{file}, line {number}", steps)
            except ConfigError:
                if torn and not line.endswith(b"\n"):
                    return
                raise
            yield line, row


def row_of(line: bytes, place: str, steps: bool = True) -> dict[str, Any]:
    """The object of a line of JSON; raises `ConfigError`, with the place, where it is none or has no step."""
    try:
        row = json.loads(line.decode())
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    if not isinstance(row, dict) or (steps and not isinstance(row.get("step"), int)):
        raise ConfigError(f"{place}: expected an object{' with a step' if steps else ''}")
    return row


def replace(path: Path, text: str) -> None:
    """Give the file this text, so that whoever reads it, after a power cut too, finds the old or the new one whole."""
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove(folder: Path) -> None:
    """Delete a folder, which has another name before anything in it is gone: what is left of it can't look whole."""
    if not folder.exists():
        return
    old = folder.with_name(f".{folder.name.removeprefix('.')}.old")
    if old != folder:
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        sync(folder.parent)
    shutil.rmtree(old)


@contextmanager
def writing(what: str, folder: Path, *others: type[Exception]) -> Iterator[None]:
    """The block writes `what` to `folder`; an OSError, or one of `others`, becomes a `FolderError` that says so."""
    try:
        yield
    except (OSError, *others) as error:
        if is_full(error, folder):
            raise FolderError(f"the disk is full: {what} can't be written to {folder}") from error
        raise FolderError(f"{what} can't be written to {folder}: {error}") from error


def is_full(error: Exception, folder: Path) -> bool:
    """Whether the disk is the reason for the error; libraries tell that in words, or not at all."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free < LEAST_FREE


def check_writable(folder: Path, setting: str = "trainer.output_dir") -> None:
    """Raise `ConfigError` where no run can write to the `folder` of a setting; tries it, and leaves nothing behind."""
    try:
        with kept_for_a_while(folder), tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except (OSError, ValueError) as error:  # ValueError of a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{setting}={folder}: no run can be written there: {why}") from None


@contextmanager
def kept_for_a_while(folder: Path) -> Iterator[None]:
    """The folder is there in the block; what of it was missing is gone again afterwards."""
    made: list[Path] = []
    try:
        for part in reversed([folder, *folder.parents]):
            if not part.exists():
                part.mkdir()
                made.append(part)
        yield
    finally:
        for part in reversed(made):
            with suppress(OSError):  # somebody else is in it by now
                part.rmdir()


def check_new(folder: Path) -> None:
    """Raise `ConfigError` where a new run would overwrite another one."""
    if parts(folder / "metrics.jsonl") or any((folder / "checkpoints").glob("step_*")):
        raise ConfigError(f"{folder} holds a run already: pass --resume, or another trainer.output_dir")


def check_unlocked(folder: Path) -> None:
    """Raise `ConfigError` where another run works in the folder."""
    if os.path.exists(folder / LOCK):  # no error for a name that is too long, unlike Path.exists
        with locked(folder):
            pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, belongs to this process in the block.

    Raises `ConfigError` where it belongs to another one, which may be on another machine that shares the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read().strip() or "it has just started"
            raise ConfigError(f"{folder}: another run works there ({who}); wait for its end, or end it") from None
        except OSError as error:  # a network's file system may have no locks
            warnings.warn(f"{folder} can't be locked ({error}): start no second run there", stacklevel=3)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)  # for those who only look: see `is_worked_in`


def is_worked_in(folder: Path) -> bool | None:
    """Whether the process that owns the folder is alive; None where nobody here knows, who may be on another machine.

    It only reads: a lock that is tried out could keep the owner out.
    """
    try:
        told = (folder / LOCK).read_text().strip()
    except FileNotFoundError:
        return False
    owner = re.fullmatch(r"process ([0-9]+) on (.+)", told)
    if not told:
        return False
    if owner is None or owner[2] != socket.gethostname():
        return None
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and somebody else's
        return True
    return True
