"""Weights reach the servers' GPUs from the first rank's by NCCL: vLLM's weight transfer behind the ranks' gatherer.

    group    the first rank, and every GPU of every server: it is made anew where a server has come or gone
    source   names, dtypes and shapes, told beforehand; then tensor after tensor, each whole for as long as it is sent

Not run on a GPU yet: in the tests tensors go another way than NCCL's, between one rank or two of ZeRO-3 and servers of
vLLM on a CPU.
"""

import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vogue.model.lora import saved_buffers, whole_parameters
from vogue.rollout.engine import EngineError
from vogue.rollout.server_client import SHORT, Server, ServerLost
from vogue.rollout.vllm_input import as_in_checkpoint

from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource  # isort: skip
from vllm.distributed.weight_transfer.nccl_engine import (  # isort: skip
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU's, outside tests


class Source(WeightSource):
    """The policy's weights under the names of its checkpoint; `weights` is the next pass over them."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self.weights: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        told = as_in_checkpoint(self._model, _shapes(self._model))
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in told]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            yield name, tensor.to(DEVICE).contiguous()
            # A gathered weight's memory goes to the next one: not before it has been sent.
            torch.cuda.current_stream().synchronize()


class Fan:
    """vLLM's client of a weight transfer, for several servers at once; the i-th one's GPUs come behind the others'."""

    def __init__(self, servers: list[Server]):
        self._servers = servers
        self.sizes = [int(server.get("/get_world_size")["world_size"]) for server in servers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first = init_info["rank_offset"]
        offsets = {server.url: first + sum(self.sizes[:i]) for i, server in enumerate(self._servers)}
        self._all("init_weight_transfer_engine", lambda s: {"init_info": init_info | {"rank_offset": offsets[s.url]}})

    def start_weight_update(self) -> None:
        self._all("start_weight_update", lambda _: {})

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", lambda _: {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", lambda _: {"weight_version": weight_version})

    def _all(self, door: str, body: Callable[[Server], dict[str, Any]]) -> None:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(lambda server: server.post(f"/{door}", body(server)), self._servers))


class NcclTransfer:
    """A `vogue.rollout.server_engine.Transfer` by NCCL. A server that dies while weights are sent holds the first
    rank up.
    """

    def __init__(self, model: PreTrainedModel):
        self._source = Source(model)
        self._engine: NCCLTrainerWeightTransferEngine | None = None
        self._members: list[Server] = []

    def send(self, servers: list[Server], weights: Iterable[tuple[str, Tensor]], label: str) -> dict[str, str]:
        """Send all `servers` the weights; the ranks that have no servers only gather."""
        self._source.weights, failed = iter(weights), {}
        try:
            if servers:
                self._send(servers, label)
        except (ServerLost, RuntimeError) as error:  # RuntimeError: NCCL's
            self._close()
            failed = {server.url: str(error) for server in servers}
        for _ in self._source.weights:  # to the end: the other ranks gather, too
            pass
        return failed

    def _send(self, servers: list[Server], label: str) -> None:
        run = label.partition(":")[0]
        in_group = all(server.label().partition(":")[0] == run for server in servers)  # none has restarted
        if self._engine is None or servers != self._members or not in_group:
            self._close()
            self._engine = self._open(servers)
            self._members = servers
        for server in servers:
            server.pause()
        self._engine.send_weights()
        for server in servers:
            server.resume(label)

    def _open(self, servers: list[Server]) -> NCCLTrainerWeightTransferEngine:
        client, (address, port) = Fan(servers), _meeting_point(servers)
        # One by one, not packed: each tensor is then sent in the stream that it was gathered in.
        info = NCCLTrainerInitInfo(address, port, world_size=1 + sum(client.sizes), packed=False, rank=0)
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=self._source)

    def _close(self) -> None:
        if self._engine is not None:
            for server in self._members:
                with suppress(ServerLost, EngineError):  # of those that are gone, or have restarted
                    server.post("/shutdown_weight_transfer_engine", {}, SHORT)
            self._engine.shutdown()
        self._engine, self._members = None, []


def _shapes(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight that is gathered, whole, without its values."""
    for whole in whole_parameters(model):
        shape = getattr(whole.parameter, "ds_shape", whole.parameter.shape)
        yield whole.name, torch.empty(shape, dtype=whole.parameter.dtype, device="meta")
    for name, buffer in saved_buffers(model).items():
        yield name, torch.empty_like(buffer, device="meta")


def _meeting_point(servers: list[Server]) -> tuple[str, int]:
    """An address and port of this machine that all servers reach: the one that leads to another machine, if any is."""
    farthest = min(servers, key=lambda server: server.is_here)
    parts = urlsplit(farthest.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # of datagrams: it sends nothing
        address = probe.getsockname()[0]
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]
