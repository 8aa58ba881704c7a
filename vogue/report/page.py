"""The report's page: everything in one HTML file, and the PNGs beside it.

Text of models and data sets is data: the template escapes it, the scripts only ever set it as text, and the page's
content security policy runs these scripts alone and lets nothing be loaded.
"""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from vogue.estimates import Estimate
from vogue.report import figures
from vogue.report.runs import Method, Run, differing, group_methods, read_runs
from vogue.settings import ConfigError

HERE = Path(__file__).parent
PNGS = ("learning_curves", "pass_at_k", "exploration")  # sections that are also written as PNGs
MOST_COMPLETIONS = 2000  # on the page, over all runs
MIN_COUNT = 5  # a token seen less often isn't ranked
MOST_TOKENS = 40  # ranked
MAX_PIXELS = 100e6  # of all images on the page; about 50 MB where they are noise
SIDES = (512, 384, 256, 192, 128)  # longest side of an image on the page, in pixels: the first that fits
FACTS = {
    "Model": "model.path",
    "Training data": "data.train",
    "Held-out data": "data.test",
    "Prompts a step": "rollout.prompts",
    "Completions a prompt": "rollout.n",
    "Learning rate": "optimizer.lr",
}


@dataclass(frozen=True)
class UnsureToken:
    """A token's text, how often u_per is known for it, and its mean u_per and entropy there, in nats."""

    text: str
    count: int
    u_per: float
    entropy: float | None


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
    methods = group_methods(runs)
    sections = figures.sections(methods)
    files = {
        page.with_name(f"{page.stem}_{section.name}.png"): figures.draw(section.panels)
        for section in sections
        if section.name in PNGS
    }
    files[page] = _render(runs, methods, sections).encode()
    page.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return list(files)[::-1]


def unsure_tokens(completions: Sequence[dict[str, Any]], min_count: int = MIN_COUNT) -> list[UnsureToken]:
    """Tokens of at least `min_count` occurrences, by their mean u_per, the highest first."""
    seen: dict[str, list[tuple[float, float | None]]] = {}
    for record in completions:
        if record.get("u_per"):
            entropies = record.get("entropy") or [None] * len(record["u_per"])
            for token, u_per, entropy in zip(record["tokens"], record["u_per"], entropies, strict=True):
                seen.setdefault(token, []).append((u_per, entropy))
    rows = [
        UnsureToken(
            token,
            len(values),
            sum(u for u, _ in values) / len(values),
            _mean([h for _, h in values if h is not None]),
        )
        for token, values in seen.items()
        if len(values) >= min_count
    ]
    return sorted(rows, key=lambda row: row.u_per, reverse=True)


# ----------------------------------------------------------------------------------------------------------- page


def _render(runs: list[Run], methods: list[Method], sections: list[figures.Section]) -> str:
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": _number, "visible": _visible}
    environment.trim_blocks = environment.lstrip_blocks = True
    script = "\n".join((HERE / name).read_text() for name in ("charts.js", "browser.js"))
    logged = [(number, record) for number, run in enumerate(runs) for record in run.completions]
    shown = _evenly(logged, MOST_COMPLETIONS)
    browser = _browser(runs, shown)
    names = _pass_names(runs)
    panels = [_panel(panel) for section in sections for panel in section.panels]
    return environment.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colors={"light": figures.LIGHT, "dark": figures.DARK},
        methods=methods,
        runs=[(number, run, _held_out(run, names)) for number, method in enumerate(methods) for run in method.runs],
        facts=_facts(runs),
        differing=differing([method.settings for method in methods]),
        pass_names=names,
        sections=sections,
        phases=_phases(methods),
        tokens=unsure_tokens([record for _, record in logged])[:MOST_TOKENS],
        min_count=MIN_COUNT,
        logged=len(logged),
        browser=browser,
        data=_finite({"panels": panels, "colors": len(figures.LIGHT)} | browser),
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
    """A panel as JSON, with its points as [x, y] or [x, y, low, high]."""
    lines = [
        asdict(line) | {"points": [[v for v in astuple(point) if v is not None] for point in line.points]}
        for line in panel.lines
    ]
    return asdict(panel) | {"lines": lines}


def _phases(methods: list[Method]) -> dict[str, list[float | None]]:
    """Seconds of each phase, a value a method (mean of its runs), without phases that took no time."""
    each = [[figures.phase_seconds(run) for run in method.runs] for method in methods]
    means = {phase: [_mean([run[phase] for run in runs]) for runs in each] for phase in each[0][0]}
    return {phase: seconds for phase, seconds in means.items() if any(seconds)}


# ---------------------------------------------------------------------------------------------------- completions


def _browser(runs: list[Run], shown: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Collect what the browser of completions reads: records, their images, and the top of each colour scale."""
    paths = [
        runs[number].folder / path
        for number, record in shown
        for path in (record.get("image") or []) + (record.get("perturbed") or [])
    ]
    images = _images(list(dict.fromkeys(paths)))
    places = {path: place for place, path in enumerate(images)}
    records = []
    for number, record in shown:
        folder = runs[number].folder
        records.append(
            {name: record.get(name) for name in ("step", "answer", "category", "branch", "paid", "reward", "accuracy")}
            | {name: record.get(name) for name in ("components", "advantage", "tokens", "completion")}
            | {name: _rounded(record.get(name)) for name in ("entropy", "u_per")}
            | {"run": number, "problem": record["problem"].replace("<image>", "").strip()}
            | {name: [places[folder / path] for path in record.get(name) or []] for name in ("image", "perturbed")}
        )
    return {
        "runs": [run.name for run in runs],
        "records": records,
        "images": list(images.values()),
        "tops": {name: _top([r[name] for r in records if r[name]]) for name in ("u_per", "entropy")},
    }


def _images(paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """Each image as a data URI with its size in pixels, scaled down where all together would be too many pixels."""
    sizes = {path: size for path in paths if (size := _size(path))}
    for side in SIDES:
        scales = {path: min(1.0, side / max(size)) for path, size in sizes.items()}
        if sum(scales[path] ** 2 * math.prod(size) for path, size in sizes.items()) <= MAX_PIXELS:
            break
    return {
        path: {"uri": _uri(path, scales[path]), "size": sizes[path]} if path in sizes else {"missing": str(path)}
        for path in paths
    }


def _size(path: Path) -> tuple[int, int] | None:
    """The width and height of an image; None where the file is gone, which the page then says in its place."""
    try:
        with Image.open(path) as image:
            return image.size
    except (FileNotFoundError, UnidentifiedImageError):
        return None


def _uri(path: Path, scale: float) -> str:
    with Image.open(path) as image:
        kind, content = image.format, path.read_bytes()
        if scale < 1:
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            stream = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(stream, "WEBP", quality=80)
            kind, content = "WEBP", stream.getvalue()
    return f"data:{Image.MIME[str(kind)]};base64,{base64.b64encode(content).decode()}"


def _top(values: list[list[float]]) -> float | None:
    """The top of a colour scale: the 99th percentile, since the few tokens above it would leave the others pale."""
    if not values:
        return None
    found = np.concatenate([np.asarray(row, dtype=float) for row in values])
    return float(np.nanquantile(found, 0.99)) or float(np.nanmax(found)) or None


def _evenly(items: list, most: int) -> list:
    """Take at most so many items, evenly spread."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


# -------------------------------------------------------------------------------------------------------- numbers


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(values: list[float] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.3g}") for value in values]


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
