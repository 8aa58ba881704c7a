"""Disturbances of what a run with `rollout.engine=server` asks: two servers of vLLM, and the network to them.

All trials share the servers, which take most of a minute to start; those that were hurt are started anew.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
from arena import LIMIT, THREADS, Outcome, ended, kept, send, wait_for, whole
from network import Relay
from ranks import environment, free_port

from vogue.rollout.engine import EngineError
from vogue.rollout.server_client import Server, ServerLost

UP = 500.0  # seconds that a server may take to start beside others
SETTINGS = ("rollout.engine=server", "rollout.kv_cache_gb=0.1", "trainer.timeout=15")


class Servers:
    """Two servers, each behind a relay."""

    def __init__(self, arena):
        self._arena = arena
        self.ports, self._processes = [free_port(), free_port()], [None, None]
        self.relays = [Relay(free_port(), port) for port in self.ports]
        self.settings = self._asked(self.ports)
        self.relayed = self._asked([relay.port for relay in self.relays])

    def _asked(self, ports):
        return (*SETTINGS, f"rollout.servers=[{','.join(f'http://127.0.0.1:{port}' for port in ports)}]")

    def processes(self, number):
        """A server's front and its engine, as far as they live."""
        try:
            front = psutil.Process(self._processes[number].pid)
            return [front, *front.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def mend(self):
        """Let both servers be there and answer."""
        for number in (0, 1):
            self.relays[number].mend()
            self.signal(number, signal.SIGCONT)
            if not self._is_well(number):
                self._end(number)
                self._start(number)
        wait_for(lambda: all(self._is_well(number) for number in (0, 1)), UP, pause=1)

    def signal(self, number, which):
        for process in self.processes(number) if self._processes[number] else []:
            process.send_signal(which)

    def end(self):
        for number in (0, 1):
            self._end(number)

    def _is_well(self, number):
        server = Server(f"http://127.0.0.1:{self.ports[number]}", 10)
        try:
            server.get("/health")
            server.post("/collective_rpc", {"method": "check_health"})  # of the engine behind the front
        except (ServerLost, EngineError):
            return False
        return True

    def _start(self, number):
        output = open(self._arena.folder / f"server{number}", "a")  # noqa: SIM115  # the server's own
        command = [sys.executable, "-m", "vogue", "serve", *self._arena.settings, *SETTINGS]
        command += [f"trainer.output_dir={self._arena.folder}/none", "--port", str(self.ports[number])]
        told = {"env": environment() | THREADS, "stdout": output, "stderr": output}
        self._processes[number] = subprocess.Popen(command, **told, start_new_session=True)

    def _end(self, number):
        if process := self._processes[number]:
            for one in self.processes(number):
                one.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # an engine that its front has left behind
            process.wait()


def _of(arena):
    if arena.servers is None:
        arena.servers = Servers(arena)
    arena.servers.mend()
    return arena.servers


def _disturbed(arena, random, settings, disturb):
    """A run with servers to which `disturb`, called with their numbers, does something that it may undo by itself."""
    servers = _of(arena)
    arena.straight(1, *settings)
    servers.mend()
    folder, outcome, chosen = arena.new_folder(), Outcome(), random.choice(([0], [1], [0, 1]))
    started = arena.start(folder, *settings)
    wait_for(lambda: (folder / "run/config.yaml").exists() or started[0].code is not None, LIMIT)
    time.sleep(random.uniform(0, 15))
    before, disturbed = whole(folder), started[0].code is None
    disturb(servers, chosen)
    (code,) = ended(started, outcome)
    outcome.disturbed = disturbed
    assert code in (0, 2), f"exit code {code}: {outcome.output}"
    assert code == 0 or "no server is left" in outcome.output, outcome.output
    kept(folder, before)
    servers.mend()
    return arena.go_on(folder, outcome, more=settings)


def server_killed(arena, random):
    """One server or both are killed or stopped, whole or but the engine or its front: the other one is asked."""

    def disturb(servers, chosen):
        for number in chosen:
            which = random.choice((signal.SIGKILL, signal.SIGSTOP))
            found = servers.processes(number)
            for process in random.choice((found, found[:1], found[-1:])):
                send(process.pid, which)

    return _disturbed(arena, random, _of(arena).settings, disturb)


def server_cut_off(arena, random):
    """The network to one server or both stops, without a word: for a while, or for ever."""

    def disturb(servers, chosen):
        for number in chosen:
            servers.relays[number].cut()
        if random.random() < 0.5:
            time.sleep(random.uniform(1, 20))
            for number in chosen:
                servers.relays[number].mend()

    return _disturbed(arena, random, _of(arena).relayed, disturb)


KINDS = (server_killed, server_cut_off)
