"""How a run's folder is read, and the names of a step's phases in its metrics; nothing slow is imported."""

import json
from pathlib import Path
from typing import Any

from vogue.settings import ConfigError

PHASES = ("data", "rollout", "reward", "train", "sync")  # of a step, one after the other
TRAIN_PHASES = ("pack", "old", "forward", "backward", "update")  # within "train"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, none where there is no file; a last line that is still being written is left out.

    Raises `ConfigError` for a line that is no JSON.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    return records
