"""What the words of a command line may be: each function reads one, or raises `argparse.ArgumentTypeError`."""

import argparse


def steps(text: str) -> frozenset[int]:
    found = text.split(",")
    if not all(step.isdecimal() for step in found):
        raise argparse.ArgumentTypeError(f"{text} is not a list of steps such as 3,5")
    return frozenset(map(int, found))


def names(text: str) -> tuple[str, ...]:
    """The parts of a list with commas, each once."""
    return tuple(dict.fromkeys(text.split(",")))


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, but is {text!r}")
    return int(text)


def gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of GB above 0, but is {text!r}")
    return size


def counts(text: str) -> tuple[int, ...]:
    return tuple(map(count, text.split(",")))


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, but is {text!r}")
    return int(text)
