"""A base model for the digits task, from nothing, in minutes: `vogue warmstart`.

Supervised steps on demonstrations in the reward's format. A share of them misreads a digit and stays consistent with
what it read, so the base answers in the right format, is wrong about half of the time when sampled, and knows more
than it shows: what a pretrained model looks like to reinforcement learning, at a millionth of the cost.
"""

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from vogue.config import ConfigError
from vogue.data.digits import QUESTIONS, SYSTEM_PROMPT, DigitPair, digit_pairs
from vogue.inputs import Preprocessor
from vogue.seeds import Purpose, rng_for, seed_for
from vogue.tiny import build_model, build_processor
from vogue_kernels import linear_logprob

PAIRS = 8000


def warmstart(
    folder: Path,
    batches: int = 450,
    batch_size: int = 64,
    lr: float = 2e-3,
    misread: float = 0.5,
    seed: int = 0,
    console: Console | None = None,
) -> float:
    """Train a small model for `batches` batches and save it in `folder`; returns the last mean loss (nats a token).

    `misread` is the share of demonstrations with a wrong digit; `lr` is AdamW's, warmed up and then decayed to a
    tenth by a cosine.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already: remove it, or name another folder")
    pairs = digit_pairs("train", PAIRS, seed)
    processor = build_processor(_corpus(pairs))
    torch.manual_seed(seed_for(seed, Purpose.WARMSTART))
    model = build_model(processor).train()
    examples = Examples(pairs, Preprocessor(processor, SYSTEM_PROMPT, 512))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _cosine(i, batches))
    rng = rng_for(seed, Purpose.WARMSTART)
    columns = (TextColumn("warm start"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    mean = math.nan
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task("", total=batches, loss=mean)
        for _ in range(batches):
            chosen = rng.integers(len(pairs), size=batch_size)
            wrong = rng.random(batch_size) < misread
            read = [pairs[i].misread(rng) if bad else (None, None) for i, bad in zip(chosen, wrong, strict=True)]
            loss = examples.loss(model, chosen.tolist(), read)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
            progress.update(task, advance=1, loss=mean)
    partial = folder.with_name(f".{folder.name}.partial")  # renamed when whole, so that a stop leaves no half model
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder)
    return mean


class Examples:
    """Prompts and image features of digit pairs, computed once."""

    def __init__(self, pairs: list[DigitPair], preprocessor: Preprocessor):
        self.pairs = pairs
        self.tokenizer = preprocessor.tokenizer
        self.views = [preprocessor.view([pair.image]) for pair in pairs]
        prompts = {pair.question: (pair, view) for pair, view in zip(pairs, self.views, strict=True)}
        self.prompts = {name: preprocessor.prompt(pair.sample(), view) for name, (pair, view) in prompts.items()}

    def loss(self, model: PreTrainedModel, chosen: list[int], read: list[tuple[int | None, int | None]]) -> Tensor:
        """Mean negative log-likelihood (nats a token) of the demonstrations of pairs `chosen`, as `read`."""
        end = [self.tokenizer.eos_token_id]
        prompts = [self.prompts[self.pairs[i].question] for i in chosen]
        texts = [self.pairs[i].demonstration(*digits) for i, digits in zip(chosen, read, strict=True)]
        answers = [torch.tensor(self.tokenizer(text)["input_ids"] + end) for text in texts]
        rows = [torch.cat([prompt.token_ids, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        input_ids = _pad(rows, self.tokenizer.pad_token_id)
        labels = _pad(
            [torch.cat([torch.full_like(p.token_ids, -100), a]) for p, a in zip(prompts, answers, strict=True)], -100
        )
        hidden = model.model(
            input_ids=input_ids,
            attention_mask=_pad([torch.ones_like(row) for row in rows], 0),
            mm_token_type_ids=_pad([prompt.token_types for prompt in prompts], 0, input_ids.shape[1]),
            pixel_values=torch.cat([self.views[i].pixel_values for i in chosen]),
            image_grid_thw=torch.cat([self.views[i].grid_thw for i in chosen]),
        ).last_hidden_state[:, :-1]
        kept = labels[:, 1:] != -100
        return -linear_logprob(hidden[kept], model.lm_head.weight, labels[:, 1:][kept]).logprob.mean()


def _corpus(pairs: list[DigitPair]) -> list[str]:
    """What the tokenizer is trained on: everything the task says."""
    return [SYSTEM_PROMPT, "system\nuser\nassistant\n", *QUESTIONS.values()] * 100 + [
        pair.demonstration() for pair in pairs[:1000]
    ]


def _pad(rows: list[Tensor], value: int, length: int | None = None) -> Tensor:
    length = length or max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])


def _cosine(batch: int, batches: int, warmup: int = 20) -> float:
    if batch < warmup:
        return (batch + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (batch - warmup) / max(1, batches - warmup))
