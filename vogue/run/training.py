"""A training run from its settings to its checkpoint: `vogue train`.

Everything that can be wrong with settings or data is looked for before the first step.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from vogue import distributed
from vogue.config import Config
from vogue.data import DataError, Sample, Samples
from vogue.data.dataset import Checked, check_samples, test_samples, training_samples, was_decoded
from vogue.evaluate import evaluation_row, headline
from vogue.groups import Group
from vogue.inputs import Preprocessor
from vogue.model import checkpoint
from vogue.report import plot_curves
from vogue.run import logs, preflight
from vogue.run.folder import FolderError, locked, read_rows, writing
from vogue.run.records import records
from vogue.run.stacks import Stacks
from vogue.run.stalled import Stalled
from vogue.run.stopping import STOPPED, Stop
from vogue.settings import ConfigError
from vogue.trainer import FAILURES, Trainer

LOOKED_AT = 10  # samples that tell whether there are images


def run(config: Config, resume: str | None, profile: frozenset[int] = frozenset()) -> int:
    """Train; returns the exit code, `stopping.STOPPED` where SIGINT or SIGTERM stopped it after a step.

    Every rank calls it, rank 0 shows and writes. `resume`: the checkpoint to go on from, by its name, the newest one
    for ""; None for a new run. `profile`: steps whose torch profiler trace, of each rank, goes into the run's folder.
    """
    rank, *_ = distributed.start(config.trainer.timeout)
    folder, stop, console = config.trainer.output_dir, Stop(), Console()
    with ExitStack() as held:
        found = preflight.examine(config, resume is not None)
        preprocessor, data, held_out = _without_problems(found, config)
        if rank == 0:
            preflight.warn(found, console)
        with distributed.together(ConfigError):
            if rank == 0:
                held.enter_context(locked(folder))
                logs.check_folder(config, resume is not None)  # another run may have been here meanwhile
                checkpoint.clear(folder / "checkpoints")
        trainer = Trainer(config, data, preprocessor, resume)
        with distributed.together(ConfigError, FolderError):
            log = held.enter_context(_prepared(trainer, resume, console)) if rank == 0 else None
        stacks = held.enter_context(Stacks(folder, rank, config.trainer.timeout))
        with stop, distributed.heeding_losses():
            events = _events(trainer, held_out, profile, stop, stacks)
            if log is None:
                for _ in events:
                    pass
            else:
                _log(events, trainer, log, stop)
    if rank == 0:
        _tell_end(trainer, console)
    return 0 if trainer.step >= config.trainer.steps else STOPPED


def check(config: Config, resume: str | None) -> int:
    """Look for all that is wrong and show what isn't, without training; returns the exit code."""
    rank, *_ = distributed.start(config.trainer.timeout)
    found = preflight.examine(config, resume is not None)
    _, data, held_out = _without_problems(found, config)
    found.fine["data"] = f"{len(data.samples)} samples to train on, {len(held_out)} held out"
    if rank == 0:
        preflight.show(found, Console())
    return 0


def _without_problems(found: preflight.Preflight, config: Config) -> tuple[Preprocessor, Checked, Sequence[Sample]]:
    """What a run goes on with; raises `ConfigError` with all problems of all ranks, those of the data last."""
    preprocessor, problems = found.preprocessor, distributed.gather(found.problems)
    found.problems = list(dict.fromkeys(text for part in problems for text in part))
    usable = all(distributed.gather(preprocessor is not None))
    data = found.of(load_data, config, preprocessor) if usable else found.of(training_samples, config.data)
    with distributed.together(ConfigError):
        if found.problems:
            raise ConfigError("\n".join(found.problems))
    return cast(Preprocessor, preprocessor), *cast(tuple[Checked, Sequence[Sample]], data)


def _prepared(trainer: Trainer, resume: str | None, console: Console) -> logs.RunLog:
    """The log of a run that goes on where the trainer stands, in a folder without what came after that."""
    config = trainer.config
    if resume is not None and trainer.step == 0:
        console.print(f"--resume: there is no checkpoint in {trainer.checkpoints}: the run begins anew", soft_wrap=True)
    with writing("the logs", config.trainer.output_dir):
        checkpoint.forget_after(trainer.checkpoints, trainer.step)
        logs.prepare(config, trainer.step)
        return logs.RunLog(config, trainer.step, console)


def _log(events: Iterator["Step | Evaluation"], trainer: Trainer, log: logs.RunLog, stop: Stop) -> None:
    """Write down and show what happens; where that fails, the run stops as at a signal, and raises `FolderError`."""
    config, tokenizer, failed = trainer.config, trainer.processor.tokenizer, None
    folder, stalled = config.trainer.output_dir, Stalled(config)
    for event in events:
        try:
            with writing("the logs", folder):
                if isinstance(event, Step):
                    rows = records(event.step, event.groups, config.trainer.log_completions, tokenizer, folder)
                    log.step(event.step, event.metrics, rows)
                    if reasons := stalled.reasons(event.metrics):
                        log.warn(reasons)
                else:
                    log.evaluation(event.step, event.record)
        except FolderError as error:
            failed, stop.asked = failed or error, True
    if failed:
        raise failed


def _tell_end(trainer: Trainer, console: Console) -> None:
    """Say where everything is."""
    steps = trainer.config.trainer.steps
    if trainer.step == 0:
        console.print("stopped before the first step; the same command starts anew")
    elif trainer.step < steps:
        console.print(f"stopped after {trainer.step} of {steps} steps; --resume goes on from there")
    else:
        _show(trainer.config, console)


