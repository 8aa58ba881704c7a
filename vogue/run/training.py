"""A training run from its settings to its checkpoint: `vogue train`.

Everything that can be wrong with settings or data is looked for before the first step.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from vogue import distributed
from vogue.config import Config, with_steps
from vogue.data import DataError, Sample, Samples
from vogue.data.dataset import Checked, Offender, check_samples, test_samples, training_samples, was_decoded
from vogue.evaluate import FAILURES, evaluation_row, headline
from vogue.inputs import Preprocessor
from vogue.model import checkpoint
from vogue.run import errors, kept_checkpoints, launch, logs, preflight, save_schedule, shared_folder
from vogue.run.completion_records import records
from vogue.run.folder import NEWEST_WHOLE, FolderError, locked, read_rows, writing
from vogue.run.stacks import Stacks
from vogue.run.stalled import Stalled
from vogue.run.stopping import LOST, STOPPED, Stop
from vogue.settings import ConfigError
from vogue.step.groups import Group
from vogue.trainer import Trainer

LOOKED_AT = 10  # samples that tell whether there are images
EPOCHS = "epochs"


def run(config: Config, resume: str | None, profile: frozenset[int] = frozenset()) -> int:
    """Train; returns the exit code: `STOPPED` where a signal stopped it after a step, `LOST` where its launcher ended.

    Every rank calls it, rank 0 shows and writes. `resume`: the checkpoint to go on from, by its name, the newest one
    for ""; None for a new run. `profile`: steps whose torch profiler trace, of each rank, goes into the run's folder.
    """
    rank, *_ = distributed.start(config.trainer.timeout)
    folder, stop, console = config.trainer.output_dir, Stop(), Console()
    with distributed.heeding_losses(), ExitStack() as held:
        resume = _again(folder, resume)
        found = preflight.examine(config, resume is not None)
        preprocessor, data, held_out = _without_problems(found, config)
        if rank == 0:
            preflight.warn(found, console)
            if told := found.fine.get(EPOCHS):
                console.print(f"trainer.epochs={told}", soft_wrap=True)
        request = held.enter_context(save_schedule.Request(folder, rank))
        with distributed.together(ConfigError):
            if rank == 0:
                held.enter_context(locked(folder))
                logs.check_folder(config, resume is not None)  # another run may have been here meanwhile
                launch.leave_name(folder)
                kept_checkpoints.clear(folder / "checkpoints")
        stacks = held.enter_context(Stacks(folder, rank, config.trainer.timeout))
        stacks.rearm()
        trainer = Trainer(config, data, preprocessor, resume)
        with distributed.together(ConfigError, FolderError):
            log = held.enter_context(_prepared(trainer, resume, console)) if rank == 0 else None
        with stop:
            events = _events(trainer, held_out, profile, stop, request, stacks)
            if log is None:
                for _ in events:
                    pass
            else:
                _log(events, trainer, log, stop)
    if rank == 0:
        _tell_end(trainer, console)
    if trainer.step >= trainer.config.trainer.steps:
        return 0
    return LOST if stop.is_orphaned else STOPPED


def _again(folder: Path, resume: str | None) -> str | None:
    """`resume`; the newest whole checkpoint where torchrun starts again what it has started as a new run.

    Its command is the same then, without --resume. All ranks call; only torchrun on a rank's own node counts restarts.
    """
    mine = distributed.gather((launch.attempt(), launch.rank() == 0 and launch.has_begun(folder)))
    is_again = resume is None and any(attempts for attempts, _ in mine) and mine[0][1]
    return NEWEST_WHOLE if is_again else resume


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
    found.problems += shared_folder.problems(config.trainer.output_dir)
    preprocessor, problems = found.preprocessor, distributed.gather(found.problems)
    found.problems = list(dict.fromkeys(text for part in problems for text in part))
    usable = all(distributed.gather(preprocessor is not None))
    data = found.of(load_data, config, preprocessor) if usable else found.of(training_samples, config.data)
    checked = cast(tuple[Checked, Sequence[Sample]], data)
    if usable and data and config.trainer.epochs:
        count = len(checked[0].samples)
        if counted := found.of(with_steps, config, count):
            found.fine[EPOCHS] = f"{config.trainer.epochs:g} of {count} samples are {counted.trainer.steps} steps"
    with distributed.together(ConfigError):
        if found.problems:
            raise ConfigError("\n".join(found.problems))
    return cast(Preprocessor, preprocessor), *checked


def _prepared(trainer: Trainer, resume: str | None, console: Console) -> logs.RunLog:
    """The log of a run that goes on where the trainer stands, in a folder without what came after that."""
    config = trainer.config
    if resume is not None and trainer.step == 0:
        console.print(f"--resume: there is no checkpoint in {trainer.checkpoints}: the run begins anew", soft_wrap=True)
    with writing("the logs", config.trainer.output_dir):
        kept_checkpoints.forget_after(trainer.checkpoints, trainer.step)
        if trainer.checkpoints.is_dir():
            kept_checkpoints.mark_best(trainer.checkpoints, trainer.state)
        logs.prepare(config, trainer.step)
        return logs.RunLog(config, trainer.step, console)


def _log(events: Iterator["Step | Evaluation | Saved"], trainer: Trainer, log: logs.RunLog, stop: Stop) -> None:
    """Write down and show what happens, and do what is to be done after a checkpoint.

    Where the logs can't be written the run stops as at a signal, and raises `FolderError`.
    """
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
                elif isinstance(event, Saved):
                    if told := save_schedule.run_command(config, event.folder):
                        log.warn(told)
                else:
                    log.evaluation(event.step, event.record)
        except FolderError as error:
            failed, stop.asked = failed or error, True
    if failed:
        raise failed


def _tell_end(trainer: Trainer, console: Console) -> None:
    """Say where everything is, and send the model where it is to go."""
    steps = trainer.config.trainer.steps
    if trainer.step == 0:
        console.print("stopped before the first step; the same command starts anew")
    elif trainer.step < steps:
        console.print(f"stopped after {trainer.step} of {steps} steps; {_way_on(trainer)}", soft_wrap=True)
    else:
        _show(trainer, console)
        if repository := trainer.config.trainer.push_to_hub:
            newest = kept_checkpoints.checkpoints(trainer.checkpoints)[-1]
            sent = kept_checkpoints.best_of(trainer.checkpoints) or newest
            told = save_schedule.push(repository, checkpoint.usable(sent), kept_checkpoints.step_of(sent))
            console.print(told, soft_wrap=True)


def _way_on(trainer: Trainer) -> str:
    """What can be done with the checkpoint of a run that has stopped."""
    if not trainer.config.trainer.save_model_only:
        return "--resume goes on from there"
    found = kept_checkpoints.checkpoints(trainer.checkpoints)
    where = f"its weights are in {checkpoint.usable(found[-1])}, " if found else ""
    return f"{where}no run can go on from there, with trainer.save_model_only=true"


@dataclass(frozen=True)
class Step:
    """Step number `step` was done; metrics are of all ranks, groups of this one."""

    step: int
    metrics: dict[str, float]
    groups: list[Group]


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written to `folder`."""

    folder: Path


