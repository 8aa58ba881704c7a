"""vLLM generates in servers of its own, on other GPUs or machines than the policy's, and is asked over HTTP.

Servers are given (`rollout.servers`, each started by `vogue serve`), or started and ended by the run itself on
`rollout.server_gpus`. A rank asks for its own prompts; each goes to the server that has the fewest of the rank's.

    load_weights   the ranks gather the weights, the first one hands them to all servers under the label RUN:VERSION
    generate       a completion counts only if all of its tokens were sampled under that label
    up_to_date     between two rollouts: a server that has restarted is found, and is to be given the weights again

A server that fails is taken out, and its prompts go to the others. Seeds belong to requests, so that the step stays the
same. It is back in from the next sync on that reaches it.
"""

import secrets
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vogue import distributed
from vogue.config import Config
from vogue.families import family_of_processor
from vogue.rollout.engine import BAN, Completion, EngineError, Request, media_token_ids
from vogue.rollout.sampling import Sampling, until_stop
from vogue.rollout.server_client import UNTOUCHED, Server, ServerLost
from vogue.rollout.server_weights_folder import WeightFolder
from vogue.rollout.serving import check_servers, patience, start_servers, uses_nccl
from vogue.rollout.vllm_input import FEATURES, PromptInputs, as_in_checkpoint, encoded, sampling_arguments
from vogue.run.folder import FolderError
from vogue.run.memory import check_images

PARALLEL = 256  # requests of a rank at a time
PAUSE = 0.2  # seconds between two looks whether a server is up

Result = TypeVar("Result")


class Transfer(Protocol):
    """How weights reach the servers."""

    def send(self, servers: list[Server], weights: Iterable[tuple[str, Tensor]], label: str) -> dict[str, str]:
        """Give all `servers` the weights; every rank calls. Returns, on the first rank, why by the URLs that failed."""
        ...


