"""The figures of a report: which curves stand in which panel, for the page's charts and for PNGs alike."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vogue.estimates import Estimate, estimate, pass_at_k, powers_of_two
from vogue.report.runs import Method, Run, group_methods, read_runs
from vogue.run.step_times import seconds_of

# Of the methods, in light and dark mode: Okabe and Ito's palette, which colour-blind readers can tell apart, with an
# indigo and a crimson in place of its second blue and its second orange, darkened or lightened until each stands out
# from the page by 3 to 1.
LIGHT = ("#0072b2", "#c45100", "#00805c", "#b0438f", "#8f6a00", "#5b3fd0", "#5b5b66", "#c9103a")
DARK = ("#4aa8e0", "#f08a3c", "#2fc795", "#e29bc8", "#e6c029", "#a79bff", "#b4b4c0", "#ff7a90")

MANY_SEEDS = 10  # fewer tell no 95% interval
MANY_METHODS = 5  # from so many on, bands and single seeds would hide each other
FEW_POINTS = 20  # of a curve: each gets a dot
LETTER, ROW = 0.08, 0.24  # inches of a letter and of a row of the legend
PANEL = (4.5, 3.4)  # inches, with what is around its axes:
LEFT, RIGHT, ABOVE, BELOW = 0.75, 0.15, 0.35, 0.55

# Title, unit and metric. Shares have the unit "%" and are kept between 0 and 1.
LEARNING = (("Reward", "", "reward"), ("Accuracy in training", "%", "accuracy"))
EXPLORATION = (
    ("Entropy of tokens trained on", "nats", "entropy"),
    ("Entropy of all tokens", "nats", "measured/entropy"),
    ("Distinct answers in a group", "", "distinct_answers"),
    ("Weight of the entropy in the loss", "", "entropy_coef"),
)
GUIDANCE = (
    ("u_per where it is paid", "nats", "u_per"),
    ("u_per of all tokens", "nats", "measured/u_per"),
    ("Completions from the noisy image", "%", "noisy_share"),
    ("Completions whose u_per is paid", "%", "paid_share"),
    ("Tokens at the cap of u_per's bonus", "%", "per_capped"),
    ("Tokens at the cap of u_out's bonus", "%", "out_capped"),
    ("Tokens with a clipped ratio", "%", "clip_fraction"),
    ("Norm of the gradient", "", "grad_norm"),
)
GROUPS = (
    ("Groups with right and wrong answers", "%", "mixed_share"),
    ("Groups with right answers only", "%", "solved_share"),
    ("Completions that end by themselves", "%", "finished"),
    ("Tokens a completion", "", "tokens"),
)
MACHINE = (
    ("Tokens a second, rollout", "", "throughput/rollout"),
    ("Tokens a second, training", "", "throughput/train"),
    ("Rollout of the slowest rank", "s", "time/rollout_slowest"),
    ("Ranks waiting for one another, between phases", "s", "time/wait"),
    ("Time of micro-batches in which a rank computes", "%", "balance"),
    ("Peak memory", "GB", "memory_gb"),
    ("Trainer against engine, |Δ log-probability|", "nats", "mismatch/logprob"),
    ("Trainer against engine, KL", "nats", "mismatch/kl"),
    ("Trainer against engine, tokens whose ratio is out of bounds", "%", "mismatch/outside"),
)


@dataclass(frozen=True)
class Point:
    """A value at x, with an interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One curve; `method` is the number of its colour. Thin: one seed of several. Dashed: before training."""

    label: str
    method: int
    points: list[Point]
    thin: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over the same x: steps, or, with `doubling`, k on an axis on which each doubling is equally long."""

    title: str
    unit: str
    lines: list[Line]
    x: str = "step"
    doubling: bool = False


@dataclass(frozen=True)
class Section:
    """Panels under one heading with a sentence on what they show."""

    name: str
    title: str
    text: str
    panels: list[Panel]


