"""How servers of vLLM are started for a run: by the run itself, or by `vogue serve` on any machine.

Either way a server has what a training asks for: token ids in and out with the image features of the trainer, the
log-probabilities of what was sampled, and doors for new weights. It listens on this machine alone unless told
otherwise.
"""

import atexit
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, NoReturn

import torch

from vogue.config import Config
from vogue.distributed import rank_count
from vogue.rollout.engine import EngineError
from vogue.rollout.server_client import KEY, LOOPBACK, Server, ServerLost
from vogue.rollout.server_weights_folder import check_folder
from vogue.rollout.vllm_input import engine_arguments
from vogue.run import launch
from vogue.run.folder import writing
from vogue.settings import ConfigError

SCRIPT = Path(__file__).with_name("server_process.py")
TAIL = 1500  # characters of a server's output that are told where it ends
PATIENCE = 10.0  # seconds that a server has to end by itself
PAUSE = 0.2  # seconds between two looks whether a server is up
# In the trainer's process vLLM runs without processes of its own; a server always has them.
TRAINERS_OWN = (*launch.NAMES, "VLLM_ENABLE_V1_MULTIPROCESSING")


class Running(NamedTuple):
    """A server that this process has started."""

    server: Server
    process: subprocess.Popen
    output: IO[str]


def check_servers(config: Config) -> None:
    """Raise `ConfigError` where servers would have no GPU of their own, or one that there isn't, or no weights."""
    rollout, on_gpu = config.rollout, torch.cuda.is_available()
    if rollout.weight_transfer == "nccl" and not on_gpu:
        raise ConfigError("rollout.weight_transfer=nccl: there is no GPU here to send weights from; set it to folder")
    if not uses_nccl(config):
        check_folder(config)
    if on_gpu and not rollout.servers and not rollout.server_gpus:
        raise ConfigError(
            "rollout.server_gpus is not set: with rollout.engine=server the run starts servers on GPUs that the "
            "training leaves to them: deepspeed --include localhost:0,1 and rollout.server_gpus=[2,3] with "
            "rollout.server_count=2"
        )
    if rollout.server_gpus and not on_gpu:
        raise ConfigError(f"rollout.server_gpus={rollout.server_gpus}: there is no GPU here; leave it unset")


def uses_nccl(config: Config) -> bool:
    """Whether weights go from GPU to GPU."""
    return config.rollout.weight_transfer == "nccl" or (
        config.rollout.weight_transfer == "auto" and torch.cuda.is_available()
    )


def patience(config: Config) -> float:
    """Seconds that a rollout may take a server: with several ranks, which wait for this one, half of `trainer.timeout`.

    It then has the other half to ask another server.
    """
    return config.trainer.timeout / (2 if rank_count() > 1 else 1)


def serve(config: Config, host: str, port: int) -> NoReturn:
    """Become a server of vLLM for runs with these settings; raises `ConfigError` where anybody could change it."""
    if host not in LOOPBACK and not os.environ.get(KEY):
        raise ConfigError(
            f"--host {host}: whoever reaches the server could change its weights. Set the environment variable {KEY}, "
            "for the training as well"
        )
    os.execve(sys.executable, _command(config, host, port, parent=0), _environment(sharing=1))


def start_servers(config: Config, folder: Path | None = None) -> list[Server]:
    """Start `rollout.server_count` servers on this machine, which end with this process; returns them when all are up.

    What they print is appended to server_0.log and so on of `folder`, where there is one.

    Raises `FolderError` where that can't be written, and `EngineError`, with the end of its output, for one that ends
    or isn't up in `rollout.server_timeout`.
    """
    rollout, key = config.rollout, secrets.token_hex(16)
    running: list[Running] = []
    atexit.register(_end, running)
    for number in range(rollout.server_count):
        environment = _environment(rollout.server_count + rank_count()) | {KEY: key}
        if gpus := rollout.server_gpus:
            own = gpus[number * rollout.tensor_parallel : (number + 1) * rollout.tensor_parallel]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
        port = _free_port()
        output = _log(folder, number)
        process = subprocess.Popen(
            _command(config, LOOPBACK[0], port, parent=os.getpid()),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the trainer to handle
        )
        server = Server(f"http://{LOOPBACK[0]}:{port}", patience(config), key)
        running.append(Running(server, process, output))
    end = time.monotonic() + rollout.server_timeout
    for one in running:
        _wait_for(one, end, rollout.server_timeout)
    return [one.server for one in running]


def _wait_for(one: Running, end: float, seconds: float) -> None:
    while True:
        with suppress(ServerLost):
            one.server.label()
            return
        if one.process.poll() is not None:
            raise EngineError(f"a server of vLLM has ended before it was up: {_said(one)}")
        if time.monotonic() > end:
            raise EngineError(f"rollout.server_timeout={seconds:g}: a server of vLLM isn't up yet: {_said(one)}")
        time.sleep(PAUSE)


def _log(folder: Path | None, number: int) -> IO[str]:
    if folder is None:
        return TemporaryFile("w+", errors="replace")
    with writing("a server's output", folder):
        return open(folder / f"server_{number}.log", "a+", errors="replace")


def _said(one: Running) -> str:
    one.output.seek(0)
    return one.output.read().strip()[-TAIL:] or "it has said nothing"


def _end(running: list[Running]) -> None:
    """End the servers and what they have started: asked first, so that GPUs are given back in order."""
    for one in running:
        with suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGTERM)
    for one in running:
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


def _command(config: Config, host: str, port: int, parent: int) -> list[str]:
    arguments = engine_arguments(config) | {
        "host": host,
        "port": port,
        "enable_scale_out": True,
        "disable_uvicorn_access_log": True,
        "middleware": "__main__.Guard",
    }
    if uses_nccl(config):
        arguments["weight_transfer_config"] = {"backend": "nccl"}
    return [sys.executable, "-P", str(SCRIPT), str(parent), *_flags(arguments)]


def _flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments of vLLM's engine as its command line takes them."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags


def _environment(sharing: int) -> dict[str, str]:
    """This process' own, without what makes it a rank and with what opens vLLM's doors for new weights.

    sharing  processes that share this machine's cores
    """
    environment = {name: value for name, value in os.environ.items() if name not in TRAINERS_OWN}
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // sharing)))
        # Of vLLM's sampling helpers, which compile for longer than a short run takes.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK[0], 0))
        return probe.getsockname()[1]