@dataclass(frozen=True)
class Evaluation:
    """What the held-out problems got after `step` steps: see `vogue.evaluate.evaluation_row`."""

    step: int
    record: dict


def _events(
    trainer: Trainer,
    held_out: Sequence[Sample],
    profile: frozenset[int],
    stop: Stop,
    request: save_schedule.Request,
    stacks: Stacks,
) -> Iterator[Step | Evaluation | Saved]:
    """The run: steps, evaluations before, between and after them, and checkpoints, one more where it stops or fails."""
    settings, saved = trainer.config.trainer, trainer.step
    schedule = save_schedule.Schedule(trainer.config, trainer.device, request)
    try:
        while True:
            stacks.rearm()
            is_best = False
            if held_out and _evaluates(trainer):
                row = evaluation_row(trainer.evaluate(held_out))
                yield Evaluation(trainer.step, row)
                trainer.state.current["evaluated"] = trainer.step
                is_best = _note_best(trainer, row)
            if trainer.step > saved and (schedule.due(trainer.step) or is_best):
                yield Saved(trainer.save())
                saved = trainer.step
                schedule.saved()
            elif is_best:  # a run that has gone on from this step's checkpoint has made up for its evaluation
                _mark_best(trainer)
            last = trainer.step >= settings.steps
            if last or distributed.largest([int(stop.asked)], trainer.device)[0]:
                break
            with _traced(trainer, trainer.step in profile):
                metrics, groups = trainer.run_step()
            yield Step(trainer.step - 1, metrics, groups)
            if trainer.distrust:
                raise trainer.distrust
    except FAILURES as error:
        folder, told = _with_checkpoint(error, trainer, saved)
        if folder:
            yield Saved(folder)
        raise told from error
    if trainer.step > saved:
        yield Saved(trainer.save())
        schedule.saved()


