"""How tests start a module or a script on several ranks, by DeepSpeed's launcher."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


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
    """Run a module or script on this many ranks; returns its output."""
    command = [*launcher(ranks), *map(str, command)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr  # at the end of a rank, after its work
    return done.stdout


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
