"""We-Math (arXiv 2407.01284, github.com/We-Math/We-Math): problems of two and three steps, and each step on its own.

Asked with question and options; its own prompt also names a form of the answer, which here is the reward design's.
Scored by the letter. Of a problem and its steps, all answered in one attempt:

    problem wrong    IK  insufficient knowledge      a step is wrong
                     IG  inadequate generalisation   every step is right
    problem right    CM  complete mastery            every step is right (strict), at least one is (loose)
                     RM  rote memorisation           otherwise

    score = mean(CM + IG / 2)        IK, IG, CM: share of the problems        RM: share of the problems that are right

Ours: problems of which a step is missing, cut off by `data.test_limit` say, are left out of these.
"""

import re
from collections.abc import Sequence

from vogue.benchmarks.benchmark import Benchmark, Line, Problem, Right, Share, by_group
from vogue.benchmarks.extract import Form, options

CHOICE = re.compile(r"([A-H])\s*\.\s*(.*?)\s*(?:;\s*(?=[A-H]\s*\.)|;?\s*$)", re.DOTALL)
STEPS = {"1": "one-step", "2": "two-step", "3": "three-step"}


def _form(row: dict) -> Form:
    return options(dict(CHOICE.findall(row["option"])))


def _groups(problem: Problem) -> tuple[str]:
    steps, part = problem.row["key"].split("steps_")
    return (STEPS[steps if part == "multi" else "1"],)


def _table(problems: Sequence[Problem], right: Right) -> list[Line | Share]:
    steps: dict[tuple[str, str], Right] = {}
    whole: dict[tuple[str, str], tuple[bool, ...]] = {}
    for problem, attempts in zip(problems, right, strict=True):
        count, part = problem.row["key"].split("steps_")
        name = (count, problem.row["ID"])
        if part == "multi":
            whole[name] = attempts
        else:
            steps.setdefault(name, []).append(attempts)
    complete = [(whole[name], steps[name]) for name in whole if len(steps.get(name, ())) == int(name[0])]
    return by_group(problems, right, _groups) + (_mastery(complete) if complete else [])


def _mastery(complete: Sequence[tuple[tuple[bool, ...], Right]]) -> list[Share]:
    """IK, IG, CM and RM of a problem, each averaged over its attempts."""
    shares: dict[str, list[tuple[float, float]]] = {}
    for whole, steps in complete:
        counts: dict[str, int] = dict.fromkeys(("IK", "IG", "CM strict", "CM loose", "RM strict", "RM loose"), 0)
        for solved, *known in zip(whole, *steps, strict=True):
            if not solved:
                counts["IG" if all(known) else "IK"] += 1
            else:
                counts["CM strict" if all(known) else "RM strict"] += 1
                counts["CM loose" if any(known) else "RM loose"] += 1
        n = len(whole)
        for name in ("IK", "IG", "CM strict", "CM loose"):
            shares.setdefault(name, []).append((counts[name] / n, 1))
        for how in ("strict", "loose"):
            shares.setdefault(f"RM {how}", []).append((counts[f"RM {how}"] / n, sum(whole) / n))
            shares.setdefault(f"score {how}", []).append(((counts[f"CM {how}"] + counts["IG"] / 2) / n, 1))
    return [Share(name, parts) for name, parts in shares.items()]


WEMATH = Benchmark(
    hub="hub:We-Math/We-Math@testmini",
    files=("testmini.json",),
    columns=("ID", "key", "question", "option", "answer", "image_path"),
    images=("image_path",),
    prompt=lambda row: f"{row['question']}\nOptions: {row['option']}",
    answer=lambda row: row["answer"],
    form=_form,
    is_right=lambda answer, row: answer == row["answer"],
    table=_table,
)
