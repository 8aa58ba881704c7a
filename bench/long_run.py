"""Whether a long run grows: what its processes hold, sampled every few steps of a real `vogue train`.

    python bench/long_run.py                                2,000 steps on one rank, transformers generating
    python bench/long_run.py --steps 400 --ranks 2 --json growth.json

The run has images, both branches, a reward function in its own process, an evaluation and a checkpoint every 100
steps, and logs that begin a new file every 64 kB. It is held to this: after the first hundred steps, in which caches
fill, nothing of it grows, but for files on the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trainer_contestants import Task, prepare

TASK = Task("tiny", (56, 28), prompt=40, completion=12, prompts=4, n=4, vocab=512, hidden_size=64, layers=2)
EVERY = 10  # steps between two samples
WARM = 100  # steps in which caches fill
SECONDS = 0.2  # between two looks at the log
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Held:
    """What all processes of a run hold after `step` steps."""

    step: int
    memory_mb: float  # resident, of all processes; what they share counts for each
    threads: int
    files: int  # open descriptors
    processes: int
    shm_mb: float  # /dev/shm, of this machine


QUANTITIES = ("memory_mb", "threads", "files", "processes", "shm_mb")


def settings(folder: Path, steps: int, engine: str) -> list[str]:
    """The `key=value` settings of the run, whose model and data `prepare` has written to `folder`."""
    return [
        f"model.path={folder}",
        "model.dtype=float32",
        *(f"data.{name}={folder}/train.parquet" for name in ("train", "test")),
        "data.test_limit=4",
        "data.system_prompt=",
        f"data.max_prompt_tokens={TASK.prompt}",
        f"rollout.engine={engine}",
        f"rollout.prompts={TASK.prompts}",
        f"rollout.n={TASK.n}",
        f"rollout.max_tokens={TASK.completion}",
        "rollout.kv_cache_gb=0.25",
        f"reward.function={Path(__file__).with_name('reward.py')}:varied",
        f"trainer.steps={steps}",
        "trainer.eval_every=100",
        "trainer.save_every=100",
        "trainer.keep=2",
        "trainer.log_rotation_mb=0.064",
        f"trainer.output_dir={folder}/run",
    ]


def command(ranks: int) -> list[str]:
    """What starts a run of so many ranks."""
    if ranks == 1:
        return [sys.executable, "-m", "vogue", "train"]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, "--num_gpus", str(ranks), "--module", "vogue.train"]


def watched(folder: Path, steps: int, ranks: int, engine: str, console: Console) -> list[Held]:
    """Train in `folder`, and return what the run held every EVERY steps. Raises RuntimeError where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    asked = settings(folder, steps, engine)
    found: list[Held] = []
    with open(folder / "printed", "w+") as printed:
        told = {"stdout": printed, "stderr": subprocess.STDOUT, "env": environment}
        process = psutil.Popen([*command(ranks), *asked], **told)
        try:
            for step in track(range(0, steps, EVERY), "steps", console=console):
                while process.poll() is None and _steps(folder / "run") <= step:
                    time.sleep(SECONDS)
                if process.poll() is not None:
                    break
                found.append(_held(process, _steps(folder / "run")))
            code = process.wait()
        finally:
            if process.poll() is None:
                for one in [*process.children(recursive=True), process]:
                    one.kill()
        if code:
            printed.seek(0)
            raise RuntimeError(f"the run ended with exit code {code}:\n{printed.read()[-3000:]}")
    return found


def growth(found: Sequence[Held]) -> dict[str, tuple[float, float]]:
    """Of each quantity the medians in the first and in the last quarter of what comes after WARM steps."""
    after = [held for held in found if held.step >= WARM]
    if len(after) < 4:
        raise ValueError(f"{len(after)} samples after step {WARM} are too few to tell growth")
    quarter = len(after) // 4
    return {
        name: (
            median(getattr(held, name) for held in after[:quarter]),
            median(getattr(held, name) for held in after[-quarter:]),
        )
        for name in QUANTITIES
    }


def _steps(run: Path) -> int:
    """The steps that the run has logged: the last row's, and one, since they are counted from 0."""
    rows = _tail(run / "metrics.jsonl").splitlines()
    return json.loads(rows[-1])["step"] + 1 if rows else 0


def _tail(path: Path) -> bytes:
    """The whole lines at the end of a file that is written to."""
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return file.read().rpartition(b"\n")[0]


def _held(process: psutil.Process, step: int) -> Held:
    """What the process and all below it hold now."""
    memory, threads, files, count = 0, 0, 0, 0
    for one in [process, *process.children(recursive=True)]:
        try:
            with one.oneshot():
                sizes = one.memory_info().rss, one.num_threads(), one.num_fds()
        except psutil.NoSuchProcess:  # it has just ended
            continue
        memory, threads, files, count = memory + sizes[0], threads + sizes[1], files + sizes[2], count + 1
    return Held(step, memory / 1e6, threads, files, count, psutil.disk_usage("/dev/shm").used / 1e6)


def main(argv: Sequence[str] | None = None) -> list[Held]:
    """Run, print the table, and return all samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
    arguments = parser.parse_args(argv)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(TASK, folder)
        start = time.monotonic()
        found = watched(folder, arguments.steps, arguments.ranks, arguments.engine, console)
        minutes = (time.monotonic() - start) / 60
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(held) for held in found]))
    title = f"{arguments.steps} steps, {arguments.ranks} ranks, {arguments.engine}: {minutes:.1f} min"
    table = Table("", f"first quarter after step {WARM}", "last quarter", "change", title=title)
    for quantity, (before, after) in growth(found).items():
        table.add_row(quantity, f"{before:,.1f}", f"{after:,.1f}", f"{after - before:+,.1f}")
    console.print(table)
    return found


if __name__ == "__main__":
    main()
