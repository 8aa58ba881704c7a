"""A training run from its settings to its checkpoint: `vogue train`.

Everything that can be wrong with settings or data is looked for before the first step.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from vogue import distributed, logs, preflight
from vogue.config import Config
from vogue.data import Sample, Samples
from vogue.data.dataset import Checked, check_samples, test_samples, training_samples, was_decoded
from vogue.evaluate import evaluation_row, headline
from vogue.groups import Group
from vogue.inputs import Preprocessor
from vogue.records import records
from vogue.report import plot_curves
from vogue.run_folder import read_rows
from vogue.settings import ConfigError
from vogue.stopping import STOPPED, Stop
from vogue.trainer import Trainer

LOOKED_AT = 10  # samples that tell whether there are images


def run(config: Config, resume: bool, profile: frozenset[int] = frozenset()) -> int:
    """Train; returns the exit code, `stopping.STOPPED` where SIGINT or SIGTERM stopped it after a step.

    Every rank calls it, rank 0 shows and writes. `profile`: steps whose torch profiler trace, of each rank, goes into
    the run's folder.
    """
    found = preflight.examine(config, resume)
    preprocessor, data, held_out = _without_problems(found, config)
    trainer = Trainer(config, data, preprocessor, resume)
    with Stop() as stop:
        events = _events(trainer, held_out, profile, stop)
        if trainer.rank > 0:
            for _ in events:
                pass
        else:
            _log(events, trainer)
    return 0 if trainer.step >= config.trainer.steps else STOPPED


def check(config: Config, resume: bool) -> int:
    """Look for all that is wrong and show what isn't, without training; returns the exit code."""
    found = preflight.examine(config, resume)
    _, data, held_out = _without_problems(found, config)
    found.fine["data"] = f"{len(data.samples)} samples to train on, {len(held_out)} held out"
    if os.environ["RANK"] == "0":
        preflight.show(found, Console())
    return 0


def _without_problems(found: preflight.Preflight, config: Config) -> tuple[Preprocessor, Checked, Sequence[Sample]]:
    """What a run goes on with; raises `ConfigError` with all problems, those of the data last."""
    preprocessor = found.preprocessor
    data = found.of(load_data, config, preprocessor) if preprocessor else found.of(training_samples, config.data)
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    return cast(Preprocessor, preprocessor), *cast(tuple[Checked, Sequence[Sample]], data)


def _log(events: Iterator["Step | Evaluation"], trainer: Trainer) -> None:
    """Write down and show what happens, and say at the end where everything is."""
    config, tokenizer, console = trainer.config, trainer.processor.tokenizer, Console()
    logs.prepare(config, trainer.step)
    with logs.RunLog(config, trainer.step, console) as log:
        for event in events:
            if isinstance(event, Step):
                count, folder = config.trainer.log_completions, config.trainer.output_dir
                rows = records(event.step, event.groups, count, tokenizer, folder)
                log.step(event.step, event.metrics, rows)
            else:
                log.evaluation(event.step, event.record)
    if trainer.step == 0:
        console.print("stopped before the first step; the same command starts anew")
    elif trainer.step < config.trainer.steps:
        console.print(f"stopped after {trainer.step} of {config.trainer.steps} steps; --resume goes on from there")
    else:
        _show(config, console)


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
    trainer: Trainer, held_out: Sequence[Sample], profile: frozenset[int], stop: Stop
) -> Iterator[Step | Evaluation]:
    """The run: steps, evaluations before, between and after them, and checkpoints, one more where it stops."""
    settings, saved = trainer.config.trainer, trainer.step
    if held_out and trainer.step == 0:
        yield Evaluation(0, evaluation_row(trainer.evaluate(held_out)))
    while trainer.step < settings.steps:
        if distributed.largest([int(stop.asked)], trainer.device)[0]:
            if trainer.step > saved:
                trainer.save()
            return
        with _traced(trainer, trainer.step in profile):
            metrics, groups = trainer.run_step()
        yield Step(trainer.step - 1, metrics, groups)
        last = trainer.step == settings.steps
        if held_out and (last or trainer.step % settings.eval_every == 0):
            yield Evaluation(trainer.step, evaluation_row(trainer.evaluate(held_out)))
        if last or (settings.save_every and trainer.step % settings.save_every == 0):
            trainer.save()
            saved = trainer.step


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
    samples = training_samples(config.data)
    rank, ranks, _ = distributed.start()
    console = Console(quiet=rank > 0)
    settings = config.data
    with console.status(f"looking at {len(samples)} samples"):
        data = _checked(samples, config, preprocessor, rank, ranks, console)
    if any(sample.images for sample in data.samples[:LOOKED_AT]) and not was_decoded(data.fingerprint):
        console.print("images of data.train are decoded as they are met; `vogue data check` finds broken ones before")
    if not (config.trainer.eval_every and settings.test):
        return data, []
    held_out = _checked(test_samples(config.data), config, preprocessor, rank, ranks, console)
    both = len(set(data.digests) & set(held_out.digests))
    if both:
        console.print(f"warning: {both} of {len(held_out.samples)} samples of data.test are in data.train too")
    return data, held_out.samples


def _checked(
    samples: Samples, config: Config, preprocessor: Preprocessor, rank: int, ranks: int, console: Console
) -> Checked:
    drop = config.data.overlong == "drop"
    return check_samples(samples, preprocessor.lengths, drop, console.print, distributed.gather, rank, ranks)


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
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    for name, path in {
        "curves": folder / "curves.png",
        "metrics": folder / "metrics.jsonl",
        "completions": folder / "completions.jsonl",
        "model": newest / "hf",
    }.items():
        console.print(f"{name:12} {path}")
