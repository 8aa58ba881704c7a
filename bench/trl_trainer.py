"""TRL's GRPOTrainer as a contestant: the same checkpoint, images, questions, rewards and sizes as vogue's."""

import time
from pathlib import Path

from datasets import Dataset
from reward import varied
from trainer_contestants import Task, completions_of
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import Memory, requests

from vogue.data import load_samples
from vogue.inputs import load_processor


class Timed(GRPOTrainer):
    """Adds up the time of what precedes the forward passes: generation, rewards, preprocessing."""

    prepared = used = 0.0

    def _prepare_inputs(self, batch):
        start, used = time.perf_counter(), time.process_time()
        inputs = super()._prepare_inputs(batch)
        Timed.prepared += time.perf_counter() - start
        Timed.used += time.process_time() - used
        if "prompt_ids" in inputs:
            Timed.prompt = inputs["prompt_ids"].shape[1]
        return inputs


class Turns(TrainerCallback):
    """Waits before each step until it is asked for, and sends what it cost."""

    def __init__(self, connection, task: Task, part: str):
        self.connection, self.task, self.part = connection, task, part

    def wait(self, control) -> None:
        control.should_training_stop = next(self.turn, None) is None
        Timed.prepared = Timed.used = 0.0
        self.memory = Memory()
        self.start, self.used = time.perf_counter(), time.process_time()

    def on_train_begin(self, args, state, control, **_):
        self.turn = requests(self.connection)
        self.wait(control)

    def on_step_end(self, args, state, control, **_):
        assert Timed.prompt == self.task.prompt, Timed.prompt
        found = {"seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.used}
        if self.part == "train":
            found["seconds"] -= Timed.prepared
            found["cpu_seconds"] -= Timed.used
        self.connection.send(found | {"prepared": Timed.prepared} | self.memory.found())
        self.wait(control)


def run(connection, folder: Path, task: Task, part: str, dtype: str = "float32", adapters=None, **settings) -> None:
    """Repetitions of a step; `part` "train" gives it the completions and leaves out what precedes the forward.

    adapters: PEFT's configuration, to train them alone. settings: of `GRPOConfig`, in place of those below.
    """

    def given(prompts, trainer):
        ids, _, _ = trainer._tokenize_prompts(prompts)
        tokens = [completion for group in range(task.prompts) for completion in completions_of(task, group)]
        return {"prompt_ids": ids, "completion_ids": tokens, "logprobs": None}

    trainer = Timed(
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa"),
        args=_config(folder, task, settings),
        reward_funcs=[_reward],
        train_dataset=Dataset.from_list(_rows(folder)),
        processing_class=load_processor(str(folder)),
        callbacks=[Turns(connection, task, part)],
        peft_config=adapters,
        rollout_func=given if part == "train" else None,
    )
    trainer.train()


def _config(folder: Path, task: Task, settings: dict) -> GRPOConfig:
    given = {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.prompts * task.n // task.micro_batch,
        "num_generations": task.n,
        "max_completion_length": task.completion,
        "learning_rate": 1e-6,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 100_000,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOConfig(**given | settings)


def _rows(folder: Path) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": sample.problem.removeprefix("<image>")}],
            "image": sample.load_images()[0],
        }
        for sample in load_samples(folder / "train.parquet")
    ]


def _reward(completions, **_) -> list[float]:
    return varied([completion[0]["content"] for completion in completions])
