"""A base model for the digits task, from nothing, in minutes: `vogue warmstart`.

Two stages, as vision-language models are made. The vision tower learns to tell digits apart through a linear
classifier, which is then dropped. The whole model learns from demonstrations in the reward's format: at first right
ones, then a share of them misreads a digit and stays consistent with what it read. So the base answers in the right
format, is wrong about half of the time when sampled, and knows more than it shows: what a pretrained model looks like
to reinforcement learning, at a millionth of the cost. A share of the demonstrations may print the digits in the image's
place, so that `vogue eval --view image,text` can tell whether its weakness is seeing or thinking.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel

from vogue.config import ConfigError
from vogue.data.digits import QUESTIONS, SYSTEM_PROMPT, DigitPair, digit_pairs
from vogue.data.prompts import with_view
from vogue.inputs import Preprocessor, Prompt
from vogue.seeds import Purpose, rng_for, seed_for
from vogue.tiny import build_model, build_processor
from vogue_kernels import linear_logprob

PAIRS = 4000
MISREAD_FROM = 0.75  # of the batches: before that, demonstrations are right
PIXEL_MEAN, PIXEL_STD = 0.8, 0.3  # of dark ink on white


def warmstart(
    folder: Path,
    *,
    vision_batches: int,
    batches: int,
    batch_size: int,
    lr: float,
    misread: float,
    printed: float,
    faintest: float,
    seed: int,
    console: Console | None = None,
) -> None:
    """Train a small model and save it in `folder`.

    `misread` is the share of demonstrations with a wrong digit in the last part of the `batches`, `printed` that of
    those with the digits as text and no image; `lr` is AdamW's, warmed up and then decayed to a tenth by a cosine;
    `faintest` the least contrast of a digit (`digit_pairs`).

    Raises `ConfigError` if `folder` exists.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already: remove it, or name another folder")
    pairs = digit_pairs("train", PAIRS, seed, faintest=faintest)
    processor = build_processor(_corpus(pairs, printed > 0), pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)
    torch.manual_seed(seed_for(seed, Purpose.WARMSTART))
    model = build_model(processor).train()
    examples = Examples(pairs, Preprocessor(processor, SYSTEM_PROMPT, 512))
    rng = rng_for(seed, Purpose.WARMSTART)

    classifier = nn.Linear(model.config.text_config.hidden_size, 10)
    step = _training([*model.model.visual.parameters(), *classifier.parameters()], lr, vision_batches)
    for _ in _progress("vision tower", vision_batches, console):
        step(examples.classification_loss(model, classifier, rng.integers(len(pairs), size=2 * batch_size).tolist()))

    step = _training(list(model.parameters()), lr, batches)
    for batch in _progress("warm start", batches, console):
        chosen = rng.integers(len(pairs), size=batch_size)
        text = rng.random(batch_size) < printed
        wrong = (rng.random(batch_size) < (misread if batch >= MISREAD_FROM * batches else 0)) & ~text
        read = [pairs[i].misread(rng) if bad else (None, None) for i, bad in zip(chosen, wrong, strict=True)]
        step(examples.loss(model, chosen.tolist(), read, text.tolist()))

    partial = folder.with_name(f".{folder.name}.partial")  # renamed when whole, so that a stop leaves no half model
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder)


class Examples:
    """Prompts and image features of digit pairs, computed once."""

    def __init__(self, pairs: list[DigitPair], preprocessor: Preprocessor):
        self.pairs = pairs
        self.preprocessor = preprocessor
        self.tokenizer = preprocessor.tokenizer
        self.views = [preprocessor.view([pair.image]) for pair in pairs]
        prompts = {pair.question: (pair, view) for pair, view in zip(pairs, self.views, strict=True)}
        self.prompts = {name: preprocessor.prompt(pair.sample(), view) for name, (pair, view) in prompts.items()}

    def classification_loss(self, model: PreTrainedModel, classifier: nn.Module, chosen: list[int]) -> Tensor:
        """Cross-entropy of the digits of pairs `chosen`; an image is two tokens, one a digit."""
        images = self._images(chosen)
        features = model.model.get_image_features(*images.values(), return_dict=True).pooler_output
        labels = torch.tensor([digit for i in chosen for digit in (self.pairs[i].left, self.pairs[i].right)])
        return nn.functional.cross_entropy(classifier(torch.cat(tuple(features))), labels)

    def loss(
        self,
        model: PreTrainedModel,
        chosen: list[int],
        read: list[tuple[int | None, int | None]],
        printed: list[bool],
    ) -> Tensor:
        """Mean negative log-likelihood (nats a token) of the demonstrations of pairs `chosen`, as `read`.

        Those `printed` have their digits as text in the image's place.
        """
        end = [self.tokenizer.eos_token_id]
        prompts = [self._prompt(self.pairs[i], text) for i, text in zip(chosen, printed, strict=True)]
        texts = [self.pairs[i].demonstration(*digits) for i, digits in zip(chosen, read, strict=True)]
        answers = [torch.tensor(self.tokenizer(text)["input_ids"] + end) for text in texts]
        rows = [torch.cat([prompt.token_ids, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        input_ids = _pad(rows, self.tokenizer.pad_token_id)
        labels = _pad(
            [torch.cat([torch.full_like(p.token_ids, -100), a]) for p, a in zip(prompts, answers, strict=True)], -100
        )[:, 1:]
        hidden = model.model(
            input_ids=input_ids,
            attention_mask=_pad([torch.ones_like(row) for row in rows], 0),
            mm_token_type_ids=_pad([prompt.token_types for prompt in prompts], 0, input_ids.shape[1]),
            **self._images([i for i, text in zip(chosen, printed, strict=True) if not text]),
        ).last_hidden_state[:, :-1]
        kept = labels != -100
        return -linear_logprob(hidden[kept], model.lm_head.weight, labels[kept]).logprob.mean()

    def _prompt(self, pair: DigitPair, printed: bool) -> Prompt:
        if not printed:
            return self.prompts[pair.question]
        return self.preprocessor.prompt(with_view(pair.sample(), "text"), self.preprocessor.view([]))

    def _images(self, chosen: list[int]) -> dict[str, Tensor]:
        if not chosen:
            return {}
        return {
            "pixel_values": torch.cat([self.views[i].pixel_values for i in chosen]),
            "image_grid_thw": torch.cat([self.views[i].sizes for i in chosen]),
        }


def _training(parameters: list[nn.Parameter], lr: float, batches: int) -> Callable[[Tensor], None]:
    """A function that takes a loss and makes one step of AdamW on `parameters`."""
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda batch: _cosine(batch, batches))

    def step(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return step


def _cosine(batch: int, batches: int, warmup: int = 20) -> float:
    if batch < warmup:
        return (batch + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (batch - warmup) / max(1, batches - warmup))


def _progress(name: str, batches: int, console: Console | None) -> Iterator[int]:
    columns = (TextColumn(f"{name:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield from progress.track(range(batches))


def _corpus(pairs: list[DigitPair], printed: bool) -> list[str]:
    """What the tokenizer is trained on: everything the task says, with the digits as text where they are `printed`."""
    prompts = [SYSTEM_PROMPT, "system\nuser\nassistant\n", *QUESTIONS.values()]
    states = [pair.sample().state for pair in pairs[:1000]] if printed else []
    return prompts * 100 + [pair.demonstration() for pair in pairs[:1000]] + states


def _pad(rows: list[Tensor], value: int, length: int | None = None) -> Tensor:
    length = length or max(len(row) for row in rows)
    return torch.stack([nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])
