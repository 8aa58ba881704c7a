"""Whether the files of a checkpoint are those that were written: the size and the xxh3 sum of each.

A rank takes the sums of the files that it wrote itself, and each rank checks a share of all of them.
"""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from vogue.run.folder import sync

Sums = dict[str, tuple[int, str]]  # by a file's path in the checkpoint: bytes, xxh3 as hexadecimal

CHUNK = 16 << 20  # bytes read at a time


def written(folder: Path, files: Iterable[Path]) -> Sums:
    """The sums of files that were written into the checkpoint, which are on the disk by then."""
    sums = {}
    for path in files:
        sync(path)
        sums[path.relative_to(folder).as_posix()] = _sum(path)
    return sums


def damage(folder: Path, sums: Sums, rank: int, ranks: int) -> list[str]:
    """What is wrong with this rank's share of the checkpoint's files: a sentence for each file that is."""
    found = []
    for name, (size, digest) in sorted(sums.items())[rank::ranks]:
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size:,} bytes and not {size:,}")
        elif _sum(path)[1] != digest:
            found.append(f"{name} isn't what was written: its checksum differs")
    return found


def _sum(path: Path) -> tuple[int, str]:
    state, size = xxhash.xxh3_64(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
            size += len(chunk)
    return size, state.hexdigest()