def sections(methods: Sequence[Method]) -> list[Section]:
    """The sections of a report, with the panels that have data."""
    bands = _about_bands(methods)
    single = len(methods) < MANY_METHODS and any(len(method.runs) == 1 for method in methods)
    held_out = bands + single * " The band of a single run's held-out pass@k is its 95% interval over problems."
    gap, source = _gap(methods)
    names = {name for method in methods for run in method.runs for row in run.metrics for name in row}
    names -= {"reward/accuracy"}  # "accuracy" is drawn already
    rewards = [(f"Score of {name[7:]}", "", name) for name in sorted(names) if name.startswith("reward/")]
    found = [
        Section(
            "learning_curves",
            "Learning curves",
            f"Reward and accuracy of the completions trained on; pass@k on held-out problems. {held_out}",
            [*_panels(methods, LEARNING), *_held_out(methods)],
        ),
        Section(
            "pass_at_k",
            "pass@k before and after training",
            "Chance that k completions of a held-out problem hold a right one. Dashed: before training; "
            f"solid: after it. {held_out}",
            [Panel("Held-out pass@k", "%", _before_and_after(methods), "k", doubling=True)],
        ),
        Section(
            "exploration",
            "How exploration decays",
            f"pass@k beyond pass@1 is what the model finds only by trying again. {source} {bands}",
            [
                *_panels(methods, EXPLORATION),
                Panel("Distinct answers to a held-out problem", "", _lines(methods, _distinct)),
                gap,
            ],
        ),
        Section(
            "groups",
            "Groups and rewards",
            "Only groups with unequal rewards teach; each score that adds to the reward, before its weight.",
            _panels(methods, (*GROUPS, *rewards)),
        ),
        Section(
            "guidance",
            "Guidance and clipping",
            "u_per: how far the policies on the raw and on the perturbed image diverge, a token; u_out: the entropy. "
            "Each pays a bonus up to a cap.",
            _panels(methods, GUIDANCE),
        ),
        Section(
            "machine",
            "Time, memory, mismatch",
            "The mismatch compares log-probabilities of the trainer and of the rollout engine for the same tokens.",
            [Panel("Time of a step", "s", _lines(methods, _seconds)), *_panels(methods, MACHINE)],
        ),
    ]
    kept = [Section(s.name, s.title, s.text, [panel for panel in s.panels if panel.lines]) for s in found]
    return [section for section in kept if section.panels]


def first_and_last(run: Run) -> tuple[dict | None, dict | None]:
    """The evaluations before the first step and after the last one, None where one wasn't made."""
    rows = {row["step"]: row for row in run.evaluations}
    return rows.get(0), rows.get(max(rows, default=0) or None)


def pass_at(evaluation: dict) -> dict[int, Estimate]:
    """pass@k by k: for 1, 2, 4, … and n where the right completions of each problem were counted, else as written."""
    if "right" not in evaluation:
        return {int(name[5:]): Estimate(*evaluation[name]) for name in evaluation if name.startswith("pass@")}
    n = evaluation["n"]
    ks = sorted({*powers_of_two(n), n})
    return {k: estimate([pass_at_k(n, right, k) for right in evaluation["right"]]) for k in ks}


def plot_curves(runs: Sequence[Path], target: Path) -> None:
    """Draw all panels of `runs` (folders) into the PNG `target`."""
    panels = [panel for section in sections(group_methods(read_runs(runs))) for panel in section.panels]
    target.write_bytes(draw(panels))


