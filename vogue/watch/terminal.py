"""What `vogue watch` draws in a terminal: progress, alarms, where a step's time goes, curves, and completions.

Text of models and data sets is shown without its control characters, which could do anything to a terminal.
"""

import math
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vogue.estimates import Estimate
from vogue.run.alarms import Alarm
from vogue.run.step_times import duration, phase_seconds, seconds_of
from vogue.watch.following import Follower, Seen

SECONDS = 2.0  # between two looks
RECENT = 50  # steps that phases and the time left are told from
OLD_ALARMS = 3  # that are over, at most
SHOWN = 3  # completions, or as many as the terminal has room for
ROWS_EACH = 5  # of a terminal, of a completion
BARS = "▁▂▃▄▅▆▇█"
COLOURS = ("cyan", "blue", "magenta", "green", "yellow", "red", "bright_blue", "bright_magenta", "bright_cyan")
CURVES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "entropy": "entropy, nats",
    "u_per": "u_per, nats",
    "differing_share": "groups that teach",
    "tokens": "tokens a completion",
    "clip_fraction": "clipped tokens",
    "grad_norm": "norm of the gradient",
    "mismatch/kl": "KL trainer, engine",
    "throughput/rollout": "tokens/s, rollout",
    "memory_gb": "peak memory, GB",
}


def watch(follower: Follower, console: Console) -> list[Alarm]:
    """Show the run until it ends or Ctrl-C comes, once where there is no terminal; returns the alarms that are on."""
    seen = follower.look()
    if console.is_terminal and not seen.ended:
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while not seen.ended:
                    live.update(view(seen, console.width, console.height), refresh=True)
                    time.sleep(SECONDS)
                    seen = follower.look()
        except KeyboardInterrupt:  # how one leaves
            pass
    console.print(view(seen, console.width))
    return [alarm for alarm in seen.alarms if alarm.on]


