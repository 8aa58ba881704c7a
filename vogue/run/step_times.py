"""What a row of metrics says of its step's time: seconds, and how they are shared by the step's phases."""

from collections.abc import Mapping, Sequence

from vogue.run.folder import PHASES, TRAIN_PHASES


def seconds_of(row: Mapping[str, float]) -> float:
    """Seconds that a step took, all its phases together."""
    return sum(row.get(f"time/{phase}", 0.0) for phase in PHASES)


def phase_seconds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds a step of each phase, 0 of no steps; "train" as its parts, and what is left of it."""
    seconds = {}
    for phase in (*PHASES, *TRAIN_PHASES):
        values = [row.get(f"time/{phase}", 0.0) for row in rows]
        seconds[phase] = sum(values) / max(1, len(values))
    rest = seconds.pop("train") - sum(seconds[phase] for phase in TRAIN_PHASES)
    order = ("data", "rollout", "reward", *TRAIN_PHASES, "rest of train", "sync", "wait")
    seconds["rest of train"] = max(0.0, rest)
    return {phase: seconds[phase] for phase in order}


def duration(seconds: float) -> str:
    """Write a time as people say it: 4.2 s, 12 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
