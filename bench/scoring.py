"""How long a step's completions take to be scored, by the kind of their answers.

    python bench/scoring.py

2,560 completions of about 1,000 tokens, 8 of each of 320 problems; no two of them give the same answer in the same
words, so that nothing is saved by asking once. Hostile ones are no numbers that a computer can hold.
"""

import argparse
import random
import time

from rich.console import Console
from rich.table import Table

from vogue.data import Sample
from vogue.rewards import score_batch, verifier
from vogue.rewards.designs import score

THOUGHT = "First we look at the image and see that the second bar is higher than the first one, by two. " * 40


def numbers(draw: random.Random) -> tuple[str, str]:
    value = draw.randint(1, 10**6)
    return f"{value + draw.randint(0, 1):,}", str(value)


def letters(draw: random.Random) -> tuple[str, str]:
    return f"({draw.choice('ABCD')}) {draw.random():.9f} cm", draw.choice("ABCD")


def latex(draw: random.Random) -> tuple[str, str]:
    a, b, c = (draw.randint(2, 10**4) for _ in range(3))
    problem = draw.randint(1, 320)
    return rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}} + {problem}x", rf"\frac{{{problem}}}{{3}}\sqrt{{7}} + {problem}x"


def prose(draw: random.Random) -> tuple[str, str]:
    words = [draw.choice(("left", "right", "on", "no", "top", "pot", "blue", "red")) for _ in range(40)]
    return " ".join(words), " ".join(draw.sample(words, 40))


def hostile(draw: random.Random) -> tuple[str, str]:
    return f"9^{{9^{{9^{{{draw.randint(10**6, 10**7)}}}}}}}", "5"


KINDS = {"numbers": numbers, "letters": letters, "latex": latex, "prose": prose, "hostile": hostile}


def seconds(kind: str, count: int) -> tuple[float, int]:
    """Seconds that `count` completions of a kind take, and how many comparisons were given up."""
    draw = random.Random(0)
    pairs = [KINDS[kind](draw) for _ in range(count)]
    completions = [f"<think>{THOUGHT}</think>\\boxed{{{given}}}" for given, _ in pairs]
    samples = [Sample("Which?", answer, ()) for _, answer in pairs]
    began = time.perf_counter()
    score_batch(completions, samples)
    return time.perf_counter() - began, verifier.take_failures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2560, help="completions (default 2560)")
    count = parser.parse_args().count
    began = time.perf_counter()
    score("\\boxed{x+1}", "1+x")
    table = Table(
        "answers",
        "seconds",
        "given up",
        title=f"{count} completions; workers start in {time.perf_counter() - began:.1f} s",
    )
    for kind in KINDS:
        spent, failures = seconds(kind, count)
        table.add_row(kind, f"{spent:.2f}", str(failures))
    Console().print(table)


if __name__ == "__main__":
    main()
