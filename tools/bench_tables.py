"""Tables in Markdown, for kernels/README.md and bench/README.md, of what a benchmark measured.

    python tools/bench_tables.py OUT                    # the folder that bash bench/gpu.sh OUT wrote
    python tools/bench_tables.py FILE.json              # of bench/kernels.py --json FILE.json

A section that wasn't finished, and every row with an error, is told above the tables. Nothing is left out in silence.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SECTIONS = (  # of bench/gpu.py
    *("machine", "correct", "tests", "widths", "sanitizer"),
    *("tiles", "kernels", "split", "attention", "training"),
)


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, titles)), ["---"] * len(list(titles)), *(list(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: object, digits: int = 3) -> str:
    return f"{value:,.{digits}g}" if isinstance(value, float) else "–" if value is None else str(value)


def complaints(found: dict[str, dict]) -> list[str]:
    """What is missing or failed."""
    told = [f"{name}: not run" for name in SECTIONS if name not in found]
    for name, section in found.items():
        if not section["finished"]:
            told.append(f"{name}: not finished")
        told += [f"{name}: {_named(row)}: {row['error']}" for row in section["rows"] if "error" in row]
    return told


def _named(row: dict) -> str:
    if "contender" in row:
        return f"{row['work']}, D = {row['D']}, N = {row['tokens']}, {row['contender']}"
    return row.get("what", "?")


def machine(rows: list[dict]) -> str:
    parts = []
    for row in rows:
        if row.get("what") == "versions":
            parts.append(", ".join(f"{name} {value}" for name, value in row.items() if name != "what"))
        elif row.get("what") == "ceilings" and "tflops" in row:
            rates = f"{row['tflops']:.3g} TFLOP/s, {1e3 * row['copy_tb_per_s']:.4g} GB/s copied"
            parts.append(f"{row['device']}, products of {row['dtype']}: {rates}")
    return "\n\n".join(parts)


def kernels(rows: list[dict]) -> str:
    cases = defaultdict(list)
    for row in rows:
        if "contender" in row:
            cases[row["title"], row["D"], row["V"], row["tokens"], row["dtype"], row["bound_ms"]].append(row)
    return "\n\n".join(_case(*case, given) for case, given in cases.items())


def _case(title, width, vocab, n, dtype, bound_ms, rows) -> str:
    vogue = next((row["ms"] for row in rows if row["contender"] == "vogue" and "ms" in row), None)
    lines = []
    for row in rows:
        if "ms" in row:
            ratio = figure(row["ms"] / vogue) if vogue else "–"
            memory = [figure(row[key] and row[key] / 1e6) for key in ("torch_bytes", "nvml_bytes")]
            shown = figure(row["ms"]), ratio, figure(row["tflops"]), f"{row['of_bound']:.0%}", *memory
        else:
            shown = row.get("skipped") or row["error"], "", "", "", "", ""
        lines.append((row["contender"], *shown, row["computes"]))
    heading = f"**{title}**, D = {width}, V = {vocab:,}, {dtype}, N = {n:,}; bound {figure(bound_ms)} ms"
    titles = ("", "ms", "× vogue", "TFLOP/s", "of the bound", "MB, torch", "MB, NVML", "computes")
    return f"{heading}\n\n{table(titles, lines)}"


def plain(rows: list[dict]) -> str:
    """A table for all rows that have the same keys."""
    groups = defaultdict(list)
    for row in rows:
        if "error" not in row:
            groups[tuple(row)].append(row)
    return "\n\n".join(
        table(keys, ([figure(row[key]) for key in keys] for row in given)) for keys, given in groups.items()
    )


TABLES: dict[str, Callable[[list[dict]], str]] = {"machine": machine, "kernels": kernels}


def of_folder(folder: Path) -> Iterator[str]:
    files = {name: folder / f"{name}.json" for name in SECTIONS}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    yield "\n".join(f"- {told}" for told in complaints(found))
    for name, section in found.items():
        yield f"## {name}, {section['seconds']} s\n\n{TABLES.get(name, plain)(section['rows'])}"


def of_kernels(file: Path) -> Iterator[str]:
    results = json.loads(file.read_text())
    yield ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    rows = []
    for section in results["sections"]:
        same = {name: value for name, value in section.items() if name != "rows"}
        rows += [same | row | ({} if "ms" in row else {"skipped": row["note"]}) for row in section["rows"]]
    yield kernels(rows)
    yield plain(results["errors"])


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    if path is None or not path.exists():
        print(
            "usage: python tools/bench_tables.py OUT, a folder of bench/gpu.sh or a file of kernels.py", file=sys.stderr
        )
        return 2
    print("\n\n".join(filter(None, of_folder(path) if path.is_dir() else of_kernels(path))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
