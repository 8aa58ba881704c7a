"""What competes in bench/trainer.py: vogue's training part, its whole step and its weight sync, and TRL's step.

Each is a worker (connection, folder, task, ...) in a process of its own, which `turns.contestants` starts.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from turns import measured, requests

BUDGET = 8192  # tokens of a micro-batch
POLLING = 1.5  # seconds in which vLLM's workers, once idle, still poll on their core: the other contestant's as well


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


def vogue_trainer(folder: Path, task: Task, *overrides: str):
    from vogue.config import load_config
    from vogue.data import load_samples
    from vogue.data.dataset import check_samples
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
        f"reward.function={Path(__file__).with_name('reward.py')}:varied",
        "trainer.measure_every=0",
        f"trainer.micro_batch_tokens={BUDGET}",
        f"trainer.output_dir={folder}/run",
    ]
    config = load_config(None, [*settings, *overrides])
    preprocessor = Preprocessor(load_processor(config.model.path), "", task.prompt)
    data = check_samples(load_samples(config.data.train), preprocessor.lengths)
    return Trainer(config, data, preprocessor, resume=None)


def given_groups(trainer, task: Task) -> list:
    """Groups of this step's prompts with given completions, of the view that the draw asks for."""
    from vogue.rollout.engine import Completion
    from vogue.step.groups import Group

    groups = []
    for item in trainer.loader.items(trainer.step):
        tokens = completions_of(task, item.number)
        made = tuple(Completion(tuple(ids), (-5.0,) * len(ids), "", False) for ids in tokens)
        advantages = tuple((-1.0) ** i for i in range(task.n))
        drawn = trainer.config.branch.rollout == "drawn" and item.draws[0]
        view, kept, paid = "noisy" if drawn else "raw", (True,) * task.n, (item.draws[0],) * task.n
        group = Group(item=item, view=view, completions=made, sources=(view,) * task.n, kept=kept, paid=paid)
        groups.append(replace(group, advantages=advantages))
    return groups


def vogue_update(connection, folder: Path, task: Task, *overrides: str) -> None:
    """Repetitions of the training part; a request may name other sizes (prompts, n, completion) than the task's."""
    from vogue.metrics import Clock, Means

    trainer = vogue_trainer(folder, task, *overrides)
    for request in requests(connection):
        sizes = replace(task, **request)
        groups = given_groups(trainer, sizes)[: sizes.prompts]
        with measured(connection):
            trainer.update(groups, Means(), Clock())


def vogue_step(connection, folder: Path, task: Task, *overrides: str) -> None:
    """Repetitions of a whole step, of a run with as many of them as `trainer.steps` says."""
    trainer = vogue_trainer(folder, task, *overrides)
    for _ in requests(connection):
        with measured(connection) as found:
            found["metrics"], _ = trainer.run_step()
        # The schedule starts over: after one step to warm up, as many repetitions as it has are each step of it once.
        trainer.step %= trainer.config.trainer.steps


def vogue_ahead(connection, folder: Path, task: Task, *overrides: str) -> None:
    """Repetitions of a whole step with a server of vLLM on the second core and the training on the first."""
    os.sched_setaffinity(0, {1})  # which the server is started with
    trainer = vogue_trainer(folder, task, "rollout.engine=server", "loss.importance_cap=2", *overrides)
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), {0})
    for _ in requests(connection):
        time.sleep(POLLING)
        with measured(connection) as found:
            found["metrics"], _ = trainer.run_step()


def vogue_sync(connection, folder: Path, task: Task) -> None:
    trainer = vogue_trainer(folder, task, "rollout.engine=vllm")
    parameters = list(trainer.policy.parameters())
    size = {"tensors": len(parameters), "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters)}
    for _ in requests(connection):
        with measured(connection) as found:
            found |= size
            trainer.sync()