def view(seen: Seen, width: int, height: int | None = None) -> Group:
    """All of it for a terminal of so many columns and rows; the latest completions have what rows are left."""
    above = [*_head(seen), *_alarms(seen)]
    if seen.metrics:
        above += [*_phases(seen, width), *_curves(seen, width)]
    rows = len(above) + 2 * bool(seen.metrics) + len(CURVES)
    count = SHOWN if height is None else max(0, (height - rows) // ROWS_EACH)
    return Group(*above, *_completions(seen, width, count))


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` letters, each the mean of its share of the values; a blank where none is finite."""
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    finite = [[value for value in part if math.isfinite(value)] for part in parts]
    means = [sum(part) / len(part) if part else None for part in finite]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * count
    low, span = min(known), max(known) - min(known)
    places = [None if mean is None else (mean - low) / span if span else 0.5 for mean in means]
    return "".join(" " if place is None else BARS[min(7, int(8 * place))] for place in places)


def printable(text: str) -> str:
    """The text in one line, without what a terminal would act on."""
    return "".join(letter if letter.isprintable() else " " for letter in text.replace("\n", "↵"))


def _head(seen: Seen) -> list[RenderableType]:
    total, recent = seen.config.trainer.steps, seen.metrics[-RECENT:]
    step = sum(map(seconds_of, recent)) / len(recent) if recent else 0.0
    told = [f"{seen.steps} of {total} steps", seen.state]
    if recent:
        told.append(f"{duration(step)} a step")
    if recent and not seen.ended:
        told.append(f"about {duration(step * max(0, total - seen.steps))} left")
    title = Text.assemble((printable(str(seen.folder)), "bold"), f"  {seen.config.method}  {seen.config.model.path}")
    held_out = [Text(_held_out(seen.evaluations))] if seen.evaluations else []
    bar = Table.grid(expand=True)  # which ends its line
    bar.add_row(ProgressBar(total=max(1, total), completed=seen.steps))
    return [title, bar, Text(" · ".join(told)), *held_out]


def _held_out(evaluations: Sequence[Mapping]) -> str:
    first, last = evaluations[0], evaluations[-1]
    name = next((name for name in last if name.startswith("pass@")), None)
    if name is None:
        return f"evaluated after {last['step']} steps"
    before = f"{100 * first[name][0]:.1f}% → " if len(evaluations) > 1 and name in first else ""
    return f"held-out {name} {before}{Estimate(*last[name])} after {last['step']} steps"


def _alarms(seen: Seen) -> list[RenderableType]:
    on = [alarm for alarm in seen.alarms if alarm.on]
    over = [alarm for alarm in seen.alarms if not alarm.on]
    lines = [Text.assemble((f"● {alarm.name}", "bold red"), f" {_when(alarm)}: {alarm.text}") for alarm in on]
    lines += [Text(f"○ {alarm.name} {_when(alarm)}: {alarm.text}", style="dim") for alarm in over[:OLD_ALARMS]]
    if len(over) > OLD_ALARMS:
        lines.append(Text(f"○ {len(over) - OLD_ALARMS} older ones", style="dim"))
    return [*lines] if lines else [Text("no alarm", style="green")]


def _when(alarm: Alarm) -> str:
    return f"(step {alarm.first})" if alarm.first == alarm.last else f"(steps {alarm.first} to {alarm.last})"


def _phases(seen: Seen, width: int) -> list[RenderableType]:
    """Where a step's time goes, as a bar in parts and as shares."""
    seconds = {name: value for name, value in phase_seconds(seen.metrics[-RECENT:]).items() if value}
    total = sum(seconds.values())
    if not total:
        return []
    bar, legend, end = Text(), Text(), 0.0
    for (name, value), colour in zip(seconds.items(), COLOURS * 2, strict=False):
        start, end = end, end + value
        bar.append("█" * (round(width * end / total) - round(width * start / total)), colour)
        legend.append("■ ", colour).append(f"{name} {value / total:.0%}  ")
    return [Rule(style="dim"), bar, legend]


def _curves(seen: Seen, width: int) -> list[RenderableType]:
    table = Table.grid(padding=(0, 2))
    room = max(10, width - 58)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=min(room, max(10, len(seen.metrics))))
    for _ in range(2):
        table.add_column(no_wrap=True, justify="right")
    for name, label in CURVES.items():
        values = [row[name] for row in seen.metrics if name in row and row[name] is not None]
        if values:
            finite = [value for value in values if math.isfinite(value)] or [math.nan]
            between = f"{min(finite):.3g} to {max(finite):.3g}"
            table.add_row(label, Text(sparkline(values, room), "cyan"), f"{values[-1]:.4g}", Text(between, "dim"))
    return [Rule(style="dim"), table]


def _completions(seen: Seen, width: int, count: int) -> list[RenderableType]:
    shown: list[RenderableType] = []
    for record in seen.completions[::-1][:count]:
        accuracy = record.get("accuracy", 0.0)
        mark = ("✓", "green") if accuracy == 1 else ("✗", "red")
        facts = f" step {record['step']}  reward {record['reward']:.3g}  advantage {record['advantage']:+.3g}"
        answer = printable(str(record.get("answer", "")))
        shown += [
            Rule(style="dim"),
            Text.assemble(mark, (facts, "bold"), f"  {record.get('branch', '')} image  right answer {answer}"),
            Text(
                _shortened(record["problem"].replace("<image>", "").replace("<video>", "").strip(), width),
                style="dim",
                no_wrap=True,
            ),
            Text(_shortened(record["completion"], 2 * width)),
        ]
    return shown


def _shortened(text: str, most: int) -> str:
    """The text in one line of at most so many letters: its beginning, and its end, where the answer is."""
    line = printable(text)
    if len(line) <= most:
        return line
    return f"{line[: most // 3]} … {line[-(most - most // 3 - 3) :]}"
