"""One server of vLLM as the trainer sees it: the few requests over HTTP that a rollout and a weight sync are made of.

    POST /inference/v1/generate            token ids and image features in, token ids and log-probabilities out
    POST /pause, /collective_rpc, /resume  new weights, while nothing is generated
    GET  /weight_info                      the label of the weights; every completion says it, too

The key of servers that ask for one is the environment variable VLLM_API_KEY, which vLLM reads itself.
"""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from vogue.rollout.engine import EngineError

KEY = "VLLM_API_KEY"
SHORT = 10.0  # seconds for what a server answers at once
BETWEEN_STEPS = 30.0  # seconds for what an engine answers between two of its own steps
UNTOUCHED = "default"  # vLLM's label of the weights that it has loaded itself
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for what lies outside


class ServerLost(RuntimeError):
    """A server can't be reached, fails, or no longer has the weights that it was given; the message says which."""


@dataclass(frozen=True)
class Server:
    """A server of vLLM at `url`, http://HOST:PORT; safe to use from several threads.

    timeout  seconds that a rollout's request, or new weights, may take
    key      what it asks for; unset: the environment's

    Every method raises `ServerLost` where the server can't do it, and `EngineError` where it refuses.
    """

    url: str
    timeout: float
    key: str | None = field(default=None, repr=False)

    @property
    def is_here(self) -> bool:
        """Whether the server runs on this machine, as its address says."""
        return urlsplit(self.url).hostname in LOOPBACK

    def generate(self, body: dict[str, Any], label: str) -> list[dict[str, Any]]:
        """The choices of a request in their order, all of them of the weights with this label."""
        choices = self._call("/inference/v1/generate", body)["choices"]
        for choice in choices:
            labels = {span["version"] for span in choice["weight_versions"] or ()}
            if choice["finish_reason"] not in ("stop", "length") or labels != {label}:
                raise ServerLost(
                    f"{self.url}: its weights are {' and '.join(sorted(labels)) or 'unknown'}, not the run's {label}: "
                    "it has restarted, or another run uses it"
                )
        return sorted(choices, key=lambda choice: choice["index"])

    def label(self) -> str:
        """The label of the server's weights."""
        return self._call("/weight_info", seconds=SHORT)["weight_version"]

    def model(self) -> str:
        """What the server was started with as its model."""
        return self._call("/v1/models", seconds=SHORT)["data"][0]["root"]

    def set_label(self, label: str) -> None:
        self._call("/update_weight_version", {"new_version": label}, SHORT)

    def read_weights(self, folder: Path, label: str) -> None:
        """Let the server read its weights from a folder of .safetensors, and give them a label."""
        self.pause()
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self.resume(label)

    def pause(self) -> None:
        """Let the server drop what it generates, which nobody waits for, and all that it keeps of the old weights."""
        # An engine that hangs behind a front that answers would otherwise cost every sync a rollout's time.
        self._call("/pause?mode=abort", {}, min(self.timeout, BETWEEN_STEPS))

    def resume(self, label: str) -> None:
        """Let the server generate with its new weights, under a label that it is then asked for."""
        self._call("/reset_encoder_cache", {})
        self.set_label(label)
        self._call("/resume", {})
        if (found := self.label()) != label:
            raise ServerLost(f"{self.url}: its weights are {found} after a sync to {label}")

    def get(self, path: str) -> Any:
        return self._call(path, seconds=SHORT)

    def post(self, path: str, body: dict[str, Any], seconds: float | None = None) -> Any:
        return self._call(path, body, seconds)

    def _call(self, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """The server's answer as JSON; with a `body` it is posted."""
        headers = {"Content-Type": "application/json"}
        if key := self.key or os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else msgspec.json.encode(body)  # a request has megabytes of pixels
        request = urllib.request.Request(self.url.rstrip("/") + quote(path, safe="/?=&"), data, headers)
        try:
            with _direct.open(request, timeout=seconds or self.timeout) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            told = f"{self.url}{path}: {error.code} {error.reason}: {error.read()[:500].decode(errors='replace')}"
            raise (ServerLost(told) if error.code >= 500 else EngineError(_advised(told, error.code))) from None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an answer that was cut off
            reason = getattr(error, "reason", error)
            told = str(reason) or type(error).__name__
            if isinstance(reason, TimeoutError):
                told = f"no answer in {seconds or self.timeout:g} s{'' if seconds else ', by trainer.timeout'}"
            raise ServerLost(f"{self.url}: {told}") from None


def _advised(told: str, code: int) -> str:
    """What a server has refused, with the likely way out."""
    if code == 401:
        return f"{told}. Set the environment variable {KEY} to the server's key"
    if code in (403, 404, 405):
        return f"{told}. Start the server by `vogue serve`, which opens all that a training asks for"
    return told
