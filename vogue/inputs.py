"""From a sample to what models take: token ids, and image tensors for each branch.

A `Prompt` holds what all views of its images share: the text. T(x) keeps an image's size, so views have the same token
ids and differ in a `View` alone.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin

from vogue.config import Config
from vogue.data import DataError, Sample
from vogue.data.prompts import chat_messages, system_prompt
from vogue.families import family_of_processor
from vogue.settings import ConfigError

RAW, NOISY = "raw", "noisy"  # names of views: x and T(x)
OPENED = re.compile(r"<think>\s*(?:</think>\s*)?$")  # at the end of a prompt


@dataclass(frozen=True)
class View:
    """The images of a prompt, raw or perturbed, and what the model's own image processor makes of them."""

    images: tuple[Image.Image, ...]
    pixel_values: Tensor | None  # float32: Qwen's (patches, D), LLaVA-OneVision's (images, tiles, 3, height, width)
    sizes: Tensor | None  # int64: (images, 3) patches in time, height and width; (images, 2) pixels high and wide


@dataclass(frozen=True)
class Prompt:
    """The text of a sample as token ids.

    `opened` is what the chat template itself has written of the model's turn: "", "<think>", or, where thinking is
    switched off, an empty thought.

    `token_ids` (P,) int64 has a placeholder for each token of an image; `image_spans` says where each image's lie,
    (first, how many); `token_types` (P,) is 1 at image tokens and 0 elsewhere.
    """

    sample: Sample
    image_spans: tuple[tuple[int, int], ...]
    token_ids: Tensor
    token_types: Tensor
    opened: str = ""


class Preprocessor:
    """Applies a model's own chat template and image processor.

    Raises `DataError` for an image that can't be read, a prompt longer than `max_prompt_tokens`, and placeholders
    that don't add up; `check` finds all of them before anything is generated or trained.
    """

    def __init__(self, processor: ProcessorMixin, system_prompt: str, max_prompt_tokens: int):
        self.processor: Any = processor  # has more than transformers' types say
        self.tokenizer = self.processor.tokenizer
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.image_token_id: int = self.processor.image_token_id
        self.family = family_of_processor(processor)

    @classmethod
    def of(cls, config: Config) -> "Preprocessor":
        """The one of a run: its model's processor, and the system prompt of its settings or its reward's design."""
        return cls(load_processor(config.model.path), system_prompt(config), config.data.max_prompt_tokens)

    def check(self, samples: Iterable[Sample]) -> list[int]:
        """The prompts' lengths in tokens; images are decoded, but not turned into features.

        Raises what any of `samples` would raise later.
        """
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self._length, samples))

    def _length(self, sample: Sample) -> int:
        return len(self._token_ids(sample, self.family.image_tokens(self.processor, sample.load_images()))[0])

    def view(self, images: Sequence[Image.Image]) -> View:
        """Turn PIL images into the vision tower's input."""
        if not images:
            return View((), None, None)
        # A list of lists: of several images of one prompt LLaVA-OneVision cuts none into tiles.
        features = self.processor.image_processor(images=[list(images)], return_tensors="pt")
        return View(tuple(images), features["pixel_values"], features[self.family.sizes])

    def prompt(self, sample: Sample, view: View) -> Prompt:
        """Tokenize `sample` for images of `view`'s size."""
        token_ids, spans = self._token_ids(sample, self.family.image_tokens(self.processor, view.images))
        return Prompt(sample, spans, token_ids, (token_ids == self.image_token_id).long(), self.opened)

    @cached_property
    def opened(self) -> str:
        """What the chat template writes of the model's turn: see `Prompt`."""
        chat = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found = OPENED.search(text)
        return found.group() if found else ""

    def _token_ids(self, sample: Sample, counts: list[int]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Token ids of `sample`, whose images take `counts` tokens, and where they lie."""
        text = self.processor.apply_chat_template(
            chat_messages(sample, self.system_prompt), tokenize=False, add_generation_prompt=True
        )
        short_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if short_ids.count(self.image_token_id) != len(counts):
            raise DataError(
                f"{sample.place}: {len(counts)} images, but the prompt has {short_ids.count(self.image_token_id)} "
                f"places for one; does the text hold {self.processor.image_token} itself?"
            )
        token_ids, spans = _expand(short_ids, self.image_token_id, counts)
        if len(token_ids) > self.max_prompt_tokens:
            raise DataError(
                f"{sample.place}: the prompt has {len(token_ids)} tokens ({sum(counts)} of them of images), more "
                f"than data.max_prompt_tokens={self.max_prompt_tokens}"
            )
        return torch.tensor(token_ids), spans


def cat_images(pixel_values: Sequence[Tensor]) -> Tensor:
    """`pixel_values` of several views in one; where images are cut into tiles, the missing ones are zero."""
    if pixel_values[0].dim() > 2:
        tiles = max(values.shape[1] for values in pixel_values)
        pixel_values = [
            torch.cat([values, values.new_zeros(len(values), tiles - values.shape[1], *values.shape[2:])], dim=1)
            for values in pixel_values
        ]
    return torch.cat(list(pixel_values))


def load_processor(path: str) -> ProcessorMixin:
    """Tokenizer and image processor of the model at `path`; raises `ConfigError` where there is none."""
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: {str(error).splitlines()[0]}") from None


def _expand(ids: list[int], placeholder: int, counts: list[int]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Repeat the i-th placeholder `counts[i]` times; also (first, how many) of each."""
    expanded: list[int] = []
    spans, repeats = [], iter(counts)
    for token in ids:
        count = next(repeats) if token == placeholder else 1
        if token == placeholder:
            spans.append((len(expanded), count))
        expanded += [token] * count
    return expanded, tuple(spans)