class ServerEngine:
    """A `vogue.rollout.engine.Engine` on servers of vLLM.

    `model` is the one whose weights the servers are to follow; None where they keep the checkpoint's.

    Raises `EngineError`, on all ranks, where a server doesn't come up in `rollout.server_timeout`, refuses, or, without
    a `model`, serves another one than `model.path`.
    """

    def __init__(self, config: Config, processor: ProcessorMixin, model: PreTrainedModel | None):
        check_images(family_of_processor(processor))
        check_servers(config)
        self._first = not dist.is_initialized() or dist.get_rank() == 0
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._model: Any = model
        self._tokenizer = processor.tokenizer
        self._inputs = PromptInputs(processor, getattr(torch, config.model.dtype))
        self._banned = {token: BAN for token in media_token_ids(processor)}
        self._run, self.version = _agreed(secrets.token_hex(4)), 0
        given = [Server(url.rstrip("/"), patience(config)) for url in config.rollout.servers]
        self._live: list[Server] = []
        self._why: dict[str, str] = {}  # by URL: what was last wrong with a server that is out
        self._busy: Counter[str] = Counter()  # requests of this rank in flight, by URL
        self._choosing = threading.Lock()
        logs = config.trainer.output_dir if dist.is_initialized() else None  # an evaluation has no folder of its own
        with _together(EngineError, FolderError):  # the first rank alone starts servers and gives them weights
            self._servers = (given or start_servers(config, logs)) if self._first else []
            for server in self._servers:
                self._meet(server, config)
        self._servers = _agreed(self._servers)
        self._transfer: Transfer = _transfer(config, model)
        self.up_to_date()

    # ------------------------------------------------------------------------------------------------- generating

    def generate(self, requests: list[Request], n: int, sampling: Sampling) -> list[list[Completion]]:
        """As `Engine.generate`, from any thread; raises `EngineError` where no server is left."""
        if not requests:
            return []
        # Each makes features of its images, in which OpenMP's threads of all of them would be in one another's way.
        with ThreadPoolExecutor(min(PARALLEL, len(requests)), initializer=distributed.one_openmp_thread) as pool:
            return list(pool.map(lambda request: self._ask_any(request, n, sampling), requests))

    def everywhere(self, request: Request, sampling: Sampling) -> list[Completion]:
        """A completion of the request by each server that is in."""
        found = []
        for server in tuple(self._live):
            try:
                found += self._ask(server, request, 1, sampling)
            except ServerLost as error:
                self._take_out(server, error)
        return found

    def _ask_any(self, request: Request, n: int, sampling: Sampling) -> list[Completion]:
        while True:
            with self._choosing:
                if not self._live:
                    raise EngineError(f"rollout.engine=server: no server is left: {self._reasons()}")
                turned = self._live[self._rank % len(self._live) :] + self._live[: self._rank % len(self._live)]
                server = min(turned, key=lambda server: self._busy[server.url])  # ranks begin with different ones
                self._busy[server.url] += 1
            try:
                return self._ask(server, request, n, sampling)
            except ServerLost as error:
                self._take_out(server, error)
            finally:
                with self._choosing:
                    self._busy[server.url] -= 1

    def _ask(self, server: Server, request: Request, n: int, sampling: Sampling) -> list[Completion]:
        given: Any = self._inputs.of(request)
        body = {
            "token_ids": given["prompt_token_ids"],
            "sampling_params": sampling_arguments(sampling, n, request.seed, self._banned),
        }
        if FEATURES in given:
            body["features"] = {
                "mm_hashes": given["mm_hashes"],
                "mm_placeholders": {
                    kind: [{"offset": span.offset, "length": span.length} for span in spans]
                    for kind, spans in given["mm_placeholders"].items()
                },
                "kwargs_data": encoded(given)[FEATURES],
            }
        choices = server.generate(body, self._label)
        return [self._completion(choice, request.prompt.opened, sampling) for choice in choices]

    def _completion(self, choice: dict[str, Any], opened: str, sampling: Sampling) -> Completion:
        token_ids, said = tuple(choice["token_ids"]), choice["logprobs"]["content"]
        if [item["token_id"] for item in said] != list(token_ids):
            raise RuntimeError("vLLM's log-probabilities are of other tokens than it sampled")
        text = opened + until_stop(self._tokenizer.decode(token_ids, skip_special_tokens=True), sampling.stop)
        logprobs = tuple(item["logprob"] for item in said)
        return Completion(token_ids, logprobs, text, choice["finish_reason"] == "stop")

    # ---------------------------------------------------------------------------------------------------- weights

    @property
    def _label(self) -> str:
        return UNTOUCHED if self._model is None else f"{self._run}:{self.version}"

    def sleep(self) -> None:
        """Nothing: the servers' memory isn't the trainer's."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the weights to all servers that can be reached; every rank calls, and knows afterwards which have them.

        Those that can't are out, with a warning. Where none is left the next `generate` says so.
        """
        self.version = version
        labels = self._labels(self._servers)
        reachable = [server for server in self._servers if isinstance(labels.get(server.url), str)]
        failed = self._transfer.send(reachable, as_in_checkpoint(self._model, weights), self._label)
        labels |= {url: ServerLost(why) for url, why in failed.items()}
        # What hasn't answered a moment ago isn't waited for again.
        self._see(labels | self._labels([server for server in reachable if server.url not in failed]))

    def up_to_date(self) -> bool:
        """Whether no server that answers has other weights than those of `version`; every rank calls.

        Those that have them are in from here on, the others out.
        """
        return self._see(self._labels(self._servers))

    def _see(self, labels: dict[str, str | ServerLost]) -> bool:
        """Take servers in and out, on all ranks, by what the first one has found; as `up_to_date` returns."""
        labels = _agreed(labels)
        found = {url: label for url, label in labels.items() if isinstance(label, str)}
        with self._choosing:
            self._live = [server for server in self._servers if found.get(server.url) == self._label]
        for server in self._servers:
            if server not in self._live:
                told = found.get(server.url)
                why = f"{server.url}: its weights are {told}" if told else str(labels[server.url])
                self._take_out(server, ServerLost(why))
        return all(label == self._label for label in found.values())

    def _labels(self, servers: list[Server]) -> dict[str, str | ServerLost]:
        """By URL the label of each server's weights, or what is wrong with it; of none on ranks but the first."""

        def asked(server: Server) -> tuple[str, str | ServerLost]:
            try:
                return server.url, server.label()
            except (ServerLost, EngineError) as error:  # what it refuses doesn't end a run that others can go on with
                return server.url, ServerLost(str(error))

        if not (self._first and servers):
            return {}
        with ThreadPoolExecutor(len(servers)) as pool:
            return dict(pool.map(asked, servers))

    def _meet(self, server: Server, config: Config) -> None:
        """Wait until a server is up; if it still has the weights of `model.path` they get the engine's label."""
        seconds = config.rollout.server_timeout
        end = time.monotonic() + seconds
        while True:
            try:
                label, path = server.label(), server.model()
                is_untouched = label == UNTOUCHED and path == config.model.path
                if self._model is None and not is_untouched:
                    raise EngineError(
                        f"rollout.servers: {server.url}: its weights are {path}'s with the label {label}, not those of "
                        f"model.path={config.model.path}. Start it anew by `vogue serve` with these settings"
                    )
                if is_untouched and self._model is not None:
                    server.set_label(self._label)
                return
            except ServerLost as error:
                if time.monotonic() > end:
                    raise EngineError(
                        f"rollout.servers: not up in rollout.server_timeout={seconds:g}: {error}"
                    ) from None
            time.sleep(PAUSE)

    def _take_out(self, server: Server, error: ServerLost) -> None:
        with self._choosing:
            was_in = server in self._live
            self._live = [other for other in self._live if other != server]
            known = self._why.get(server.url)
            self._why[server.url] = str(error)
        if was_in or known != str(error):
            warnings.warn(f"a rollout server is out: {error}", stacklevel=2)

    def _reasons(self) -> str:
        return "; ".join(self._why.values())


def _transfer(config: Config, model: PreTrainedModel | None) -> Transfer:
    if model is None or not uses_nccl(config):
        return WeightFolder(config)
    from vogue.rollout.server_weights_nccl import NcclTransfer  # of vLLM's on GPUs

    return NcclTransfer(model)


def _agreed(value: Result) -> Result:
    """The first rank's value, on all ranks."""
    return distributed.gather(value, Server, ServerLost)[0] if dist.is_initialized() else value


def _together(*kinds: type[Exception]) -> AbstractContextManager[None]:
    """What one rank raises in the block all raise, where there are several."""
    return distributed.together(*kinds) if dist.is_initialized() else nullcontext()
