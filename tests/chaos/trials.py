"""Disturbances of processes, disks and clocks; `network.py` and `servers.py` have those of what runs talk to.

Each begins a run, disturbs it as a random generator says, goes on with it and tells. `ended` and `kept` of the arena
hold it to what holds for every kind.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from arena import LIMIT, STEPS, THREADS, Outcome, Rank, codes, ended, kept, result, same, send, wait_for, whole
from ranks import environment, free_port

LAUNCHERS = {
    "deepspeed": ("--num_gpus=2", "--master_port={port}", "--module", "vogue.train"),
    "torchrun": ("--nproc-per-node=2", "--master-port={port}", "--module", "vogue.train"),
}
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def killed_anywhere(arena, random):
    ranks, folder = random.choice((1, 2)), arena.new_folder()
    arena.straight(ranks)
    outcome, started = Outcome(), arena.start(folder, ranks=ranks)
    time.sleep(random.uniform(0, 8 * ranks))
    before = whole(folder)
    one = random.choice(started)
    if one.code is None:
        send(one.pid, signal.SIGKILL)
    ended(started, outcome)
    kept(folder, before)
    return arena.go_on(folder, outcome, ranks)


def killed_in_a_save(arena, random):
    if not hasattr(arena, "save_lines"):
        folder = arena.new_folder()
        assert codes(arena.start(folder, hooks={"count_to": f"{folder}/lines"}), LIMIT) == [0]
        arena.save_lines = int((folder / "lines").read_text())
        shutil.rmtree(folder)
    folder, outcome = arena.new_folder(), Outcome()
    (code,) = ended(arena.start(folder, hooks={"kill_at": random.randint(1, arena.save_lines)}), outcome)
    assert code == -signal.SIGKILL
    return arena.go_on(folder, outcome)


def worker_killed(arena, random):
    """Reward workers are killed again and again. A function of the user's own may end the run, with a sentence."""
    arena.straight(1)
    folder, outcome = arena.new_folder(), Outcome()
    started = arena.start(folder)
    end = time.monotonic() + LIMIT
    while started[0].code is None and time.monotonic() < end:
        time.sleep(random.uniform(0, 3))
        for worker in _below(started[0]):
            outcome.disturbed = True
            send(worker.pid, signal.SIGKILL)
    disturbed = outcome.disturbed
    ended(started, outcome)
    outcome.disturbed = disturbed
    return arena.go_on(folder, outcome)