@dataclass(frozen=True)
class Step:
    """Step number `step` was done; metrics are of all ranks, groups of this one."""

    step: int
    metrics: dict[str, float]
    groups: list[Group]


@dataclass(frozen=True)
class Evaluation:
    """What the held-out problems got after `step` steps: see `vogue.evaluate.evaluation_row`."""

    step: int
    record: dict


def _events(
    trainer: Trainer, held_out: Sequence[Sample], profile: frozenset[int], stop: Stop, stacks: Stacks
) -> Iterator[Step | Evaluation]:
    """The run: steps, evaluations before, between and after them, and checkpoints, one more where it stops or fails."""
    settings, saved = trainer.config.trainer, trainer.step
    try:
        while True:
            stacks.rearm()
            if held_out and _evaluates(trainer):
                yield Evaluation(trainer.step, evaluation_row(trainer.evaluate(held_out)))
                trainer.state.current["evaluated"] = trainer.step
            last = trainer.step >= settings.steps
            if trainer.step > saved and (last or (settings.save_every and trainer.step % settings.save_every == 0)):
                trainer.save()
                saved = trainer.step
            if last or distributed.largest([int(stop.asked)], trainer.device)[0]:
                break
            with _traced(trainer, trainer.step in profile):
                metrics, groups = trainer.run_step()
            yield Step(trainer.step - 1, metrics, groups)
    except FAILURES as error:
        raise _with_checkpoint(error, trainer, saved) from error
    if trainer.step > saved:
        trainer.save()


def _evaluates(trainer: Trainer) -> bool:
    """Whether an evaluation is due: before the first step, after the last one, and every so many between them."""
    settings, step = trainer.config.trainer, trainer.step
    due = step >= settings.steps or step % settings.eval_every == 0
    return due and trainer.state.current.get("evaluated") != step


def _with_checkpoint(error: Exception, trainer: Trainer, saved: int) -> Exception:
    """Save what the failed step or evaluation began with, on all ranks; returns the error with the way on."""
    told = f"{error}\nstopped after {trainer.step} of {trainer.config.trainer.steps} steps; --resume goes on from there"
    try:
        if trainer.step > saved:
            trainer.save()
    except FolderError as unsaved:
        return FolderError(f"{error}\n{unsaved}")
    return type(error)(told)


@contextmanager
def _traced(trainer: Trainer, wanted: bool) -> Iterator[None]:
    """Write profile/step_000003_rank0.json, for chrome://tracing or Perfetto, of what the block does."""
    if not wanted:
        yield
        return
    folder = trainer.config.trainer.output_dir / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{trainer.step:06d}_rank{trainer.rank}.json"
    with torch.profiler.profile() as trace:
        yield
    trace.export_chrome_trace(str(path))


def load_data(config: Config, preprocessor: Preprocessor) -> tuple[Checked, Sequence[Sample]]:
    """Checked training samples, and held-out ones where they are evaluated during the run.

    Each rank looks at its share of them. Raises DataError that names all that can't be used.
    """
    rank, ranks, _ = distributed.start(config.trainer.timeout)
    with distributed.together(ConfigError, DataError):
        samples = training_samples(config.data)
    console = Console(quiet=rank > 0)
    with console.status(f"looking at {len(samples)} samples"):
        data = _checked(samples, config, preprocessor, rank, ranks, console)
    if any(sample.images for sample in data.samples[:LOOKED_AT]) and not was_decoded(data.fingerprint):
        console.print("images of data.train are decoded as they are met; `vogue data check` finds broken ones before")
    if not (config.trainer.eval_every and config.data.test):
        return data, []
    with distributed.together(ConfigError, DataError):
        held_out = test_samples(config.data)
    held_out = _checked(held_out, config, preprocessor, rank, ranks, console)
    both = len(set(data.digests) & set(held_out.digests))
    if both:
        console.print(f"warning: {both} of {len(held_out.samples)} samples of data.test are in data.train too")
    return data, held_out.samples


def _checked(
    samples: Samples, config: Config, preprocessor: Preprocessor, rank: int, ranks: int, console: Console
) -> Checked:
    def tell(text: str) -> None:
        console.print(f"{samples.spec}: {text}", soft_wrap=True)

    drop = config.data.overlong == "drop"
    return check_samples(samples, preprocessor.lengths, drop, tell, distributed.gather, rank, ranks)


def _show(config: Config, console: Console) -> None:
    """Draw the curves, show how held-out pass@k went, and say where everything is."""
    folder = config.trainer.output_dir
    plot_curves([folder], folder / "curves.png")
    if rows := read_rows(folder / "evaluations.jsonl"):
        shown = [headline(row) for row in rows]
        names = [*dict.fromkeys(name for estimates in shown for name in estimates)]
        table = Table("steps", *names, title="held-out problems, 95% intervals")
        for row, estimates in zip(rows, shown, strict=True):
            table.add_row(str(row["step"]), *(str(estimates.get(name, "")) for name in names))
        console.print(table)
    newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
    for name, path in {
        "curves": folder / "curves.png",
        "metrics": folder / "metrics.jsonl",
        "completions": folder / "completions.jsonl",
        "adapter": newest / checkpoint.ADAPTER,
        "model": newest / checkpoint.HF,
    }.items():
        if path.exists():
            console.print(f"{name:12} {path}")
