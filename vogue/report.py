"""Plots of a run's metrics: `curves.png`."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANELS = {
    "reward": ("reward", "accuracy", "format"),
    "entropy (nats)": ("entropy",),
    "u_per (nats), noisy branch": ("u_per",),
    "share of tokens": ("out_capped", "per_capped", "clip_fraction"),
    "share of groups": ("noisy_share", "solved_share", "mixed_share", "pass_at_n"),
    "seconds a step": ("time/rollout", "time/train", "time/sync", "time/reward", "time/data"),
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The objects of a run's metrics.jsonl, one a step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plot_curves(runs: list[Path], target: Path) -> None:
    """Draw the panels for `runs` (folders) into the PNG `target`; several runs differ by the style of the line."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    styles = ("-", "--", ":", "-.")
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for number, run in enumerate(runs):
            rows = read_metrics(run)
            for color, name in enumerate(names):
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    label = name if len(runs) == 1 else f"{run.name}: {name}"
                    axis.plot(*zip(*points, strict=True), styles[number % 4], color=f"C{color}", label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(target, dpi=100)
    plt.close(figure)