def draw(panels: Sequence[Panel]) -> bytes:
    """The panels as a PNG, with one legend."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure()
    grid, handles = figure.add_gridspec(rows, columns), {}
    for place, panel in enumerate(panels):
        handles |= _draw_panel(figure.add_subplot(grid[divmod(place, columns)]), panel)
    width = max(6, PANEL[0] * columns)
    entries = max(1, int(width / (0.6 + LETTER * max(map(len, handles), default=0))))
    legend = ROW * math.ceil(len(handles) / entries) + 0.15
    height = PANEL[1] * rows + legend
    figure.set_size_inches(width, height)
    # Margins of a fixed width: a layout engine draws everything twice, which is a second of every run's end.
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - RIGHT / width,
        bottom=BELOW / height,
        top=1 - (legend + ABOVE) / height,
        wspace=(LEFT + RIGHT) / (width / columns - LEFT - RIGHT),
        hspace=(BELOW + ABOVE) / (PANEL[1] - BELOW - ABOVE),
    )
    figure.legend(handles.values(), handles.keys(), loc="upper left", ncols=entries, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return image.getvalue()


# --------------------------------------------------------------------------------------------------------- curves


def _draw_panel(axis: Axes, panel: Panel) -> dict[str, Line2D]:
    """Draw the curves; returns what the legend shows."""
    handles = {}
    for line in panel.lines:
        color = LIGHT[line.method % len(LIGHT)]
        x, y = [point.x for point in line.points], [point.y for point in line.points]
        banded = [point for point in line.points if point.low is not None]
        if banded:
            low, high = (np.array([getattr(point, end) for point in banded]) for end in ("low", "high"))
            axis.fill_between([point.x for point in banded], low, high, color=color, alpha=0.15, linewidth=0)
        solid = "-" if line.method < len(LIGHT) else ":"  # where colours come a second time
        style: dict[str, Any] = {"linestyle": "--" if line.dashed else solid, "color": color}
        style |= {"linewidth": 0.8, "alpha": 0.5} if line.thin else {"linewidth": 1.8}
        marker = "o" if len(x) <= FEW_POINTS and not line.thin else ""
        (handle,) = axis.plot(x, y, marker=marker, markersize=4, **style)
        if line.dashed:
            handles.setdefault("before training", Line2D([], [], linestyle="--", color="gray"))
        elif not line.thin:
            handles[line.label] = handle
    axis.set_title(f"{panel.title} ({panel.unit})" if panel.unit not in ("", "%") else panel.title, fontsize="medium")
    axis.set_xlabel(panel.x)
    axis.grid(alpha=0.3)
    if panel.unit == "%":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))
    if panel.doubling:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return handles


def _panels(methods: Sequence[Method], metrics: Iterable[tuple[str, str, str]]) -> list[Panel]:
    return [Panel(title, unit, _lines(methods, _measured(name))) for title, unit, name in metrics]


def _lines(methods: Sequence[Method], curve: Callable[[Run], list[Point]], dashed: bool = False) -> list[Line]:
    """The curves of a quantity: a run's own, or of several runs a thin one each and their mean.

    Of MANY_METHODS methods only the means are drawn.
    """
    lines = []
    for number, method in enumerate(methods):
        label = f"{method.label}, before" if dashed else method.label
        curves = {run.name: points for run in method.runs if (points := curve(run))}
        if curves and len(methods) >= MANY_METHODS:
            mean = [Point(point.x, point.y) for point in _mean(list(curves.values()))]
            lines.append(Line(label, number, mean, False, dashed))
        elif len(curves) > 1:
            for name, points in curves.items():
                lines.append(Line(name, number, [Point(point.x, point.y) for point in points], True, dashed))
            lines.append(Line(label, number, _mean(list(curves.values())), False, dashed))
        else:
            lines += [Line(label, number, points, False, dashed) for points in curves.values()]
    return lines


def _mean(curves: Sequence[list[Point]]) -> list[Point]:
    """The mean and the band over seeds, at every x that all seeds have."""
    values: dict[float, list[float]] = {}
    for points in curves:
        for point in points:
            values.setdefault(point.x, []).append(point.y)
    return [Point(x, *_band(y)) for x, y in sorted(values.items()) if len(y) == len(curves)]


def _band(values: list[float]) -> tuple[float, float, float]:
    if len(values) >= MANY_SEEDS:
        found = estimate(values)
        return found.value, found.low, found.high
    return sum(values) / len(values), min(values), max(values)


def _about_bands(methods: Sequence[Method]) -> str:
    counts = {len(method.runs) for method in methods} - {1}
    if not counts:
        return ""
    if len(methods) >= MANY_METHODS:
        return "Each line is the mean over a method's seeds."
    few = "the lowest seed to the highest"
    many = f"end to end of the mean's 95% bootstrap interval (at least {MANY_SEEDS} seeds)"
    bands = " or ".join([few] * (min(counts) < MANY_SEEDS) + [many] * (max(counts) >= MANY_SEEDS))
    return f"Several seeds of a method: a thin line each, their mean, and a band from {bands}."


def _measured(name: str) -> Callable[[Run], list[Point]]:
    return lambda run: [
        Point(row["step"], row[name]) for row in run.metrics if name in row and math.isfinite(row[name])
    ]


def _evaluated(name: str) -> Callable[[Run], list[Point]]:
    return lambda run: [Point(row["step"], *row[name]) for row in run.evaluations if name in row]


def _held_out(methods: Sequence[Method]) -> list[Panel]:
    """pass@1 and pass@k of the largest k, over the steps."""
    rows = [row for method in methods for run in method.runs for row in run.evaluations]
    ks = sorted({int(name[5:]) for row in rows for name in row if name.startswith("pass@")})
    shown = dict.fromkeys(ks[:1] + ks[-1:])
    return [Panel(f"Held-out pass@{k}", "%", _lines(methods, _evaluated(f"pass@{k}"))) for k in shown]


def _distinct(run: Run) -> list[Point]:
    counted = [row for row in run.evaluations if "distinct" in row]
    return [Point(row["step"], sum(row["distinct"]) / len(row["distinct"])) for row in counted]


def _seconds(run: Run) -> list[Point]:
    rows = [row for row in run.metrics if "time/train" in row]
    return [Point(row["step"], seconds_of(row)) for row in rows]


def _gap(methods: Sequence[Method]) -> tuple[Panel, str]:
    """pass@k - pass@1 over the steps, and a sentence on where it is from: evaluations if every run has them."""
    runs = [run for method in methods for run in method.runs]
    if all(run.evaluations and all("pass@4" in row for row in run.evaluations) for run in runs):
        title, source = "Held-out pass@4 − pass@1", "Here from the evaluations on held-out problems, with k = 4."

        def curve(run: Run) -> list[Point]:
            return [Point(row["step"], row["pass@4"][0] - row["pass@1"][0]) for row in run.evaluations]
    else:
        title = "pass@G − accuracy of training groups"
        source = "Here from the groups of G completions trained on, since not every run was evaluated with pass@4."

        def curve(run: Run) -> list[Point]:
            rows = [row for row in run.metrics if "pass_at_n" in row]
            return [Point(row["step"], row["pass_at_n"] - row["accuracy"]) for row in rows]

    return Panel(title, "%", _lines(methods, curve)), source


def _before_and_after(methods: Sequence[Method]) -> list[Line]:
    def curve(run: Run, row: dict | None) -> list[Point]:
        return [Point(k, e.value, e.low, e.high) for k, e in pass_at(row).items()] if row else []

    before = _lines(methods, lambda run: curve(run, first_and_last(run)[0]), dashed=True)
    return before + _lines(methods, lambda run: curve(run, first_and_last(run)[1]))
