"""The report's page: everything in one HTML file, and PNGs beside it; and the same page, live, of a run that goes on.

Text of models and data sets is data: the template escapes it, the scripts only ever set it as text, and the page's
content security policy runs these scripts alone and lets nothing be loaded, or of a live page only its own server's.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vogue.estimates import Estimate
from vogue.report import figures
from vogue.report.completions import MIN_COUNT, Record, Sampled, browser, embedded, linked, sample
from vogue.report.runs import Method, Run, differing, group_methods, read_runs
from vogue.run.alarms import Alarm, alarms
from vogue.run.step_times import phase_seconds
from vogue.settings import ConfigError

HERE = Path(__file__).parent
PNGS = ("learning_curves", "pass_at_k", "exploration")  # sections that are also written as PNGs
MOST_TOKENS = 40  # ranked
MOST_POINTS = 1000  # of a curve on the page; a screen has no more columns
FACTS = {
    "Model": "model.path",
    "Training data": "data.train",
    "Held-out data": "data.test",
    "Prompts a step": "rollout.prompts",
    "Completions a prompt": "rollout.n",
    "Learning rate": "optimizer.lr",
}


def write_report(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write the page, and PNGs beside it, for the runs in `folders`; returns what was written, the page first.

    out   the page; unset: report.html in the folder of the one run

    Files appear whole or not at all, and the page last. Raises `ConfigError` for a folder that holds no run or no
    step, and where `out` can't be used.
    """
    if out is None and len(folders) > 1:
        raise ConfigError("several runs: say with --out where the page goes")
    page = out or folders[0] / "report.html"
    if page.is_dir():
        raise ConfigError(f"--out {page} is a folder; it must be a file, such as {page / 'report.html'}")
    runs = read_runs(folders)
    sampled = sample([run.completions for run in runs])
    methods = group_methods(runs)
    sections = figures.sections(methods)
    files = {
        page.with_name(f"{page.stem}_{section.name}.png"): figures.draw(section.panels)
        for section in sections
        if section.name in PNGS
    }
    told = {run.name: alarms(run.metrics, run.config) for run in runs}
    files[page] = _render(runs, methods, sections, sampled, told).encode()
    page.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return list(files)[::-1]


def live_page(run: Run, latest: Sequence[Record], told: Sequence[Alarm], state: str) -> str:
    """The page of a run that goes on, which asks its server every few seconds for what is new.

    latest  completions, the newest last; their images are below the page's own address
    state   of the run, in a word
    """
    methods = group_methods([run])
    sampled = Sampled(len(latest), len(latest), [(0, record) for record in reversed(latest)], [])
    return _render([run], methods, figures.sections(methods), sampled, {run.name: list(told)}, state)


# ----------------------------------------------------------------------------------------------------------- page


def _render(
    runs: list[Run],
    methods: list[Method],
    sections: list[figures.Section],
    sampled: Sampled,
    told: dict[str, list[Alarm]],
    state: str | None = None,
) -> str:
    """The page; `told`: the alarms of each run; `state`: of a live page's run, in a word."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": _number, "visible": _visible}
    environment.trim_blocks = environment.lstrip_blocks = True
    names = ("charts.js", "browser.js") + (("live.js",) if state else ())
    script = "\n".join((HERE / name).read_text() for name in names)
    folders = [run.folder for run in runs]
    records = browser([run.name for run in runs], folders, sampled.shown, linked if state else embedded)
    pass_names = _pass_names(runs)
    panels = [_panel(panel) for section in sections for panel in section.panels]
    return environment.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        state=state,
        colors={"light": figures.LIGHT, "dark": figures.DARK},
        methods=methods,
        runs=[
            (number, run, _held_out(run, pass_names)) for number, method in enumerate(methods) for run in method.runs
        ],
        alarms=told,
        facts=_facts(runs),
        differing=differing([method.settings for method in methods]),
        pass_names=pass_names,
        sections=sections,
        phases=_phases(methods),
        tokens=sampled.tokens[:MOST_TOKENS],
        min_count=MIN_COUNT,
        sampled=sampled,
        browser=records,
        data=_finite({"panels": panels, "colors": len(figures.LIGHT)} | records),
    )


def _facts(runs: list[Run]) -> dict[str, str]:
    """What was run, by name; where runs differ, every value once."""
    values = {"Method": [run.config.method for run in runs]}
    for title, name in FACTS.items():
        section, field = name.split(".")
        values[title] = [getattr(getattr(run.config, section), field) for run in runs]
    values["Steps"] = [f"{len(run.metrics)} of {run.config.trainer.steps}" for run in runs]
    told = {title: dict.fromkeys(str(v) for v in found if v is not None) for title, found in values.items()}
    return {title: ", ".join(found) for title, found in told.items() if found}


def _pass_names(runs: list[Run]) -> list[str]:
    names = {name for run in runs for row in run.evaluations for name in row if name.startswith("pass@")}
    return sorted(names, key=lambda name: int(name[5:]))


def _held_out(run: Run, names: list[str]) -> dict[str, list[Estimate | None]]:
    """pass@k before and after training, by name."""
    rows = [row or {} for row in figures.first_and_last(run)]
    return {name: [Estimate(*row[name]) if name in row else None for row in rows] for name in names}


def _panel(panel: figures.Panel) -> dict[str, Any]:
    """A panel as JSON, with its points as [x, y] or [x, y, low, high], of long curves those that `_telling` keeps."""
    kept = _telling(panel.lines)
    lines = [
        asdict(line) | {"points": [[v for v in astuple(p) if v is not None] for p in line.points if p.x in kept]}
        for line in panel.lines
    ]
    return asdict(panel) | {"lines": lines}


def _telling(lines: Sequence[figures.Line]) -> set[float]:
    """The x at which all curves of a panel are drawn: every one, or of long curves those of highs and lows.

    The x are cut into equal shares, and of each share every curve keeps its lowest and its highest point, so that no
    spike is lost.
    """
    xs = sorted({point.x for line in lines for point in line.points})
    if len(xs) <= MOST_POINTS:
        return set(xs)
    kept = {xs[0], xs[-1]}
    shares = max(1, MOST_POINTS // (2 * len(lines)))
    places = {x: i * shares // len(xs) for i, x in enumerate(xs)}
    for line in lines:
        lows: dict[int, figures.Point] = {}
        highs: dict[int, figures.Point] = {}
        for point in line.points:
            share = places[point.x]
            lows[share] = min(lows.get(share, point), point, key=lambda p: p.y)
            highs[share] = max(highs.get(share, point), point, key=lambda p: p.y)
        kept |= {point.x for point in (*lows.values(), *highs.values())}
    return kept


def _phases(methods: list[Method]) -> dict[str, list[float]]:
    """Seconds of each phase, a value a method (mean of its runs), without phases that took no time."""
    each = [[phase_seconds(run.metrics) for run in method.runs] for method in methods]
    means = {phase: [sum(run[phase] for run in runs) / len(runs) for runs in each] for phase in each[0][0]}
    return {phase: seconds for phase, seconds in means.items() if any(seconds)}


# -------------------------------------------------------------------------------------------------------- numbers


def _number(value: float | None) -> str:
    """Write a number with three digits, or with all digits before the point."""
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _visible(token: str) -> str:
    """Write a token with its white space shown."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "(empty)"


def _finite(value: Any) -> Any:
    """Put null in the place of NaN and infinity, which JSON doesn't have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
