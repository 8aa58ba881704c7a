"""One table in Markdown, and one figure, of several sweeps: what each variant gains on each task, and its tokens.

    python tools/sweep_tables.py digits=runs/sweeps/methods/table.json checkers=… --out docs/methods.png

Differences are in points from the variant's baseline, paired by seed; * marks those whose 95% interval leaves 0 out.
"""

import argparse
import json
from pathlib import Path

from vogue.report.differences import plot_differences
from vogue.sweep_table import metrics_of, tokens_over_baseline


def cells(compared: dict, variant: str) -> list[str]:
    """A variant's differences and its tokens over its baseline's; dashes where the sweep doesn't have it."""
    metrics, row = metrics_of(compared), compared["variants"].get(variant, {})
    if "difference" not in row:
        return ["–"] * (len(metrics) + 1)
    found = []
    for value, low, high in (row["difference"][metric] for metric in metrics):
        found.append(f"{100 * value:+.1f}{'' if low <= 0 <= high else '*'}")
    tokens = tokens_over_baseline(compared, variant)
    return [*found, "–" if tokens is None else f"{tokens:.1f}"]


def table(sweeps: dict[str, dict]) -> str:
    heads = [f"{name}: {head}" for name, one in sweeps.items() for head in (*metrics_of(one), "tokens")]
    compared = (name for one in sweeps.values() for name, row in one["variants"].items() if "difference" in row)
    rows = [[name, *(cell for one in sweeps.values() for cell in cells(one, name))] for name in dict.fromkeys(compared)]
    lines = [["variant", *heads], ["---"] * (1 + len(heads)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", metavar="NAME=table.json", help="what `vogue sweep` left, and a name")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="where the figure goes")
    arguments = parser.parse_args()
    named = (text.partition("=") for text in arguments.sweeps)
    sweeps = {name: json.loads(Path(file).read_text()) for name, _, file in named}
    print(table(sweeps))
    if arguments.out:
        plot_differences(sweeps, arguments.out)


if __name__ == "__main__":
    main()
