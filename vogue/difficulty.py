"""A data set by how often a model is right on it: `vogue data split`, the stages of PeBR-R1 (arXiv 2509.13031).

easy    all of a problem's completions are right: what the first stage trains on
medium  some are: what the second stage trains on
hard    none is: what neither trains on
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vogue.config import Config
from vogue.data import Sample, write_parquet
from vogue.data.dataset import training_samples
from vogue.data.samples import schema_of
from vogue.evaluate import Judged, evaluate_model

LEVELS = ("easy", "medium", "hard")


def level(right: int, count: int) -> str:
    """Which of `LEVELS` a problem is of, by so many right completions of `count`."""
    return "easy" if right == count else "medium" if right else "hard"


def by_level(judged: Sequence[Judged]) -> dict[str, list[Sample]]:
    """The samples of each level, in their order."""
    found: dict[str, list[Sample]] = {name: [] for name in LEVELS}
    for item in judged:
        found[level(item.right, len(item.scores))].append(item.sample)
    return found


def split(config: Config, folder: Path, console: Console) -> dict[str, int]:
    """Ask `model.path` each problem of `data.train`, and write easy, medium and hard.parquet; returns their counts.

    Tells how many tokens that generated: what a comparison at equal cost has to count.

    A level without a problem has no file. Raises ConfigError and DataError as an evaluation does.
    """
    samples = training_samples(config.data)
    # As they stand in the data: whoever trains on a level renders `data.format_prompt` again.
    plain = training_samples(config.data.model_copy(update={"format_prompt": None}))
    schema_of(plain, folder / f"{LEVELS[0]}.parquet")  # before the long work, what a file of them can't hold
    config = config.model_copy(update={"reward": config.reward.unweighed()})
    positions = {sample.place: position for position, sample in enumerate(plain)}
    judged = evaluate_model(config, ("image",), console, samples)["image"]
    generated = sum(len(completion.token_ids) for item in judged for completion in item.completions)
    console.print(f"{generated:,} tokens generated", highlight=False)
    found = by_level(judged)
    for name, samples in found.items():
        path = folder / f"{name}.parquet"
        if samples:
            write_parquet(plain.at(positions[sample.place] for sample in samples), path)
        else:
            path.unlink(missing_ok=True)  # of an earlier split
    return {name: len(samples) for name, samples in found.items()}
