"""`vogue sweep`: methods × seeds from one start, each run a process with a folder of its own, and a table of them all.

    OUTPUT_DIR/VARIANT/seed_N/       the run's folder, as `vogue train` leaves it
    OUTPUT_DIR/VARIANT/seed_N.log    what it printed
    OUTPUT_DIR/table.md, table.json  `vogue.sweep_table`, with the command, the machine and the versions
    OUTPUT_DIR/differences.png       the same as a figure: each variant less what it is compared with

Runs take turns by seed, all variants of the first one first, so that a sweep that stops early has equally many of each
variant. The same command goes on: a run whose last evaluation is there is left as it is, one with a checkpoint resumes,
and one that stopped before its first checkpoint starts over. Nothing that other settings made is gone on with.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vogue import doctor, sweep_table
from vogue.config import Config, load_config
from vogue.report.differences import plot_differences
from vogue.run import logs
from vogue.run.folder import parts, read_rows
from vogue.run.kept_checkpoints import checkpoints
from vogue.run.stages import stages_of
from vogue.run.stopping import STOPPED
from vogue.settings import ConfigError, Count, Section, check, read_settings

OWN = ("seed", "trainer.output_dir")  # settings that the sweep gives each run
SHARED = (  # else nothing could be paired; so is the model of a variant and its baseline
    "data.test",
    "data.test_limit",
    "trainer.eval_samples",
    "trainer.eval_temperature",
    *("trainer.eval_top_p", "trainer.eval_top_k", "trainer.eval_min_p"),
)
GRACE = 30  # seconds that processes have to end by themselves: a run ends its step and saves
TAIL_LINES = 15  # of a failed run's log

Name = Annotated[str, Field(pattern=r"^[\w=+-][\w.=+-]*$")]


class Sweep(Section):
    settings: Path = Field(description="settings of every run: a YAML file that `vogue train` takes")
    output_dir: Path = Field(description="folder of all runs and of the table")
    variants: dict[Name, tuple[str, ...]] = Field(
        min_length=1,
        description="what is compared, as name: [key=value, …]; the first variant is what the others are compared with",
    )
    baselines: dict[Name, Name] = Field(
        {},
        description="variants that are compared with another one than the first, as name: other; for what begins with "
        "another model, so that the first would be no fair measure of it",
    )
    seeds: tuple[int, ...] = Field(min_length=1, max_length=20, description="seeds of each variant's runs")
    jobs: Count = Field(1, description="runs at a time")
    overrides: tuple[str, ...] = Field(
        (), description="key=value settings of every run, which win over the settings file's"
    )
    launcher: tuple[str, ...] = Field(
        (sys.executable, "-m", "vogue", "train"), min_length=1, description="what starts a run"
    )

    @model_validator(mode="after")
    def _seeds_differ(self) -> "Sweep":
        if twice := [seed for seed, count in Counter(self.seeds).items() if count > 1]:
            raise ValueError(f"seeds={list(self.seeds)}: {twice[0]} is there more than once")
        return self

    @model_validator(mode="after")
    def _baselines_are_variants(self) -> "Sweep":
        for name, other in self.baselines.items():
            if unknown := {name, other} - self.variants.keys():
                raise ValueError(f"baselines: {name}: there is no variant {', '.join(sorted(unknown))}")
            if other in self.baselines:
                raise ValueError(f"baselines: {name}: {other} is compared with {self.baselines[other]} itself")
        return self


@dataclass(frozen=True)
class Run:
    """One run; `arguments` are the `vogue train` command's, `config` what they make."""

    variant: str
    seed: int
    arguments: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.variant}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.trainer.output_dir

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> bool:
        evaluations = read_rows(self.folder / "evaluations.jsonl")
        if not evaluations:
            return False
        return evaluations[-1]["step"] == (self.config.trainer.steps or logs.steps_of(self.folder))

    @property
    def resumable(self) -> bool:
        return bool(checkpoints(self.folder / "checkpoints"))