def _note_best(trainer: Trainer, row: dict) -> bool:
    """Let the run's state know the best checkpoint after an evaluation; returns whether it is the one of this step."""
    found = save_schedule.better(row, trainer.step, trainer.config, trainer.state.current.get(kept_checkpoints.BEST))
    if found is None:
        return False
    trainer.state.current[kept_checkpoints.BEST] = found
    return True


def _mark_best(trainer: Trainer) -> None:
    """Let the link to the best checkpoint follow the run's state; every rank calls."""
    with distributed.together(FolderError), writing("the link to the best checkpoint", trainer.checkpoints):
        if trainer.rank == 0:
            kept_checkpoints.mark_best(trainer.checkpoints, trainer.state)


def _evaluates(trainer: Trainer) -> bool:
    """Whether an evaluation is due: before the first step, after the last one, and every so many between them."""
    settings, step = trainer.config.trainer, trainer.step
    due = step >= settings.steps or step % settings.eval_every == 0
    return due and trainer.state.current.get("evaluated") != step


def _with_checkpoint(error: Exception, trainer: Trainer, saved: int) -> tuple[Path | None, Exception]:
    """Save what the failed step or evaluation began with, on all ranks; returns where, and the error with a way on."""
    try:
        folder = trainer.save() if trainer.step > saved else None
    except FolderError as unsaved:
        return None, FolderError(f"{error}\n{unsaved}")
    stopped = f"stopped after {trainer.step} of {trainer.config.trainer.steps} steps"
    return folder, errors.reworded(error, f"{error}\n{stopped}; {_way_on(trainer)}")


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
    if any(sample.images or sample.videos for sample in data.samples[:LOOKED_AT]) and not was_decoded(data.fingerprint):
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

    def gather(mine: list) -> list[list]:
        return distributed.gather(mine, Offender)

    drop = config.data.overlong == "drop"
    return check_samples(samples, preprocessor.lengths, drop, tell, gather, rank, ranks)


def _show(trainer: Trainer, console: Console) -> None:
    """Draw the curves, show how held-out pass@k went, and say where everything is."""
    from vogue.report import plot_curves  # slow to import, and of no rank but this one

    config = trainer.config
    folder = config.trainer.output_dir
    plot_curves([folder], folder / "curves.png")
    if rows := read_rows(folder / "evaluations.jsonl"):
        shown = [headline(row) for row in rows]
        names = [*dict.fromkeys(name for estimates in shown for name in estimates)]
        table = Table("steps", *names, title="held-out problems, 95% intervals")
        for row, estimates in zip(rows, shown, strict=True):
            table.add_row(str(row["step"]), *(str(estimates.get(name, "")) for name in names))
        console.print(table)
    newest = kept_checkpoints.checkpoints(folder / "checkpoints")[-1]
    for name, path in {
        "curves": folder / "curves.png",
        "metrics": folder / "metrics.jsonl",
        "completions": folder / "completions.jsonl",
        "adapter": newest / checkpoint.ADAPTER,
        "model": newest / checkpoint.HF,
    }.items():
        if path.exists():
            console.print(f"{name:12} {path}")
    if known := trainer.state.current.get(kept_checkpoints.BEST):
        told = save_schedule.told_best(known, trainer.checkpoints)
        console.print(f"{kept_checkpoints.BEST:12} {told}", soft_wrap=True)
