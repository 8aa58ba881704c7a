"""Runs that are killed, starved, stopped and damaged, again and again: none may lose what was saved, or end otherwise.

`make chaos` does it for an hour, `make chaos MINUTES=5` for five minutes; the tests without the marker are a cut of it.
"""

import random
import subprocess
import time

import network
import pytest
import servers
import trials
from arena import Outcome

SEED = 0
KINDS = {kind.__name__: kind for kind in (*trials.KINDS, *network.KINDS, *servers.KINDS)}


def attempt(arena, kind, seed):
    """One trial, whose outcome goes into the table whatever it is."""
    outcome = Outcome(output="it didn't hold")
    try:
        outcome = KINDS[kind](arena, random.Random(f"{kind} {seed}"))
    finally:
        arena.outcomes[kind].append(outcome)
    assert outcome.equal, f"{kind}, seed {seed}: not as undisturbed: {outcome.output}"


def can_run(kind):
    if kind == "disk_full" and subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    if kind == "disk_full":
        subprocess.run(["umount", "/mnt"], check=True)
    if kind == "clock_jumps" and not trials.FAKETIME.exists():
        pytest.skip(f"there is no {trials.FAKETIME}: libfaketime isn't installed")
    if kind == "network_stops":
        try:
            with network.machines():
                pass
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network may be made here: {error}")


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_every_disturbed_run_ends_as_the_undisturbed_one(arena, kind, minutes):
    can_run(kind)
    end, seed, failed = time.monotonic() + 60 * minutes / len(KINDS), SEED, []
    while time.monotonic() < end or seed == SEED:
        try:
            attempt(arena, kind, seed)
        except AssertionError as error:
            failed.append(f"seed {seed}: {error}")
        seed += 1
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["killed_in_a_save", "worker_killed", "killed_anywhere", "file_truncated", "memory_runs_out", "disk_full"],
)
def test_a_cut_of_the_chaos(arena, kind):
    can_run(kind)
    attempt(arena, kind, SEED)
