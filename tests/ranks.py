"""How tests start a module or a script on several ranks, by DeepSpeed's launcher or without it."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory


def launcher(ranks):
    return [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={ranks}", f"--master_port={free_port()}"]


OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment():
    """This process' own, without what makes it the only rank of a run."""
    return {name: value for name, value in os.environ.items() if name not in OURS}


def apart(function, *arguments):
    """What a function returns in a process of its own: when an engine of vLLM goes, it ends its process' groups."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_leave_the_run) as alone:
        return alone.submit(function, *arguments).result()


def _leave_the_run():
    for name in OURS:
        os.environ.pop(name, None)


def launch(ranks, *command):
    """Run a module or script on this many ranks; returns the output of all.

    The ranks are started here. DeepSpeed's launcher, which runs that are stopped or fail go through in other tests,
    imports DeepSpeed twice before it starts one.
    """
    command = ["-m", *command[1:]] if command[0] == "--module" else command
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with TemporaryDirectory() as folder, ExitStack() as opened:
        outputs = [opened.enter_context(open(f"{folder}/{rank}", "w+")) for rank in range(ranks)]
        running = []
        for rank, output in enumerate(outputs):
            own = {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **shared}.items()}
            told = {"env": environment() | own, "stdout": output, "stderr": subprocess.STDOUT}
            running.append(subprocess.Popen([sys.executable, *map(str, command)], **told))
        end = time.monotonic() + 900
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running) or time.monotonic() > end:
                for process in running:
                    process.kill()  # they would wait for the one that failed
            time.sleep(0.05)
        printed = "".join(output.seek(0) or output.read() for output in outputs)
    assert all(process.returncode == 0 for process in running), printed
    assert "Traceback" not in printed, printed  # at the end of a rank, after its work
    return printed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_a_disk(folder, options, *arguments):
    """Run Python in `folder`, where `disk` is a file system in memory with these options; what it holds is lost."""
    mounted = 'mount -t tmpfs -o "$0" none disk && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mounted, options, sys.executable, *arguments]
    (folder / "disk").mkdir(exist_ok=True)
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
