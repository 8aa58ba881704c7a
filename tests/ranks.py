"""How tests start a module or a script on several ranks, by DeepSpeed's launcher or without it."""

import atexit
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from tempfile import TemporaryDirectory

# Ranks are forked from a process that has imported what all of them need, which takes longer than most of their runs.
set_forkserver_preload(
    [
        *("vogue.run.training", "vogue.rollout.vllm", "vogue.rollout.hf", "vogue.cli", "vogue.report"),
        *("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.tokenization_mistral_common"),
        *("deepspeed.module_inject.auto_ep_layer", "torch._inductor.compile_fx"),
    ]
)


def launcher(ranks):
    return [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={ranks}", f"--master_port={free_port()}"]


OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment():
    """This process' own, without what makes it the only rank of a run."""
    return {name: value for name, value in os.environ.items() if name not in OURS}


def apart(function, *arguments):
    """What a function returns in a process of its own: when an engine of vLLM goes, it ends its process' groups."""
    with ProcessPoolExecutor(1, get_context("forkserver"), initializer=_leave_the_run) as alone:
        return alone.submit(function, *arguments).result()


def _leave_the_run():
    for name in OURS:
        os.environ.pop(name, None)


def launch(ranks, *command):
    """Run a module or script on this many ranks; returns the output of all.

    The ranks are started here. DeepSpeed's launcher, which runs that are stopped or fail go through in other tests,
    imports DeepSpeed twice before it starts one.
    """
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with TemporaryDirectory() as folder:
        running = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **shared}.items()}
            running.append(_started(f"{folder}/{rank}", own, command))
        end = time.monotonic() + 900
        while any(process.is_alive() for process in running):
            if any(process.exitcode for process in running) or time.monotonic() > end:
                for process in running:
                    process.kill()  # they would wait for the one that failed
            time.sleep(0.05)
        printed = "".join(Path(folder, str(rank)).read_text() for rank in range(ranks))
    assert all(process.exitcode == 0 for process in running), printed
    assert "Traceback" not in printed, printed  # at the end of a rank, after its work
    return printed


def vogue(*arguments):
    """The exit code and the output of the command, in a process of its own as in `apart`."""
    return alone("--module", "vogue", *arguments)


def alone(*command):
    """The exit code and the output of a module or script, likewise."""
    with TemporaryDirectory() as folder:
        process = _started(f"{folder}/output", {}, command)
        process.join(500)
        process.kill()
        process.join()
        return process.exitcode, Path(folder, "output").read_text()


def _started(output, own, command):
    given = output, environment() | own, [str(word) for word in command]
    process = get_context("forkserver").Process(target=_rank, args=given)
    process.start()
    return process


def _rank(output, environment, command):
    """One rank, in a process of its own: what `python script …` or `python -m module …` would do there."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    _leave_the_run()
    os.environ |= environment
    code = 1
    try:
        if command[0] == "--module":
            sys.argv = [command[1], *command[2:]]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def started_together(commands, variables, patience=0.0):
    """The exit code and output of commands that run at once, each with some variables of its own.

    Where one fails the others are killed, after so many seconds in which they may end by themselves.
    """
    with TemporaryDirectory() as folder, ExitStack() as opened:
        outputs = [opened.enter_context(open(f"{folder}/{i}", "w+")) for i in range(len(commands))]
        running = []
        for command, own, output in zip(commands, variables, outputs, strict=True):
            told = {"env": environment() | {name: str(value) for name, value in own.items()}, "stdout": output}
            running.append(subprocess.Popen([*map(str, command)], **told, stderr=subprocess.STDOUT))
        end = time.monotonic() + 900
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                end = min(end, time.monotonic() + patience)
            if time.monotonic() > end:
                for process in running:
                    process.kill()  # they would wait for the one that failed
            time.sleep(0.05)
        return [(process.returncode, output.seek(0) or output.read()) for process, output in zip(running, outputs)]


def torchrun(nodes, each, *arguments):
    """The command of every node of a run, as docs/cluster.md has them; the nodes are addresses of this machine."""
    port = free_port()
    return [
        [
            *(str(Path(sys.executable).with_name("torchrun")), f"--nnodes={nodes}", f"--node-rank={node}"),
            *(f"--nproc-per-node={each}", "--master-addr=127.0.0.1", f"--master-port={port}"),
            *(f"--local-addr=127.0.0.{node + 1}", "--module", "vogue.train", *arguments),
        ]
        for node in range(nodes)
    ]


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
