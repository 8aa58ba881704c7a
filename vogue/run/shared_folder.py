"""Whether all ranks have the same `trainer.output_dir`: found out at the start, not at the first checkpoint."""

import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from vogue import distributed
from vogue.run import launch
from vogue.run.folder import kept_for_a_while

PATIENCE = 10.0  # seconds; a network's file system may show a new file late


def problems(folder: Path) -> list[str]:
    """What to tell where a rank doesn't see what the first one writes to the folder; every rank calls, and gets it.

    Leaves nothing behind. That the first rank can't write there is others' to tell.
    """
    if launch.ranks() == 1:
        return []
    with ExitStack() as held:
        mine = None
        if launch.rank() == 0:
            with suppress(OSError, ValueError):
                held.enter_context(kept_for_a_while(folder))
                mine = Path(held.enter_context(NamedTemporaryFile(dir=folder, prefix=".shared-")).name).name
        written = distributed.gather((mine, socket.gethostname()))
        name, first = written[0]
        is_seen = name is None or _appears(folder / name)
        blind = [rank for rank, seen in enumerate(distributed.gather(is_seen)) if not seen]
    if not blind:
        return []
    rank, host = blind[0], written[blind[0]][1]
    return [
        f"trainer.output_dir={folder} isn't one folder for all ranks: rank {rank} on {host} doesn't see what rank 0 on "
        f"{first} writes there; it must lie on a disk that all nodes share"
    ]


def _appears(path: Path) -> bool:
    """Whether a file can be seen within PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        with suppress(OSError):  # an NFS client reads the folder again when it is listed
            next(path.parent.iterdir(), None)
        time.sleep(0.1)
    return True
