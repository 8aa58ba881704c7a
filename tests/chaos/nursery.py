"""A process that has imported all that a run needs, and forks: a rank begins in it within a second, not in ten.

It reads orders, a line of JSON each: the command's arguments, variables, modules to import before that, a file for its
output, what to do to it from within (`hooks`), and a process whose network it gets (0: this one's). The rank's process
number and, when it has ended, its exit code are written beside that file.
"""

import ctypes
import importlib
import json
import os
import sys

from vogue.cli.quiet import quiet

quiet()  # before the libraries come

import hooks  # noqa: E402

import vogue.cli  # noqa: E402
import vogue.rollout.hf  # noqa: E402
import vogue.run.training  # noqa: E402

CLONE_NEWNET = 0x40000000  # of linux/sched.h


def begin(order):
    """Fork twice: the rank, and a process that waits for it, since its code would be nobody's after this one's end."""
    for name in order["imports"]:
        importlib.import_module(name)
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    rank = os.fork()
    if rank:
        write(f"{order['output']}.pid", rank)
        write(f"{order['output']}.code", os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))
        os._exit(0)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # what is killed must have said what it said
    if order["network"]:
        join_network(order["network"])
    os.environ.update(order["variables"])
    hooks.install(**order["hooks"])
    sys.argv = ["vogue", *order["arguments"]]
    vogue.cli.command()


def join_network(pid):
    with open(f"/proc/{pid}/ns/net") as network:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(path, number):
    with open(f"{path}.new", "w") as file:
        file.write(str(number))
    os.rename(f"{path}.new", path)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        begin(json.loads(line))
