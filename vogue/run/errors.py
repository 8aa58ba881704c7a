"""Which rank says what ended a run: every message comes once, and names its rank where it isn't that of all ranks.

What all ranks have agreed on in a collective, the first one says. What a rank finds by itself, it says itself, unless
another one that has met it says the same: that is asked of the store by which the ranks have met, in no collective,
which the others may never come to.
"""

import hashlib
import socket
import sys
import threading
from typing import TypeVar

from vogue.run import launch
from vogue.run.stacks import LostRank

OF = "vogue_rank"  # what an error that all ranks raise has as an attribute: whose it is, None where it is everybody's
PATIENCE = 5.0  # seconds for the store's answer; the rank that has it may hang

Raised = TypeVar("Raised", bound=BaseException)


def agreed(error: Raised, rank: int | None) -> Raised:
    """The same error, marked as one that all ranks raise; `rank` is whose it is, None for all of them."""
    setattr(error, OF, rank)
    return error


def reworded(error: Raised, text: str) -> Raised:
    """An error of the same kind with another text, and as agreed on as the first one."""
    new = type(error)(text)
    return agreed(new, getattr(error, OF)) if hasattr(error, OF) else new


def tell(command: str, error: BaseException, text: str) -> None:
    """Print an error's text to standard error, where this rank is the one to do it."""
    whose = _whose(error, text)
    if whose is not None:
        print(f"vogue {command}: {whose}{text}", file=sys.stderr, flush=True)


def tell_crash(error: Exception) -> None:
    """Say in a line what the traceback above means, or whose it is among those of several ranks."""
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    if _is_out_of_memory(error):
        what = f"out of memory: {what}. `vogue plan` says what a run takes, docs/memory.md what can be changed"
    elif launch.ranks() == 1:
        return
    whose = f"rank {launch.rank()} on {socket.gethostname()}: " if launch.ranks() > 1 else ""
    print(f"vogue: {whose}{what}", file=sys.stderr, flush=True)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short: of Python, of a GPU, or of a CPU's tensors, where torch has no type for it."""
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_type or "can't allocate memory" in str(error)


def _whose(error: BaseException, text: str) -> str | None:
    """What is to stand before the text; None where this rank says nothing."""
    rank = launch.rank()
    if launch.ranks() == 1:
        return ""
    if hasattr(error, OF):
        whose = getattr(error, OF)
        return None if rank else "" if whose is None else f"rank {whose}: "
    store = _store()
    if store is None:  # a wrong setting, most often: every node may have read another file
        return None if not launch.is_first_of_node() else f"rank {rank}: " if rank else ""
    said = type(error).__name__ if isinstance(error, LostRank) else text  # of the same loss in other words
    return f"rank {rank}: " if _is_first(store, said) else None


def _store():
    """The store by which the ranks have met, None where they haven't."""
    dist = sys.modules.get("torch.distributed")  # importing torch takes seconds
    if dist is None or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def _is_first(store, said: str) -> bool:
    """Whether no other rank has said this; true where nobody answers."""
    counts: list[int] = []

    def count() -> None:
        try:
            counts.append(store.add(f"vogue/said/{hashlib.sha256(said.encode()).hexdigest()}", 1))
        except RuntimeError:  # the store's rank has ended
            return

    asking = threading.Thread(target=count, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return counts in ([], [1])
