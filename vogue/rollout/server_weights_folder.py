"""Weights reach the servers through a folder of .safetensors that trainer and servers both see.

Where all servers are on the trainer's machine it lies in memory (/dev/shm), as large as the model; elsewhere it is
`rollout.weight_folder`, on a disk that all machines share. It is there while weights are handed over, and not after;
what a killed run has left in memory, the next one deletes.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vogue.config import Config
from vogue.rollout.engine import EngineError
from vogue.rollout.server_client import Server, ServerLost
from vogue.run.folder import FolderError, writing
from vogue.settings import ConfigError

MEMORY = Path("/dev/shm")
PREFIX, LOCK = "vogue_weights_", ".lock"  # of a folder; its writer holds the lock
FILE_BYTES = 1 << 30  # of a file, so that the first rank holds no more than that of the model at a time


class WeightFolder:
    """A `vogue.rollout.server_engine.Transfer` by a folder."""

    def __init__(self, config: Config):
        self._root = config.rollout.weight_folder

    def send(self, servers: list[Server], weights: Iterable[tuple[str, Tensor]], label: str) -> dict[str, str]:
        """Write the weights and let all `servers` read them; the ranks that have no servers only gather."""
        if not servers:
            for _ in weights:
                pass
            return {}
        weights = iter(weights)
        try:
            with self._folder() as folder:
                _write(weights, folder)
                with ThreadPoolExecutor(len(servers)) as pool:
                    told = pool.map(lambda server: _read(server, folder, label), servers)
                    return {server.url: why for server, why in zip(servers, told, strict=True) if why}
        except FolderError as error:
            return {server.url: f"{server.url}: {error}" for server in servers}
        finally:
            for _ in weights:  # to the end where they couldn't be written: the other ranks gather, too
                pass

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        root = self._root or (MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir()))
        with writing("the weights", root):
            if self._root:
                root.mkdir(parents=True, exist_ok=True)
            if root == MEMORY:
                _clear()
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
            folder.chmod(0o755)  # a server may be another user's
            lock = open(folder / LOCK, "w")  # noqa: SIM115  # until the folder is gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def _clear() -> None:
    """Delete what processes that were killed in the middle have left in this machine's memory, as large as a model."""
    for lock in MEMORY.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), open(lock) as opened:  # gone meanwhile, somebody else's, or locked: its writer lives
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _write(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    held: dict[str, Tensor] = {}
    size = number = 0

    def flush() -> None:
        nonlocal size, number
        if held:
            with writing("the weights", folder, SafetensorError):
                save_file(held, folder / f"{number:05d}.safetensors")
        held.clear()
        size, number = 0, number + 1

    for name, tensor in weights:
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()  # a gathered one is gone with the next
        size += held[name].nbytes
        if size >= FILE_BYTES:
            flush()
    flush()


def _read(server: Server, folder: Path, label: str) -> str | None:
    """Let a server read its weights; returns why it couldn't."""
    try:
        server.read_weights(folder, label)
    except (ServerLost, EngineError) as error:
        return str(error)
    return None


def check_folder(config: Config) -> None:
    """Raise `ConfigError` where servers on other machines couldn't see the weights."""
    rollout = config.rollout
    far = [url for url in rollout.servers if not Server(url, 0).is_here]
    if far and rollout.weight_folder is None:
        raise ConfigError(
            f"rollout.weight_folder is not set: {far[0]} is on another machine, and reads the weights from a folder "
            "that all machines share"
        )
