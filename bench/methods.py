"""What a step of each of a sweep's variants costs, taking turns in one process, so that other work slows all of them.

    python bench/methods.py examples/sweeps/methods.yaml --steps 5

Every variant's trainer takes a step in each turn; the first turn warms up and isn't counted. A table of medians and
of each variant's seconds over the first one's, turn by turn, with the least and the greatest. Without a GPU they are
the process' seconds on the processor, which other work on the machine changes little.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vogue.config import Config
from vogue.data.dataset import check_samples, training_samples
from vogue.inputs import Preprocessor
from vogue.sweep import load_sweep, plan
from vogue.trainer import Trainer


def configurations(path: Path, overrides: list[str]) -> dict[str, Config]:
    """Each variant's settings, of the first seed's run."""
    sweep = load_sweep(str(path))
    runs = plan(sweep, overrides)
    return {run.variant: run.config for run in runs if run.seed == sweep.seeds[0]}


def seconds(variants: dict[str, Config], turns: int) -> dict[str, list[float]]:
    """Of each variant's steps, one a turn, without the first."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    trainers, found = {}, {name: [] for name in variants}
    for name, config in variants.items():
        preprocessor = Preprocessor.of(config)
        data = check_samples(training_samples(config.data), preprocessor.lengths)
        trainers[name] = Trainer(config, data, preprocessor, resume=None)
    for turn in track(range(turns + 1), "turns"):
        for name, trainer in trainers.items():
            began = clock()
            trainer.run_step()
            if turn:
                found[name].append(clock() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every variant")
    parser.add_argument("--steps", type=int, default=5, help="steps of each variant that count")
    arguments = parser.parse_intermixed_args()
    found = seconds(configurations(arguments.sweep, arguments.overrides), arguments.steps)
    first = next(iter(found.values()))
    table = Table("variant", "seconds a step", f"over {next(iter(found))}'s", "least to greatest")
    for name, values in found.items():
        ratios = [mine / its for mine, its in zip(values, first, strict=True)]
        table.add_row(name, f"{median(values):.2f}", f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
