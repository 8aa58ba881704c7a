"""What every rank is doing when one of them hangs: output_dir/stacks_rank0.txt and so on, a stack for each thread.

The others wait for it for `trainer.timeout` seconds at most. A rank writes its stacks down after WAITED of that,
counted from its start or the beginning of a step, and whatever it is doing; they are gone with the next step.
"""

import faulthandler
from pathlib import Path

WAITED = 0.8


class LostRank(RuntimeError):
    """Another rank that no longer answers: it hangs, or has ended."""


class Stacks:
    """The file of a rank's stacks; a context manager, whose file stays where an error ends the run."""

    def __init__(self, folder: Path, rank: int, timeout: float):
        self.path = folder / f"stacks_rank{rank}.txt"
        self.seconds = WAITED * timeout

    def __enter__(self) -> "Stacks":
        self._file = open(self.path, "w")
        return self

    def rearm(self) -> None:
        """Begin to count anew."""
        faulthandler.cancel_dump_traceback_later()
        self._file.truncate(0)
        self._file.seek(0)
        faulthandler.dump_traceback_later(self.seconds, file=self._file)

    def __exit__(self, kind, *_) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if kind is None or not self.path.stat().st_size:
            self.path.unlink(missing_ok=True)
