"""Networks that stop answering: what is sent is lost, nothing comes back, and nobody is told.

machines()  two of them: namespaces with a cable between, which a firewall cuts
Relay       a port of this machine that passes on to another one, or doesn't
"""

import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from arena import LIMIT, Outcome, ended, kept, wait_for, whole

CHUNK = 1 << 16  # bytes


@dataclass
class Machine:
    """A network of its own, as long as its process lives."""

    address: str
    process: subprocess.Popen

    def run(self, *command):
        subprocess.run(["nsenter", "-t", str(self.process.pid), "-n", *command], check=True, capture_output=True)

    def cut(self):
        """Drop what comes from the other machine, from here on."""
        self.run("iptables", "-A", "INPUT", "-i", "cable", "-j", "DROP")

    def mend(self):
        self.run("iptables", "-F", "INPUT")


@contextmanager
def machines():
    """Two machines that reach one another; raises `CalledProcessError` where none can be made."""
    made = []
    try:
        for number in (1, 2):
            process = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
            made.append(Machine(f"10.77.0.{number}", process))
        wait_for(lambda: all(_has_own_network(one.process.pid) for one in made), 10)
        first, second = made
        peer = ("peer", "name", "cable", "netns", str(second.process.pid))
        first.run("ip", "link", "add", "cable", "type", "veth", *peer)
        for one in made:
            one.run("ip", "addr", "add", f"{one.address}/24", "dev", "cable")
            one.run("ip", "link", "set", "cable", "up")
            one.run("ip", "link", "set", "lo", "up")
            one.run("iptables", "-F")
        yield made
    finally:
        for one in made:
            one.process.kill()
            one.process.wait()


def _has_own_network(pid):
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


class Relay:
    """A port that passes what it gets on to a port of this machine, and back, until it is cut.

    Then connections are still taken and stay open, as those to a machine behind a dead cable do.
    """

    def __init__(self, port, target):
        self.port, self._target, self._whole = port, target, threading.Event()
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._listen, daemon=True).start()

    def cut(self):
        self._whole.clear()

    def mend(self):
        self._whole.set()

    def _listen(self):
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._pass_on, args=[client], daemon=True).start()

    def _pass_on(self, client):
        self._whole.wait()
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            back = threading.Thread(target=self._pump, args=[server, client], daemon=True)
            back.start()
            self._pump(client, server)
            back.join()

    def _pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(CHUNK):
                self._whole.wait()
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def network_stops(arena, random):
    """The network between two ranks stops: for a while, which nobody notices, or for ever, which ends both."""
    arena.straight(2)
    folder, outcome, for_ever = arena.new_folder(), Outcome(), random.random() < 0.5
    with machines() as both:
        started = arena.start(folder, ranks=2, machines=both)
        if random.random() < 0.8:  # otherwise the ranks may not have met yet
            wait_for(lambda: (folder / "run/metrics.jsonl").exists() or started[0].code is not None, LIMIT)
        time.sleep(random.uniform(0, 3))
        before, disturbed = whole(folder), None in [one.code for one in started]
        for one in both:
            one.cut()
        if not for_ever:
            time.sleep(random.uniform(1, 20))
            for one in both:
                one.mend()
        ended(started, outcome)
    outcome.disturbed = disturbed
    kept(folder, before)
    return arena.go_on(folder, outcome, 2)


KINDS = (network_stops,)
