"""What the runs of a sweep say: held-out pass@k of each variant, its difference from its baseline, and their training.

Seeds and problems are both a draw from many, and every run answers the same problems; `vogue.estimates` says how
intervals and p are computed. Differences are paired seed by seed and problem by problem.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vogue.estimates import Estimate, interval, pass_at_k, sign_flip
from vogue.run.folder import PHASES, read_rows
from vogue.run.stages import Stage
from vogue.settings import ConfigError

PASS_AT = (1, 4)
TAIL = 0.2  # share of the steps that training is judged by, the last ones
TRAINING = {
    "entropy": "entropy (nats a token)",
    "distinct_answers": "distinct answers a group",
    "u_per": "u_per (nats a token)",
    "perception_kl": "KL(x‖T(x)) (nats a token)",
    "seconds": "seconds a step",
    "generated": "tokens generated",
}


@dataclass(frozen=True)
class Outcome:
    """A done run: how many of each problem's `n` completions were right, (P,), and the means of its training.

    `problems` tells the problems from others; None of a run that hasn't noted it.
    """

    n: int
    problems: str | None
    before: list[int]
    after: list[int]
    training: dict[str, float]


def read_outcome(folder: Path, before: Sequence[Stage] = ()) -> Outcome:
    """Of a run's folder: its first and last evaluation, and TRAINING where its metrics have it.

    What it generated includes the stages `before`, which made the model that it began with.

    Raises `ConfigError` where the two evaluations are of different problems.
    """
    first, *_, last = read_rows(folder / "evaluations.jsonl")
    if first.get("problems") != last.get("problems"):
        raise ConfigError(f"{folder}: its first and its last evaluation are of different problems")
    rows = read_rows(folder / "metrics.jsonl")
    tail = rows[-max(1, round(TAIL * len(rows))) :]
    found = {name: [row[name] for row in tail if name in row] for name in TRAINING}
    training = {name: mean(values) for name, values in found.items() if values}
    training["seconds"] = median(sum(row.get(f"time/{phase}", 0.0) for phase in PHASES) for row in rows)
    logged = ((stage.steps, read_rows(stage.folder / "metrics.jsonl")) for stage in before)
    earlier = [row for steps, of_stage in logged for row in of_stage if row["step"] < steps]
    if counted := [row["generated_tokens"] for row in earlier + rows if "generated_tokens" in row]:
        training["generated"] = sum(counted)
    return Outcome(last["n"], last.get("problems"), first["right"], last["right"], training)


def baselines_of(variants: Iterable[str], named: Mapping[str, str]) -> dict[str, str]:
    """What each variant is compared with: itself, where it is what others are compared with."""
    first, *others = variants
    own = {first, *named.values()}
    return {name: name if name in own else named.get(name, first) for name in (first, *others)}


def compare(outcomes: dict[str, dict[int, Outcome]], baselines: Mapping[str, str] | None = None) -> dict:
    """The table of {variant: {seed: outcome}}, as JSON values.

    `baselines` names what a variant is compared with; the first variant, where it doesn't.

    before      baseline: {pass@k: [mean, low, high]}, of its first run or that of what is compared with it
    variants    name: baseline, seeds, and by name of the value {pass@k: [mean, low, high]}, differences {pass@k:
                [mean, low, high]} and p {pass@k: p} over `paired` seeds, and {one of TRAINING: [mean, standard
                deviation]} over the seeds; no differences where no seed is in both, null for the deviation of one seed

    Raises `ConfigError` where runs were evaluated on different problems, so that nothing could be paired.
    """
    _check_paired(outcomes)
    baseline_of = baselines_of(outcomes, baselines or {})
    some = next(runs for runs in outcomes.values() if runs)
    ks = [k for k in PASS_AT if k <= next(iter(some.values())).n]
    before: dict[str, dict[str, list[float]]] = {}
    variants: dict[str, dict[str, Any]] = {}
    for name, runs in outcomes.items():
        row: dict[str, Any] = {"baseline": baseline_of[name], "seeds": list(runs)}
        variants[name] = row
        if not runs:
            continue
        if row["baseline"] not in before:
            before[row["baseline"]] = {f"pass@{k}": _interval(_solved(runs, runs, k, "before")) for k in ks}
        row["held_out"] = {f"pass@{k}": _interval(_solved(runs, runs, k, "after")) for k in ks}
        other = outcomes[row["baseline"]]
        paired = [seed for seed in runs if seed in other]
        if name != row["baseline"] and paired:
            apart = {f"pass@{k}": _solved(runs, paired, k, "after") - _solved(other, paired, k, "after") for k in ks}
            row["paired"] = paired
            row["difference"] = {key: _interval(values) for key, values in apart.items()}
            row["p"] = {key: sign_flip(values.mean(axis=1)) for key, values in apart.items()}
        found = {key: [run.training[key] for run in runs.values() if key in run.training] for key in TRAINING}
        row["training"] = {
            key: [mean(values), stdev(values) if len(values) > 1 else None] for key, values in found.items() if values
        }
    return {"before": before, "variants": variants}


def _check_paired(outcomes: dict[str, dict[int, Outcome]]) -> None:
    runs = [(f"{variant}/seed_{seed}", one) for variant, runs in outcomes.items() for seed, one in runs.items()]
    name, first = runs[0]
    for other, one in runs:
        is_told = one.problems is not None and first.problems is not None
        if {len(one.before), len(one.after)} != {len(first.after)} or (is_told and one.problems != first.problems):
            raise ConfigError(
                f"{other} was evaluated on {len(one.after)} problems, which aren't the {len(first.after)} of {name}: "
                "nothing can be paired. Settings that make prompts longer leave out others with data.overlong=drop"
            )


def _solved(runs: dict[int, Outcome], seeds, k: int, when: str) -> np.ndarray:
    """pass@k (S, P) of `seeds`, `when` before or after training."""
    return np.array([[pass_at_k(runs[seed].n, right, k) for right in getattr(runs[seed], when)] for seed in seeds])


def _interval(values: np.ndarray) -> list[float]:
    found = interval(values)
    return [found.value, found.low, found.high]


# ---------------------------------------------------------------------------------------------------------- table


def metrics_of(compared: dict) -> list[str]:
    """The names of what is held out: pass@1 and, of enough completions, pass@4."""
    return list(next(iter(compared["before"].values())))


def tokens_over_baseline(compared: dict, variant: str) -> float | None:
    """How many times its baseline's tokens a variant generated; None where either isn't known."""
    row = compared["variants"][variant]
    counts = [one.get("training", {}).get("generated") for one in (row, compared["variants"][row["baseline"]])]
    return counts[0][0] / counts[1][0] if all(counts) else None


def tables(compared: dict, seeds: int) -> list[list[list[str]]]:
    """Two tables of text, held-out problems and training, each a list of rows and the first their heads.

    `seeds`: how many each variant is to have.
    """
    names, variants, first = metrics_of(compared), compared["variants"], next(iter(compared["variants"]))
    several = len(compared["before"]) > 1
    minus = "minus its baseline" if several else f"minus {first}"
    held_out = [["variant", "seeds", *(head for name in names for head in (name, minus, "p"))]]
    for baseline, found in compared["before"].items():
        label = "(before training)" if baseline == first else f"(before training, {baseline})"
        held_out.append([label, "", *(cell for e in found.values() for cell in (_percent(e), "", ""))])
    shown = [name for name in TRAINING if any(name in row.get("training", {}) for row in variants.values())]
    training = [["variant", *(TRAINING[name] for name in shown)]]
    for variant, row in variants.items():
        count = len(row["seeds"])
        own = "" if row["baseline"] in (first, variant) else f" (baseline: {row['baseline']})"
        cells = [variant + own, str(count) if count == seeds else f"{count} of {seeds}"]
        for name in names if count else ():
            cells.append(_percent(row["held_out"][name]))
            cells += [_points(row["difference"][name]), f"{row['p'][name]:.3g}"] if "p" in row else ["", ""]
        held_out.append(cells + [""] * (len(held_out[0]) - len(cells)))
        training.append([variant, *(_spread(row.get("training", {}).get(name)) for name in shown)])
    return [held_out, training]


def notes(compared: dict) -> list[str]:
    """What the tables' figures are."""
    variants = compared["variants"]
    pairs = max((len(row["paired"]) for row in variants.values() if "paired" in row), default=0)
    lines = ["Held-out problems: mean over seeds and problems, with the 95% interval of a bootstrap over both."]
    if pairs:
        others = "" if len(compared["before"]) == 1 else ", or from the baseline that stands behind the name,"
        lines.append(
            f"Differences from {next(iter(variants))}{others} in points, paired by seed and problem; p is that of the "
            f"exact two-sided sign-flip test over the seeds, which {pairs} of them can't bring below {2 / 2**pairs:.3g}"
            ", not corrected for the number of variants."
        )
    last = (
        f"means over the last {TAIL:.0%} of the steps, entropy and u_per of tokens trained on, u_per where it is paid"
    )
    cost = (
        f"seconds: the median of {' + '.join(PHASES)}; tokens: of the whole run and the stages before it, measurements "
        "of samples included"
    )
    lines.append(f"Training: {last}; {cost}; ± the standard deviation over seeds.")
    return lines


def show(compared: dict, seeds: int, console: Console) -> None:
    for header, *rows in tables(compared, seeds):
        table = Table()
        for name in header:
            table.add_column(escape(name), no_wrap=name == "variant")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in notes(compared):
        console.print(line, markup=False, highlight=False)


def markdown(compared: dict, seeds: int) -> str:
    blocks = []
    for header, *rows in tables(compared, seeds):
        lines = [header, ["---"] * len(header), *rows]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*blocks, *notes(compared)]) + "\n"


def _percent(estimate: list[float]) -> str:
    return str(Estimate(*estimate))


def _points(estimate: list[float]) -> str:
    value, low, high = (100 * part for part in estimate)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _spread(estimate: list[float | None] | None) -> str:
    if estimate is None:
        return ""
    center, deviation = estimate
    if center is not None and center >= 1000:  # a count
        return f"{center:,.0f}" if deviation is None else f"{center:,.0f} ± {deviation:,.0f}"
    return f"{center:.3g}" if deviation is None else f"{center:.3g} ± {deviation:.2g}"
