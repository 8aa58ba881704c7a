"""A base model from nothing, in minutes: `vogue warmstart`.

Two stages, as vision-language models are made: the model learns to see, then to answer in the reward's format. So the
base is wrong about half of the time when sampled, and knows more than it shows: what a pretrained model looks like to
reinforcement learning, at a millionth of the cost.

On the digits, the vision tower learns to tell them apart through a linear classifier, which is then dropped; then the
whole model learns from demonstrations, at first right ones, then a share of them misreads a digit and stays consistent
with what it read. On any other data with a `state`, all that the images show as text, the model learns to think the
state and answer, or to describe and answer where the design asks for that, first from the images alone and then asked.

With `latent_steps` the model first begins a span and reads so many states of its own (`vogue.method.latent`). In
demonstrations it reads the image's vision tokens there, one a digit, the two over again where more are asked for, and
its states before them learn to be them: at a root mean square of 1, as normed states have at first, since a tower made
from nothing gives tokens ten to forty times as long. What is printed has no such tokens, and no span.

A share of the demonstrations may print the state in the image's place, so that `vogue eval --view image,text` can tell
whether the base's weakness is seeing or thinking.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
)

from vogue.data import DataError, Sample, load_samples
from vogue.data.dataset import check_samples
from vogue.data.digits import QUESTIONS, DigitPair, digit_pairs
from vogue.data.digits import SYSTEM_PROMPT as DIGITS_SYSTEM_PROMPT
from vogue.data.prompts import MARK, SYSTEM_PROMPTS, with_view
from vogue.data.samples import PLACEHOLDER, VIDEO
from vogue.families import family_of
from vogue.inputs import Preprocessor, Prompt, View, load_processor
from vogue.method.latent import END, LOSS_WEIGHT, START, latent_loss
from vogue.model.embedding import reading
from vogue.rewards.designs import DEMONSTRATIONS
from vogue.seeds import Purpose, rng_for, seed_for
from vogue.settings import ConfigError
from vogue.tiny import build_model, build_processor
from vogue_kernels import linear_logprob

PAIRS = 4000
MISREAD_FROM = 0.75  # of the batches: before that, demonstrations are right
PIXEL_MEAN, PIXEL_STD = 0.8, 0.3  # of dark ink on white
VOCAB_SIZE = 1024  # of a data set's tokenizer, 256 of them bytes
MAX_PROMPT_TOKENS = 2048  # as data.max_prompt_tokens by default
CHAT = "system\nuser\nassistant\n"  # what the chat template adds, for the tokenizer


@dataclass(frozen=True)
class Demonstration:
    """`text` is what a model should answer to `prompt`, whose images `view` holds.

    The answer begins at character `answer_at` of it, behind the thought; 0 where nobody tells them apart.
    Behind its first token `latents` (K, D) are read, which the states before them are to be; None: nothing is.
    """

    prompt: Prompt
    view: View
    text: str
    answer_at: int = 0
    latents: Tensor | None = None


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
    latent_steps: int = 0,
    latent_weight: float = LOSS_WEIGHT,
    console: Console | None = None,
) -> None:
    """Train a small model on the digits and save it in `folder`.

    `misread` is the share of demonstrations with a wrong digit in the last part of the `batches`, `printed` that of
    those with the digits as text and no image; `lr` is AdamW's, warmed up and then decayed to a tenth by a cosine;
    `faintest` the least contrast of a digit (`digit_pairs`); `latent_steps` the states that are read first,
    and `latent_weight` that of their loss.

    Raises `ConfigError` if `folder` exists.
    """
    _check_new(folder)
    if latent_steps < 0:
        raise ConfigError(f"--latent-steps {latent_steps} is negative")
    if latent_weight != LOSS_WEIGHT and not latent_steps:
        raise ConfigError(f"--latent-weight {latent_weight}: without --latent-steps no state is read")
    pairs = digit_pairs("train", PAIRS, seed, faintest=faintest)
    more = (START, END) if latent_steps else ()
    corpus = _corpus(pairs, printed > 0)
    processor = build_processor(corpus, pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD, more_tokens=more)
    model = _new_model(processor, seed)
    examples = Examples(pairs, Preprocessor(processor, DIGITS_SYSTEM_PROMPT, 512), latent_steps, latent_weight)
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
        read: list[tuple[int | None, int | None]] = [
            pairs[i].misread(rng) if bad else (None, None) for i, bad in zip(chosen, wrong, strict=True)
        ]
        step(examples.loss(model, chosen.tolist(), read, text.tolist()))

    _save(model, processor, folder)


def warmstart_on(
    data: str,
    folder: Path,
    *,
    vision_batches: int,
    batches: int,
    batch_size: int,
    lr: float,
    printed: float,
    answer_weight: float,
    seed: int,
    design: str = "verifiable",
    start: str | None = None,
    console: Console | None = None,
) -> None:
    r"""Train a small model on the samples of `data` (as `load_samples` takes it) and save it in `folder`.

    It is made from nothing, or begins as `start`, the folder of one that sees something like these images already.

    The model answers with state and answer as the reward's `design` asks, by default
    `<think>{state}</think>\n\boxed{answer}`: for `vision_batches` to images alone, which is quick for want of a
    question, then, for `batches`, to the prompts that `vogue train` gives with that design, a share of them `printed`,
    with the state as text in the images' place. A token of the answer counts `answer_weight` times one before it: an
    answer is a few tokens behind many of the state. Each stage has AdamW's `lr`, as in `warmstart`.

    Raises `ConfigError` if `folder` exists and for a design that isn't one of `DEMONSTRATIONS`, and `DataError` for a
    sample without a state or an image, and as `check_samples` does.
    """
    _check_new(folder)
    if design not in DEMONSTRATIONS:
        raise ConfigError(f"--design {design}: a warm start can demonstrate {', '.join(DEMONSTRATIONS)}")
    samples = list(load_samples(data))
    for sample in samples:
        shown = sample.images + sample.videos
        if not shown or not sample.state:
            missing = "'state'" if shown else "image or video"
            raise DataError(f"{sample.place}: has no {missing}: a warm start learns to read the state off the images.")
    if start:
        processor, model = _load(start)
    else:
        processor = build_processor(_sample_corpus(samples[:1000], design), VOCAB_SIZE)
        model = _new_model(processor, seed)
    preprocessor = Preprocessor(processor, SYSTEM_PROMPTS[design], MAX_PROMPT_TOKENS)
    check_samples([*samples, *(with_view(sample, "text") for sample in samples if printed)], preprocessor.lengths)
    unasked = [
        replace(sample, problem=PLACEHOLDER * len(sample.images) + VIDEO * len(sample.videos)) for sample in samples
    ]
    alone = Preprocessor(processor, "", MAX_PROMPT_TOKENS)
    rng = rng_for(seed, Purpose.WARMSTART)

    step = _training(list(model.parameters()), lr, vision_batches)
    for _ in _progress("images alone", vision_batches, console):
        chosen = rng.integers(len(samples), size=batch_size)
        demonstrations = [demonstrate(alone, unasked[i], design) for i in chosen]
        step(demonstration_loss(model, processor.tokenizer, demonstrations, answer_weight))

    step = _training(list(model.parameters()), lr, batches)
    for _ in _progress("warm start", batches, console):
        chosen = rng.integers(len(samples), size=batch_size)
        views = ["text" if text else "image" for text in rng.random(batch_size) < printed]
        shown = [with_view(samples[i], view) for i, view in zip(chosen, views, strict=True)]
        demonstrations = [demonstrate(preprocessor, sample, design) for sample in shown]
        step(demonstration_loss(model, processor.tokenizer, demonstrations, answer_weight))

    _save(model, processor, folder)


def demonstrate(preprocessor: Preprocessor, sample: Sample, design: str = "verifiable") -> Demonstration:
    """The sample's question, images, and its state and answer in the format of the reward's design."""
    view = preprocessor.raw_view(sample)
    thought, answer = DEMONSTRATIONS[design](sample.state, sample.answer)
    return Demonstration(preprocessor.prompt(sample, view), view, thought + answer, len(thought))


def demonstration_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    answer_weight: float = 1.0,
    latent_weight: float = LOSS_WEIGHT,
) -> Tensor:
    """Mean negative log-likelihood (nats a token) of the demonstrations' texts, each with its end.

    Weighted, where `answer_weight` isn't 1: tokens that begin in the answer count so many times as others. Where there
    are `latents`, no token is weighted, and `latent_weight` times the `latent_loss` is added.
    """
    prompts = [one.prompt.token_ids for one in demonstrations]
    encoded = [tokenizer(one.text, return_offsets_mapping=True) for one in demonstrations]
    texts = [torch.tensor([*one["input_ids"], tokenizer.eos_token_id]) for one in encoded]
    latents = [one.latents for one in demonstrations]
    counts = [0 if states is None else len(states) for states in latents]
    inputs = [_behind_first(text, count, int(text[0])) for text, count in zip(texts, counts, strict=True)]
    said = [_behind_first(text, count, -100) for text, count in zip(texts, counts, strict=True)]
    rows = [torch.cat(parts) for parts in zip(prompts, inputs, strict=True)]
    input_ids = _pad(rows, cast(int, tokenizer.pad_token_id))
    unlabelled = [torch.full_like(prompt, -100) for prompt in prompts]
    labels = _pad([torch.cat(parts) for parts in zip(unlabelled, said, strict=True)], -100)[:, 1:]
    mask = _pad([torch.ones_like(row) for row in rows], 0)
    types = _pad([one.prompt.token_types for one in demonstrations], 0, input_ids.shape[1])
    shown = _images([one.view for one in demonstrations])
    seconds = [clip.interval for one in demonstrations for clip in one.view.clips]
    sizes = shown.get("image_grid_thw"), shown.get("video_grid_thw")
    width, kept = input_ids.shape[1], labels != -100
    firsts = [b * width + len(prompt) for b, prompt in enumerate(prompts)]
    places = torch.tensor([first + 1 + i for first, count in zip(firsts, counts, strict=True) for i in range(count)])
    read = torch.cat([states for states in latents if states is not None]) if len(places) else None
    with reading(model, places, read):
        hidden = model.model(
            input_ids=input_ids,
            attention_mask=mask,
            mm_token_type_ids=types,
            position_ids=family_of(model).positions(model, input_ids, types, mask, *sizes, seconds),
            **shown,
        ).last_hidden_state
    logprob = linear_logprob(hidden[:, :-1][kept], model.lm_head.weight, labels[kept]).logprob
    if read is not None:
        return latent_weight * latent_loss(hidden.flatten(0, 1)[places - 1], read) - logprob.mean()
    if answer_weight == 1:
        return -logprob.mean()
    in_answer = torch.tensor(
        [
            is_behind
            for one, text in zip(demonstrations, encoded, strict=True)
            for is_behind in (*(start >= one.answer_at for start, _ in text["offset_mapping"]), True)
        ]
    )
    weight = torch.where(in_answer, answer_weight, 1.0)
    return -(weight * logprob).sum() / weight.sum()


class Examples:
    """Prompts and image features of digit pairs, computed once."""

    def __init__(
        self,
        pairs: list[DigitPair],
        preprocessor: Preprocessor,
        latent_steps: int = 0,
        latent_weight: float = LOSS_WEIGHT,
    ):
        self.pairs, self.latent_steps, self.latent_weight = pairs, latent_steps, latent_weight
        self.preprocessor = preprocessor
        self.views = [preprocessor.view([pair.image]) for pair in pairs]
        prompts = {pair.question: (pair, view) for pair, view in zip(pairs, self.views, strict=True)}
        self.prompts = {name: preprocessor.prompt(pair.sample(), view) for name, (pair, view) in prompts.items()}

    def classification_loss(self, model: PreTrainedModel, classifier: nn.Module, chosen: list[int]) -> Tensor:
        """Cross-entropy of the digits of pairs `chosen`; an image is two tokens, one a digit."""
        images = _images([self.views[i] for i in chosen])
        features = _features(model, images)
        labels = torch.tensor([digit for i in chosen for digit in (self.pairs[i].left, self.pairs[i].right)])
        return nn.functional.cross_entropy(classifier(torch.cat(features)), labels)

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
        texts = [self.pairs[i].demonstration(*digits) for i, digits in zip(chosen, read, strict=True)]
        demonstrations = [
            Demonstration(*self._shown(i, text), answer) for i, text, answer in zip(chosen, printed, texts, strict=True)
        ]
        if self.latent_steps:
            demonstrations = self._with_spans(model, demonstrations)
        tokenizer = self.preprocessor.tokenizer
        return demonstration_loss(model, tokenizer, demonstrations, latent_weight=self.latent_weight)

    @torch.no_grad()
    def _with_spans(self, model: PreTrainedModel, demonstrations: Sequence[Demonstration]) -> list[Demonstration]:
        """Those with an image read its two vision tokens, in turns, in a span before they answer."""
        images = _images([one.view for one in demonstrations])
        features, turns = iter(_features(model, images) if images else ()), torch.arange(self.latent_steps) % 2

        def with_span(one: Demonstration) -> Demonstration:
            return replace(one, text=START + END + one.text, latents=_normed(next(features))[turns])

        return [with_span(one) if one.view.images else one for one in demonstrations]

    def _shown(self, i: int, printed: bool) -> tuple[Prompt, View]:
        pair = self.pairs[i]
        if not printed:
            return self.prompts[pair.question], self.views[i]
        view = self.preprocessor.view([])
        return self.preprocessor.prompt(with_view(pair.sample(), "text"), view), view


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise ConfigError(f"{folder} exists already: remove it, or name another folder")


def _new_model(processor: Qwen2_5_VLProcessor, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed_for(seed, Purpose.WARMSTART))
    return build_model(processor).train()


def _load(folder: str) -> tuple[ProcessorMixin, PreTrainedModel]:
    try:
        processor = load_processor(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    except (ConfigError, OSError, ValueError) as error:
        raise ConfigError(f"--model {folder}: {str(error).removeprefix(f'model.path={folder}: ')}") from None
    return processor, model.train()


def _save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")  # renamed when whole, so that a stop leaves no half model
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder)


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
    prompts = [DIGITS_SYSTEM_PROMPT, CHAT, *QUESTIONS.values()]
    states = [pair.sample().state for pair in pairs[:1000]] if printed else []
    return prompts * 100 + [pair.demonstration() for pair in pairs[:1000]] + states


def _sample_corpus(samples: list[Sample], design: str) -> list[str]:
    """The same of samples, without their states: a small model learns to read these sooner character by character."""
    problems = [MARK.sub("", sample.problem) for sample in samples]
    return [SYSTEM_PROMPTS[design], CHAT, "".join(DEMONSTRATIONS[design]("", ""))] * len(problems) + problems


def _images(views: Sequence[View]) -> dict[str, Tensor]:
    given = {
        "pixel_values": [view.pixel_values for view in views],
        "image_grid_thw": [view.sizes for view in views],
        "pixel_values_videos": [view.video_pixel_values for view in views],
        "video_grid_thw": [view.video_sizes for view in views],
    }
    found = {name: [tensor for tensor in tensors if tensor is not None] for name, tensors in given.items()}
    return {name: torch.cat(tensors) for name, tensors in found.items() if tensors}


def _features(model: PreTrainedModel, images: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The vision tokens (T, D) of each image."""
    return tuple(model.model.get_image_features(*images.values(), return_dict=True).pooler_output)


def _normed(features: Tensor) -> Tensor:
    """Vision tokens (T, D), each with a root mean square of 1."""
    return features / features.square().mean(dim=-1, keepdim=True).sqrt()


def _behind_first(ids: Tensor, count: int, filler: int) -> Tensor:
    """Token ids (T,) with so many of `filler` behind the first one."""
    return torch.cat([ids[:1], ids.new_full((count,), filler), ids[1:]])


def _pad(rows: list[Tensor], value: int, length: int | None = None) -> Tensor:
    length = length or max(len(row) for row in rows)
    return torch.stack([nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])
