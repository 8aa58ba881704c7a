"""Planned memory beside measured memory: `vogue plan`'s arithmetic against a process, phase by phase, on a CPU.

    python bench/plan.py                                      three sizes, float32 and bfloat16
    python bench/plan.py --hidden 256 --dtype float32         one of them

A process of its own trains each model (`vogue.tiny`, Qwen2.5-VL's architecture, a vocabulary of 16,384) for two steps
with transformers as its engine, on one rank. Measured is the peak of its resident memory in a phase over what it held
before the model was there, when a much smaller one had already been trained in it: libraries and their pools aren't a
run's. Freed memory is given back to the system before each phase. Completions are random tokens, all as long as they
may be, and prompts are as long as planned; so what is compared is the arithmetic and not the guess of lengths.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trainer_contestants import Task, given_groups, prepare, vogue_trainer
from turns import Memory

TASK = Task("plan", (224, 112), prompt=128, completion=128, prompts=4, n=4, vocab=16_384, layers=6)
WARM = replace(TASK, vocab=512, hidden_size=64, layers=2)
HIDDEN, DTYPES = (256, 448, 640), ("float32", "bfloat16")
PHASES = {"forward": "training", "backward": "training"}  # of the trainer's clock, as the plan calls them
COUNTED = ("rollout", "training", "update", "sync", "save")
SETTINGS = ("trainer.micro_batch_tokens=1280", "branch.probability=1", "data.max_pixels=25088", "trainer.steps=100")


def measure(folder: Path, hidden: int, dtype: str, *overrides: str) -> dict:
    """Bytes by phase, planned and measured, of the model with this width. In a process that did nothing before."""
    from vogue.metrics import Clock, Means
    from vogue.run.model_sizes import sizes_of
    from vogue.run.phase_memory import phases
    from vogue.run.plan import layout_of

    class Measuring(Clock):
        """A clock that also keeps each phase's highest peak."""

        def __init__(self, baseline: float):
            super().__init__()
            self.baseline, self.peaks = baseline, {}

        @contextmanager
        def __call__(self, phase: str):
            if phase == "train":  # holds the others
                yield
                return
            memory = Memory()
            yield
            name, peak = PHASES.get(phase, phase), memory.found()["peak_mb"] - self.baseline
            self.peaks[name] = max(peak, self.peaks.get(name, 0.0))

    def step(trainer, task: Task, clock: Clock) -> None:
        means = Means()
        trainer.roll_out(means, clock)
        trainer.update(given_groups(trainer, task), means, clock)
        trainer.step += 1
        with clock("sync"):
            trainer.sync()
        with clock("save"):
            trainer.save()

    settings = (f"model.dtype={dtype}", *SETTINGS, *overrides)
    warm = vogue_trainer(folder / "warm", WARM, *settings)
    step(warm, WARM, Clock())
    warm.deepspeed.destroy()
    del warm
    gc.collect()
    baseline = Memory().baseline
    task = replace(TASK, hidden_size=hidden)
    trainer = vogue_trainer(folder / "model", task, *settings)
    gc.collect()
    found: dict[str, float] = {}
    for _ in range(2):  # AdamW's moments exist after the first
        clock = Measuring(baseline)
        step(trainer, task, clock)
        found = clock.peaks
    from vogue.run.plan import adapted

    model = adapted(trainer.config)
    sizes = sizes_of(model, trainer.config)
    run = layout_of(trainer.config, sizes, ranks=1, memory=1e10, on_gpu=False)
    planned = {phase.name: phase for phase in phases(sizes, run)}
    rows = [
        {"phase": name, "planned": planned[name].total, "measured": 1e6 * found[name], "parts": planned[name].parts}
        for name in COUNTED
    ]
    return {"hidden": hidden, "dtype": dtype, "weights": sizes.weights, "settings": overrides, "rows": rows}


def apart(hidden: int, dtype: str, *overrides: str) -> dict:
    """`measure` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        for name, task in {"warm": WARM, "model": replace(TASK, hidden_size=hidden)}.items():
            (Path(folder) / name).mkdir()
            prepare(task, Path(folder) / name)
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", __file__, "--measure", folder, str(hidden), dtype, *overrides]
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=HIDDEN)
    parser.add_argument("--dtype", nargs="*", default=DTYPES)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.measure:
        folder, hidden, dtype, *overrides = arguments.measure
        print(json.dumps(measure(Path(folder), int(hidden), dtype, *overrides)))
        return
    print(f"{'weights':>8} {'dtype':9} {'phase':9} {'planned':>8} {'measured':>9} {'ratio':>6}    MB")
    for dtype in arguments.dtype:
        for hidden in arguments.hidden:
            found = apart(hidden, dtype, *arguments.overrides)
            for row in found["rows"]:
                planned, measured = row["planned"] / 1e6, row["measured"] / 1e6
                name = f"{found['weights'] / 1e6:6.1f} M {dtype:9} {row['phase']:9}"
                print(f"{name} {planned:8.0f} {measured:9.0f} {planned / measured:6.2f}", flush=True)


if __name__ == "__main__":
    main()
