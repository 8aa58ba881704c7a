"""A step of a real size on a CPU: Qwen2.5-VL with all of the 3B's shapes and random weights, LoRA, VOGUE.

    python bench/real_size.py                  # every row; 20 GB of memory, 8 GB of disk, half an hour on two cores
    python bench/real_size.py --only vllm      # one of them: vllm, hf, trl
    python bench/real_size.py --quick          # a tiny model: does everything run?

Two prompts of 400 tokens, 256 of them of an image, x four completions of 64 tokens, in bfloat16, with z = 1: both views
of every group are computed. A row is a process of its own. Of vogue's it says:

- the peak of its own memory, with libraries, and what of the checkpoint's file is mapped into it, beside what
  `vogue plan` says without libraries
- the seconds of a step's phases; the first step compiles nothing here, and makes the optimizer's state
- which share of the training part is matrix products at the rate that the cores are measured to have: the operations
  that torch counts, with the head's, over that rate and over the seconds of the forward and backward passes
- the largest difference between the trainer's and the engine's log-probabilities, over all tokens of a rollout
- the seconds of a weight sync
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from shapes import LAYERS_3B, widen
from trainer import machine
from trainer_contestants import Task, prepare, vogue_trainer
from turns import quiet

TASK = Task("3B", (448, 448), prompt=400, completion=64, prompts=2, n=4)
RANK = 16
SETTINGS = (
    "model.dtype=bfloat16",
    "model.gradient_checkpointing=true",
    f"lora.rank={RANK}",
    "branch.probability=1",
    "trainer.measure_every=1",  # all completions are computed, though a random model is never right
    "trainer.steps=4",
    "optimizer.lr=1e-5",
)
ROWS = ("vllm", "hf", "trl")


class OwnMemory(threading.Thread):
    """The highest this process's own memory has been, in GB: without pages of mapped files, which can be dropped."""

    def __init__(self, interval: float = 0.05):
        super().__init__(daemon=True)
        self.interval, self.peak_gb = interval, 0.0
        self.start()

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            own = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
            self.peak_gb = max(self.peak_gb, own / 1e6)
            time.sleep(self.interval)


