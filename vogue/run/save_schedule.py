"""When a run saves, which checkpoint is its best one, and what comes after a save: a command, and the hub at the end.

What comes after a save is the user's own and may fail for reasons of its own: that is told, and the run goes on.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from vogue import distributed
from vogue.config import Config
from vogue.run import kept_checkpoints, launch
from vogue.run.folder import FolderError, writing
from vogue.run.restarts import ENDED
from vogue.settings import ConfigError

REQUEST = "save"  # the name of a file
CHECKPOINT = "VOGUE_CHECKPOINT"  # the environment variable of `trainer.save_command`
TAIL = 500  # characters of a failed command's output that are told


class Request:
    """A checkpoint that is asked for while the run goes on; a context manager, in the main thread.

    By SIGUSR1, to any rank, or by an empty file `save` in the run's folder, which goes once the checkpoint is there.
    """

    def __init__(self, folder: Path, rank: int):
        self._file = folder / REQUEST if rank == 0 else None
        self._signalled = False

    def __enter__(self) -> "Request":
        self._before = signal.signal(signal.SIGUSR1, self._heed)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGUSR1, self._before)

    def _heed(self, *_) -> None:
        self._signalled = True

    @property
    def made(self) -> bool:
        """Whether this rank knows of one."""
        return self._signalled or (self._file is not None and self._file.exists())

    def meet(self) -> None:
        """Forget it: there is such a checkpoint."""
        self._signalled = False
        if self._file:
            self._file.unlink(missing_ok=True)


class Schedule:
    """Says after which steps a checkpoint is due.

    After `trainer.save_every` steps or `trainer.save_minutes`, after the last step, and where one is asked for.
    """

    def __init__(self, config: Config, device: torch.device, request: Request):
        self._settings, self._device, self._request = config.trainer, device, request
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one is due after `step` steps; every rank calls, and gets the same answer."""
        every, last = self._settings.save_every, step >= self._settings.steps
        unplanned = distributed.largest([int(self._is_late() or self._request.made)], self._device)[0]
        return bool(unplanned or last or (every and step % every == 0))

    def saved(self) -> None:
        """Count the minutes from now on; every rank calls. Raises `FolderError` where a request can't be taken away."""
        self._since = time.monotonic()
        folder = self._settings.output_dir
        with distributed.together(FolderError), writing("that a checkpoint was asked for", folder):
            self._request.meet()

    def _is_late(self) -> bool:  # ranks' clocks differ
        minutes = self._settings.save_minutes
        return minutes is not None and time.monotonic() - self._since >= 60 * minutes


def better(row: Mapping[str, Any], step: int, config: Config, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is to be known of the best checkpoint after an evaluation's `row`; None where `best` stays the best.

    The first of several equal ones is the best. One that was found by another metric, or on other problems, isn't
    compared with; nor is the model before the first step, of which there is no checkpoint.
    """
    name = config.trainer.save_best
    if name is None or step == 0:
        return None
    of = [name, str(config.data.test), config.data.test_limit or 0]
    value = float(row[name][0])
    if best and best["of"] == of and best["value"] >= value:
        return None
    return {"step": step, "value": value, "of": of}


def told_best(known: dict[str, Any], root: Path) -> str:
    """The best checkpoint's folder, and what makes it the best."""
    folder = kept_checkpoints.best_of(root)
    where = str(folder) if folder else f"{kept_checkpoints.name_of(known['step'])}, which is gone"
    return f"{where}: {known['of'][0]} {100 * known['value']:.1f}% after {known['step']} steps"


def run_command(config: Config, folder: Path) -> str | None:
    """Run `trainer.save_command` for a checkpoint's folder; returns what is to be told where it fails."""
    command = config.trainer.save_command
    if command is None:
        return None
    # The command is no rank of this run: `vogue eval` in it would wait for the others.
    environment = {name: value for name, value in os.environ.items() if name not in (*launch.NAMES, ENDED)}
    environment[CHECKPOINT] = str(folder.absolute())
    seconds = config.trainer.timeout / 2  # the other ranks wait no longer than all of it
    try:
        code, said = _run(command, environment, seconds)
    except subprocess.TimeoutExpired:
        return f"trainer.save_command was ended for {folder}: it took {seconds:g} s, half of trainer.timeout"
    except OSError as error:
        return f"trainer.save_command couldn't be started for {folder}: {error}"
    return (
        f"trainer.save_command failed for {folder} with exit code {code}: {said or 'it said nothing'}" if code else None
    )


def _run(command: str, environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """A shell command's exit code, and the end of what it has printed; after so many seconds it is ended."""
    # A file, not a pipe: what the command leaves in the background may hold a pipe open. A session of its own, so that
    # Ctrl-C is the run's alone, and all of it can be ended.
    with TemporaryFile("w+", errors="replace") as output:
        told: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        running = subprocess.Popen(command, shell=True, env=environment, start_new_session=True, **told)
        try:
            code = running.wait(seconds)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
        output.seek(0)
        return code, output.read().strip()[-TAIL:]


def check_hub(config: Config) -> str | None:
    """A warning where nothing would let `trainer.push_to_hub` in; raises `ConfigError` for what can't be a repository.

    Whether the repository can be written to isn't known before it is: nothing is sent here.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repository = config.trainer.push_to_hub
    if repository is None:
        return None
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"trainer.push_to_hub={repository}: {error}") from None
    if get_token() is None:
        return f"trainer.push_to_hub={repository}: there is no token of the hub: `hf auth login`, or set HF_TOKEN"
    return None


def push(repository: str, folder: Path, step: int) -> str:
    """Send a folder of a model or an adapter to the hub; returns what is to be told, also where it fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"After {step} steps")
    # HTTPError: the network; ValueError: a reply that makes no sense; RuntimeError: the hub's storage.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        return (
            f"trainer.push_to_hub={repository}: {folder} couldn't be sent: {why}\n"
            f"By hand: hf upload {repository} {folder}"
        )
    return f"pushed to {repository}: {folder}"
