"""Weights reach the servers through a folder of .safetensors that trainer and servers both see.

Where all servers are on the trainer's machine it lies in memory (/dev/shm), as large as the model; elsewhere it is
`rollout.weight_folder`, on a disk that all machines share. It is there while weights are handed over, and not after.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vogue.config import Config
from vogue.rollout.server_client import Server, ServerLost
from vogue.run.folder import FolderError, writing
from vogue.settings import ConfigError

MEMORY = Path("/dev/shm")
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
        with self._folder(servers) as folder:
            _write(weights, folder)
            with ThreadPoolExecutor(len(servers)) as pool:
                told = pool.map(lambda server: _read(server, folder, label), servers)
                return {server.url: why for server, why in zip(servers, told, strict=True) if why}

    @contextmanager
    def _folder(self, servers: list[Server]) -> Iterator[Path]:
        root = self._root or (MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir()))
        with writing("the weights", root):
            if self._root:
                root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="vogue_weights_", dir=root))
        try:
            folder.chmod(0o755)  # a server may be another user's
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write all weights, and gather them to the end where they can't be: the other ranks do."""
    failed: FolderError | None = None
    held: dict[str, Tensor] = {}
    size = number = 0

    def flush() -> None:
        nonlocal failed, size, number
        try:
            if held and failed is None:
                with writing("the weights", folder, SafetensorError):
                    save_file(held, folder / f"{number:05d}.safetensors")
        except FolderError as error:
            failed = error
        held.clear()
        size, number = 0, number + 1

    for name, tensor in weights:
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()  # a gathered one is gone with the next
        size += held[name].nbytes
        if size >= FILE_BYTES:
            flush()
    flush()
    if failed:
        raise failed


def _read(server: Server, folder: Path, label: str) -> str | None:
    """Let a server read its weights; returns why it couldn't."""
    try:
        server.read_weights(folder, label)
    except ServerLost as error:
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