def mapped_gb(folder: Path) -> float:
    """What of the checkpoint's files this process has in its memory: frozen weights are never copied."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found / 1e6


def vogue_row(engine: str, folder: Path, task: Task, say, memory: OwnMemory) -> None:
    """A step with its phases, then a rollout and an update looked at closely; `say` takes what is found by and by."""
    import torch
    from machines import Cpu
    from torch.utils.flop_counter import FlopCounterMode

    from vogue.metrics import Clock, Means
    from vogue.run.plan import make_plan

    rate = Cpu(torch.bfloat16).rates.operations
    settings = [*SETTINGS, f"rollout.engine={engine}", f"trainer.output_dir={folder}/{engine}"]
    say(libraries_gb=memory.peak_gb)
    start = time.perf_counter()
    trainer = vogue_trainer(folder, task, *settings)
    plan = make_plan(trainer.config, 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), on_gpu=False)
    say(planned={phase.name: round(phase.total / 1e9, 2) for phase in plan.phases}, planned_gb=plan.largest.total / 1e9)
    say(start_s=time.perf_counter() - start, start_gb=memory.peak_gb)
    start = time.perf_counter()
    metrics, _ = trainer.run_step()
    # Before operations are counted, which keeps tensors alive.
    say(step_s=time.perf_counter() - start, peak_gb=memory.peak_gb, mapped_gb=mapped_gb(folder))
    say(**{name: value for name, value in metrics.items() if name.startswith("time/")})
    groups = trainer.roll_out(Means(), Clock())
    say(largest_difference=largest_difference(trainer, groups))
    clock = Clock()
    with FlopCounterMode(display=False, custom_mapping=head_operations()) as counter:
        trainer.update(groups, Means(), clock)
    seconds = clock.seconds["forward"] + clock.seconds["backward"]
    operations = counter.get_total_flops()
    say(training_s=seconds, training_tflop=operations / 1e12, rate_gflops=rate / 1e9)
    say(products_share=operations / rate / seconds)
    start = time.perf_counter()
    trainer.sync()
    say(sync_s=time.perf_counter() - start)


def head_operations() -> dict:
    """What torch can't count: the head's products, one a branch, and two backward, as its weight is frozen."""
    import torch

    def alone(hidden, weight, *_, **__) -> int:
        return 2 * hidden[0] * weight[0] * weight[1]

    def both(hidden_p, hidden_q, weight, *_, **__) -> int:
        return 2 * alone(hidden_p, weight)

    def alone_backward(grads, hidden, weight, *_, **__) -> int:
        return 2 * alone(hidden, weight)  # the logits once more, and the gradient of the hidden states

    def both_backward(grads, hidden_p, hidden_q, weight, *_, **__) -> int:
        return 2 * alone(hidden_q, weight)  # one branch is trained

    operators = torch.ops.vogue
    return {
        operators.linear_logprob: alone,
        operators.linear_branch_stats: both,
        operators.linear_logprob_backward: alone_backward,
        operators.linear_branch_stats_backward: both_backward,
    }


def largest_difference(trainer, groups) -> float:
    """Of the trainer's and the engine's log-probabilities of the same tokens, before an update."""
    import torch

    from vogue.metrics import Clock, Means

    largest = 0.0
    with torch.no_grad():
        for batch in trainer.micro_batches(dict(enumerate(groups)), groups[0], Means(), Clock()):
            old = trainer.looked_at([batch], Means(), several=True)[0].old.logprob
            there = batch.weights > 0
            difference = (old - batch.engine_logprob.to(old.device))[there & ~batch.engine_logprob.isnan()]
            largest = max(largest, float(difference.abs().max()))
    return largest


def trl_row(folder: Path, task: Task, say, memory: OwnMemory) -> None:
    """TRL's whole step with LoRA: transformers' generation, its own fused head, checkpoints of activations."""
    from peft import LoraConfig
    from trl_trainer import run

    class Once:
        """The other end of the turns: one step, and then the end."""

        asked = iter(({}, None))

        def send(self, found) -> None:
            if isinstance(found, dict):
                step = {"step_s": found["seconds"], "prepared_s": found["prepared"]}
                say(**step, peak_gb=memory.peak_gb, mapped_gb=mapped_gb(folder))

        def recv(self):
            return next(self.asked)

    adapters = LoraConfig(r=RANK, lora_alpha=32, target_modules=r".*language_model.*\.\w+_proj", task_type="CAUSAL_LM")
    run(Once(), folder, task, "whole", "bfloat16", adapters, gradient_checkpointing=True)


def row_of(name: str, folder: Path, task: Task, connection) -> None:
    """A row in a process of its own, sent part by part: what is known of it stays if it dies."""
    quiet()
    memory = OwnMemory()

    def say(**found) -> None:
        connection.send(found)

    try:
        if name == "trl":
            trl_row(folder, task, say, memory)
        else:
            vogue_row(name, folder, task, say, memory)
    except Exception as error:  # is a row's result: where it died
        traceback.print_exc()
        connection.send({"error": f"{type(error).__name__}: {error}"})
    connection.close()


def measured(name: str, folder: Path, task: Task) -> dict:
    """What the row's process says until its end, and how it ended if not by itself."""
    context, found = multiprocessing.get_context("spawn"), {"row": name}
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=row_of, args=(name, folder, task, theirs))
    process.start()
    theirs.close()
    while True:
        try:
            part = ours.recv()
        except EOFError:
            break
        print(f"{name}: " + ", ".join(f"{key} {shown(value)}" for key, value in part.items()), flush=True)
        found |= part
    process.join()
    return found | ({"died": f"exit code {process.exitcode}"} if process.exitcode else {})


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ROWS, help="a row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short completions: a check")
    parser.add_argument("--folder", type=Path, help="for the model, which stays there; unset: a temporary one")
    parser.add_argument("--out", type=Path, default=Path("bench/results/real_size.json"), help="JSON of all rows")
    given = parser.parse_args()
    task = replace(TASK, completion=4, n=2) if given.quick else TASK
    results = machine() | {"command": " ".join(["python", "bench/real_size.py", *sys.argv[1:]]), "rows": []}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            prepare(task, folder)
            if not given.quick:
                widen(folder, *LAYERS_3B)
        for name in given.only or ROWS:
            results["rows"].append(measured(name, folder, task))
            given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
