"""The figure of sweeps: each variant's difference from its baseline, with its interval, and what it generated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vogue.report.figures import LIGHT
from vogue.sweep_table import metrics_of, tokens_over_baseline

ROW = 0.24  # inches of a variant
PANEL, NAMES, HEAD = 2.6, 1.2, 1.1  # inches


def plot_differences(sweeps: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Write the figure of the tables of `vogue.sweep_table.compare` as PNG; nothing where no variant has a difference.

    `sweeps` are told apart by their names, which stand above their panels; a variant of several has one row.
    """
    labels: dict[str, str] = {}
    for compared in sweeps.values():
        first = next(iter(compared["variants"]))
        for name, row in compared["variants"].items():
            if "difference" in row:
                labels[name] = name if row["baseline"] == first else f"{name} − {row['baseline']}"
    if not labels:
        return
    panels = [(name, metric) for name, compared in sweeps.items() for metric in metrics_of(compared)]
    size = (NAMES + PANEL * (len(panels) + 1), HEAD + ROW * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(panels) + 1, sharey=True, squeeze=False)[0])
    for panel, (name, metric) in zip(axes, panels, strict=False):
        _plot_intervals(panel, metric, sweeps[name], list(labels))
        panel.set_title(f"{name} {metric}".strip(), fontsize=9)
    _plot_cost(axes[-1], sweeps, list(labels))
    axes[0].set_yticks(range(len(labels)), list(labels.values()))
    axes[0].invert_yaxis()
    for panel in axes:
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _plot_intervals(panel: Axes, metric: str, compared: dict[str, Any], names: list[str]) -> None:
    for name, row in compared["variants"].items():
        if "difference" in row:
            value, low, high = (100 * part for part in row["difference"][metric])
            panel.plot([low, high], [names.index(name)] * 2, color=LIGHT[0], linewidth=1.5)
            panel.plot([value], [names.index(name)], "o", color=LIGHT[0], markersize=4)
    panel.axvline(0, color=LIGHT[6], linewidth=0.8)
    first = next(iter(compared["variants"]))
    other = first if len(compared["before"]) == 1 else "its baseline"
    panel.set_xlabel(f"points minus {other}'s, 95% interval", fontsize=8)


def _plot_cost(panel: Axes, sweeps: Mapping[str, dict[str, Any]], names: list[str]) -> None:
    height = 0.7 / len(sweeps)
    for i, (sweep, compared) in enumerate(sweeps.items()):
        cost = {name: tokens_over_baseline(compared, name) for name in compared["variants"] if name in names}
        known = {name: value for name, value in cost.items() if value is not None}
        places = [names.index(name) + height * (i - (len(sweeps) - 1) / 2) for name in known]
        panel.barh(places, list(known.values()), height, color=(LIGHT[6], *LIGHT)[i], label=sweep)
    panel.axvline(1, color=LIGHT[6], linewidth=0.8)
    panel.set_title("tokens generated", fontsize=9)
    panel.set_xlabel("over the baseline's", fontsize=8)
    if len(sweeps) > 1:
        panel.legend(fontsize=8, frameon=False)