def _below(rank: Rank):
    try:
        return psutil.Process(rank.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended meanwhile, as a whole run may have
        return ""


def launcher_killed(arena, random):
    """The launcher is killed, or what started it; its ranks notice, and end with a checkpoint."""
    arena.straight(2)
    name, folder, outcome = random.choice([*LAUNCHERS]), arena.new_folder(), Outcome()
    arguments = [text.format(port=free_port()) for text in LAUNCHERS[name]]
    command = [Path(sys.executable).with_name(name), *arguments, *arena.settings, f"trainer.output_dir={folder}/run"]
    with open(folder / "output", "w") as output:
        told = {"env": environment() | THREADS, "stdout": output, "stderr": output}
        process = subprocess.Popen(command, **told, start_new_session=True)
        wait_for(lambda: process.poll() is not None or (folder / "run/metrics.jsonl").exists(), LIMIT)
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        launchers = [process.pid, *[one.pid for one in below if "launch" in _command(one)]]
        ranks = [one for one in below if "vogue" in _command(one)]
        time.sleep(random.uniform(0, 3))
        before = whole(folder)
        send(random.choice(launchers), signal.SIGKILL)
        began = time.monotonic()
        alive = psutil.wait_procs(ranks, timeout=LIMIT)[1]
        outcome.seconds, outcome.disturbed = time.monotonic() - began, True
        process.wait(LIMIT)
    assert not alive, f"ranks without {name} go on: {(folder / 'output').read_text()}"
    kept(folder, before)
    return arena.go_on(folder, outcome, 2)


def disk_full(arena, random):
    """A file system of a random size holds the run's folder; there is more room when it goes on."""
    arena.straight(1)
    folder, outcome = arena.new_folder(), Outcome()
    disk = folder / "run"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={random.randint(2_000, 12_000)}k", "none", disk], check=True)
    try:
        code = ended(arena.start(folder), outcome)[0]
        assert code == 0 or "the disk is full" in outcome.output or "are free there" in outcome.output, outcome.output
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        shutil.copytree(disk, folder / "copy", symlinks=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    shutil.copytree(folder / "copy", disk, symlinks=True, dirs_exist_ok=True)
    return arena.go_on(folder, outcome)


def file_truncated(arena, random):
    """A file of a finished run is cut, emptied or deleted: it isn't missed, or another checkpoint is gone on from."""
    arena.straight(1)
    folder, outcome = arena.new_folder(), Outcome(disturbed=True)
    assert ended(arena.start(folder), outcome) == [0]
    steps = folder / "run/checkpoints"
    files = [path for path in (folder / "run").rglob("*") if path.is_file() and path.name != ".lock"]
    path = random.choice(files)
    action = random.choice(("cut", "emptied", "deleted"))
    if action == "deleted":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if action == "cut" else 0)
    if random.random() < 0.5:  # it was in the middle of its steps
        shutil.rmtree(steps / f"step_{STEPS:06d}")
    (code,) = ended(arena.start(folder, "--resume=whole"), outcome)
    if code == 2 and "delete that file" in outcome.output:
        (folder / "run/config.yaml").unlink()
        (code,) = ended(arena.start(folder, "--resume=whole"), outcome)
    if code == 2 and steps in path.parents and "is damaged" in outcome.output:  # the only checkpoint that was left
        shutil.rmtree(steps)
        (code,) = ended(arena.start(folder, "--resume=whole"), outcome)
    outcome.resumed, outcome.survived = 1, code == 0
    now, straight = result(folder / "run"), arena.straight(1)
    # What was cut from a log, and from weights that nothing was gone on from, is lost.
    unread = path.suffix == ".jsonl", {"hf", f"step_{STEPS:06d}"} <= {*path.parts}
    if unread[0]:
        now, straight = ([], [], now[2]), ([], [], straight[2])
    if unread[1] and "can be gone on from, but not used" in outcome.output:
        now, straight = (*now[:2], {}), (*straight[:2], {})
    outcome.equal = outcome.survived and same(now, straight)
    if outcome.equal:
        shutil.rmtree(folder)
    return outcome


def clock_jumps(arena, random):
    """The system's clock jumps by hours, there and back, while the run goes on."""
    arena.straight(1)
    folder, outcome = arena.new_folder(), Outcome(disturbed=True)
    now = folder / "now"
    now.write_text("+0")
    faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(now), "FAKETIME_NO_CACHE": "1"}
    faked |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", **THREADS}
    command = [sys.executable, "-m", "vogue", "train", *arena.settings, f"trainer.output_dir={folder}/run"]
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen(command, env=environment() | faked, stdout=output, stderr=output)
        end = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < end:
            time.sleep(random.uniform(0, 1))
            now.write_text(f"{random.choice('+-')}{random.randint(0, 200_000)}")
        process.kill()
        process.wait()
        assert process.returncode == 0, output.seek(0) or output.read()
    outcome.survived, outcome.equal = True, same(result(folder / "run"), arena.straight(1))
    return outcome


def memory_runs_out(arena, random):
    arena.straight(1)
    folder, outcome = arena.new_folder(), Outcome()
    started = arena.start(folder, hooks={"memory_at": random.randrange(STEPS)})
    ended(started, outcome, traceback=True)
    return arena.go_on(folder, outcome)


def rank_stopped(arena, random):
    """A rank is stopped as a debugger would: for a while, which nobody notices, or for ever, which ends the other."""
    arena.straight(2)
    folder, outcome, for_ever = arena.new_folder(), Outcome(disturbed=True), random.random() < 0.5
    started = arena.start(folder, ranks=2)
    wait_for(lambda: (folder / "run/metrics.jsonl").exists(), LIMIT)
    time.sleep(random.uniform(0, 2))
    stopped, other = random.sample(started, 2)
    if stopped.code is not None:
        return arena.go_on(folder, outcome, 2)
    before = whole(folder)
    send(stopped.pid, signal.SIGSTOP)
    if for_ever:
        ended([other], outcome)
        send(stopped.pid, signal.SIGKILL)  # as a launcher does when the other one has ended
    else:
        time.sleep(random.uniform(1, 5))
        send(stopped.pid, signal.SIGCONT)
    ended(started, outcome)
    kept(folder, before)
    return arena.go_on(folder, outcome, 2)


KINDS = (
    *(killed_anywhere, killed_in_a_save, worker_killed, launcher_killed, disk_full),
    *(file_truncated, clock_jumps, memory_runs_out, rank_stopped),
)