def load_sweep(path: str, jobs: int | None = None) -> Sweep:
    """Read a sweep's YAML file; `jobs` takes the place of its own. Raises `ConfigError`, a line per wrong setting."""
    return check(Sweep, read_settings(path, []) | ({} if jobs is None else {"jobs": jobs}), "vogue sweep")


def plan(sweep: Sweep, overrides: list[str]) -> list[Run]:
    """Every run in the order of its turn, its settings checked; a variant's stand over `overrides` of every run."""
    runs = []
    for seed in sweep.seeds:
        for variant, own in sweep.variants.items():
            given = [*sweep.overrides, *overrides, *own]
            if taken := [text for text in given if text.partition("=")[0] in OWN]:
                raise ConfigError(f"variant {variant}: {taken[0]}: a sweep sets {' and '.join(OWN)} itself")
            given += [f"seed={seed}", f"trainer.output_dir={sweep.output_dir / variant / f'seed_{seed}'}"]
            try:
                config = load_config(sweep.settings, given)
            except ConfigError as error:
                raise ConfigError(f"variant {variant}: {error}") from None
            runs.append(Run(variant, seed, (str(sweep.settings), *given), config))
    _check_comparable(runs, sweep)
    return runs


def _check_comparable(runs: list[Run], sweep: Sweep) -> None:
    if not runs[0].config.trainer.eval_every:
        raise ConfigError("trainer.eval_every is not set: a sweep compares held-out evaluations")
    settings_of = {one.variant: logs.flatten(one.config) for one in reversed(runs)}
    # The model of a run's checkpoint counts as what that run began with.
    model_of = {variant: stages_of(settings["model.path"])[0] for variant, settings in settings_of.items()}
    first, baselines = runs[0].variant, sweep_table.baselines_of(sweep.variants, sweep.baselines)
    for one in runs:
        settings, baseline = logs.flatten(one.config), baselines[one.variant]
        model, _ = stages_of(settings["model.path"])
        compared = [(key, settings[key], settings_of[first][key], first) for key in SHARED]
        for key, here, there, other in [("model.path", model, model_of[baseline], baseline), *compared]:
            if here != there:
                raise ConfigError(
                    f"variant {one.variant}: {key}={here}, but {other} has {there}: a variant and what it is compared "
                    "with must start from one model, or from checkpoints of runs that did, and all be evaluated on the "
                    "same problems"
                )


