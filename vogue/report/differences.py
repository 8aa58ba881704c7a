"""The figure of a sweep: each variant's difference from its baseline, with its interval, beside what it generated."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vogue.report.figures import LIGHT
from vogue.sweep_table import metrics_of

ROW = 0.24  # inches of a variant
WIDTH, HEAD = 9.0, 1.1  # inches


def plot_differences(compared: dict[str, Any], path: Path) -> None:
    """Write the figure of a table of `vogue.sweep_table.compare` as PNG; nothing where no variant has a difference."""
    variants = {name: row for name, row in compared["variants"].items() if "difference" in row}
    if not variants:
        return
    first, metrics = next(iter(compared["variants"])), metrics_of(compared)
    minus = f"minus {first}'s" if len(compared["before"]) == 1 else "minus its baseline's"
    figure = Figure(figsize=(WIDTH, HEAD + ROW * len(variants)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(metrics) + 1, sharey=True, squeeze=False)[0])
    names = [name if row["baseline"] == first else f"{name} − {row['baseline']}" for name, row in variants.items()]
    places = range(len(variants))
    for panel, metric in zip(panels, metrics, strict=False):
        for place, row in zip(places, variants.values(), strict=True):
            value, low, high = (100 * part for part in row["difference"][metric])
            panel.plot([low, high], [place, place], color=LIGHT[0], linewidth=1.5)
            panel.plot([value], [place], "o", color=LIGHT[0], markersize=4)
        panel.axvline(0, color=LIGHT[6], linewidth=0.8)
        panel.set_title(f"{metric} {minus}", fontsize=9)
        panel.set_xlabel("points, 95% interval", fontsize=8)
    cost = [row["training"].get("generated", (0.0,))[0] / 1000 for row in variants.values()]
    panels[-1].barh(list(places), cost, color=LIGHT[6], height=0.5)
    panels[-1].set_title("tokens generated", fontsize=9)
    panels[-1].set_xlabel("thousands", fontsize=8)
    panels[0].set_yticks(list(places), names)
    panels[0].invert_yaxis()
    for panel in panels:
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
