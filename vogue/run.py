"""A training run from its settings to its checkpoint: `vogue train`.

Everything that can be wrong with settings or data is looked for before the first step.
"""

import random
from collections.abc import Iterator

from rich.console import Console

from vogue import distributed, logs
from vogue.config import Config
from vogue.data import Sample, check_images, load_samples
from vogue.evaluate import summary
from vogue.report import plot_curves
from vogue.trainer import Group, Trainer


def run(config: Config, resume: bool) -> int:
    """Train; returns the exit code. Every rank calls it, rank 0 shows and writes."""
    console = Console()
    samples, held_out = _samples(config)
    rank, _, _ = distributed.start()
    if rank == 0 and not resume:
        logs.check_new(config)
    trainer = Trainer(config, samples, resume)
    if rank == 0:
        logs.prepare(config, trainer.step)
        log = logs.RunLog(config, trainer.step, console)
    try:
        for metrics, groups in _steps(trainer, held_out):
            if rank == 0:
                log.step(trainer.step - 1, metrics, _records(groups, config))
    finally:
        if rank == 0:
            log.close()
    if rank == 0:
        _show(config, console)
    return 0


def _steps(trainer: Trainer, held_out: list[Sample]) -> Iterator[tuple[dict[str, float], list[Group]]]:
    settings = trainer.config.trainer
    while trainer.step < settings.steps:
        metrics, groups = trainer.run_step()
        last = trainer.step == settings.steps
        if settings.eval_every and (last or trainer.step % settings.eval_every == 0):
            estimates = summary(trainer.evaluate(held_out, settings.eval_samples))
            metrics |= {f"eval/{name}": estimate.value for name, estimate in estimates.items()}
        yield metrics, groups
        if last or (settings.save_every and trainer.step % settings.save_every == 0):
            trainer.save()


def _samples(config: Config) -> tuple[list[Sample], list[Sample]]:
    """Training samples, and held-out ones where they are evaluated during the run; every image is opened once."""
    samples = load_samples(config.data.train, config.data.limit)
    held_out = load_samples(config.data.test) if config.trainer.eval_every else []
    check_images(samples)
    check_images(held_out)
    return samples, held_out


def _records(groups: list[Group], config: Config) -> list[dict]:
    """A few completions of a step, drawn at random, for completions.jsonl."""
    rows = [
        {
            "problem": group.item.prompt.sample.problem,
            "answer": group.item.prompt.sample.answer,
            "completion": completion.text,
            "branch": "noisy" if group.noisy else "raw",
            "reward": score.reward,
            "accuracy": score.accuracy,
            "advantage": advantage,
        }
        for group in groups
        for completion, score, advantage in zip(group.completions, group.scores, group.advantages, strict=True)
    ]
    return random.sample(rows, min(config.trainer.log_completions, len(rows)))


def _show(config: Config, console: Console) -> None:
    """Draw the curves, and say where everything is."""
    folder = config.trainer.output_dir
    plot_curves([folder], folder / "curves.png")
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    for name, path in {
        "curves": folder / "curves.png",
        "metrics": folder / "metrics.jsonl",
        "completions": folder / "completions.jsonl",
        "model": newest / "hf",
    }.items():
        console.print(f"{name:12} {path}")