def run(sweep: Sweep, overrides: list[str], command: str, console: Console) -> int:
    """Do what isn't done yet and show the table; returns the exit code. `command`: as it was typed, for table.md."""
    runs = plan(sweep, overrides)
    if shutil.which(sweep.launcher[0]) is None:
        raise ConfigError(f"launcher: there is no command {sweep.launcher[0]}")
    sweep.output_dir.mkdir(parents=True, exist_ok=True)
    with _locked(sweep.output_dir) as lock, _terminated_as_interrupted():
        for one in runs:
            _check_folder(one)
        waiting = [one for one in runs if not one.done]
        if len(waiting) < len(runs):
            console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
        try:
            failed = _work(waiting, sweep, lock, console)
        except KeyboardInterrupt:
            done = sum(one.done for one in runs)
            console.print(f"stopped: {done} of {len(runs)} runs are done; the same command goes on")
            return STOPPED
    for one, code in failed:
        why = f"failed with exit code {code}" if code else "ended before its last evaluation"
        console.print(f"\n{one.name} {why}; {one.log} ends with:", style="red", soft_wrap=True)
        for line in one.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if any(one.done for one in runs):
        compared = _compared(runs, sweep)
        sweep_table.show(compared, len(sweep.seeds), console)
        _write(compared, sweep, command)
        console.print(f"table: {sweep.output_dir / 'table.md'}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


def show_table(sweep: Sweep, overrides: list[str], console: Console) -> int:
    """Show the table of the runs that are done; returns the exit code."""
    runs = plan(sweep, overrides)
    for one in runs:
        _check_folder(one)
    if not any(one.done for one in runs):
        raise ConfigError(f"no run in {sweep.output_dir} is done yet")
    sweep_table.show(_compared(runs, sweep), len(sweep.seeds), console)
    return 0


# ----------------------------------------------------------------------------------------------------------- runs


def _check_folder(one: Run) -> None:
    """Raise `ConfigError` where the run's folder holds another one, which would end in this table or be lost."""
    if parts(one.folder / "metrics.jsonl") and (told := logs.changes(one.config, logs.HARMLESS)):
        raise ConfigError(f"{one.folder} holds another run than this sweep's: {told}; choose another output_dir")


def _work(waiting: list[Run], sweep: Sweep, lock: IO, console: Console) -> list[tuple[Run, int]]:
    """Do the runs, `jobs` at a time; returns those that failed, with their exit codes. No process outlives it."""
    queue, running, failed = deque(waiting), [], []
    environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // sweep.jobs))} | os.environ
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, speed_estimate_period=1e9) as progress:
        task = progress.add_task("", total=len(waiting))
        try:
            while queue or running:
                while queue and len(running) < sweep.jobs:
                    one = queue.popleft()
                    running.append((one, _start(one, sweep.launcher, lock, environment)))
                progress.update(task, description=", ".join(one.name for one, _ in running))
                time.sleep(0.1)
                for one, process in [item for item in running if item[1].poll() is not None]:
                    running.remove((one, process))
                    _end([process])
                    if process.returncode or not one.done:
                        failed.append((one, process.returncode))
                        progress.console.print(f"{one.name} failed", style="red")
                    progress.advance(task)
        except KeyboardInterrupt:
            progress.console.print(f"stopping: runs may end their step within {GRACE} s; Ctrl-C again stops at once")
            raise
        finally:
            _end([process for _, process in running])
    return failed


def _start(one: Run, launcher: tuple[str, ...], lock: IO, environment: dict[str, str]) -> subprocess.Popen:
    """Start or resume a run, in a process group of its own, so that it can be ended with all that it starts."""
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if one.resumable else []
    if not resume:  # steps without a checkpoint are lost; with this file `vogue train` would refuse to start over
        for file in parts(one.folder / "metrics.jsonl"):
            file.unlink()
    with open(one.log, "a" if resume else "w") as log:
        return subprocess.Popen(
            [*launcher, *one.arguments, *resume],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=[lock.fileno()],  # no second sweep beside what a killed one left running
        )


def _end(processes: list[subprocess.Popen]) -> None:
    """End the processes' groups: politely first, then, also after a further interrupt, all that is left of them."""
    try:
        for process in processes:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def _locked(folder: Path) -> Iterator[IO]:
    """The file whose lock says that a sweep works in `folder`; raises `ConfigError` where another one does."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another `vogue sweep`, or a run that one left behind, works in {folder}") from None
        yield lock


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP act as Ctrl-C does, unless they are handled or ignored already."""
    handled = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------- table


def _compared(runs: list[Run], sweep: Sweep) -> dict:
    outcomes = {one.variant: {} for one in runs}
    for one in runs:
        if one.done:
            _, before = stages_of(one.config.model.path)
            outcomes[one.variant][one.seed] = sweep_table.read_outcome(one.folder, before)
    return sweep_table.compare(outcomes, sweep.baselines)


def _write(compared: dict, sweep: Sweep, command: str) -> None:
    """table.json and table.md."""
    machine = doctor.machine() | {"GPUs": ", ".join(doctor.nvidia_gpus().value) or "none", "jobs": str(sweep.jobs)}
    made = {"command": command, "machine": machine, "versions": doctor.versions()}
    (sweep.output_dir / "table.json").write_text(json.dumps(made | compared, indent=1) + "\n")
    described = ["; ".join(f"{name} {text}" for name, text in part.items()) for part in (machine, made["versions"])]
    text = "\n\n".join([f"`{command}`", sweep_table.markdown(compared, len(sweep.seeds)), *described])
    (sweep.output_dir / "table.md").write_text(text + "\n")
    plot_differences({"": compared}, sweep.output_dir / "differences.png")
