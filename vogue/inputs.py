"""From a sample to what models take: token ids, and image tensors for each branch.

A `Prompt` holds what both branches share: the text. T(x) keeps an image's size, so the two branches have the
same token ids and differ in a `View` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin

from vogue.config import ConfigError
from vogue.data import DataError, Sample
from vogue.data.prompts import SYSTEM_PROMPT, chat_messages


@dataclass(frozen=True)
class View:
    """The images of one branch. `pixel_values` (patches, patch dim) float32, `grid_thw` (images, 3) int64."""

    images: tuple[Image.Image, ...]
    pixel_values: Tensor | None
    grid_thw: Tensor | None


@dataclass(frozen=True)
class Prompt:
    """The text of a sample as token ids.

    `token_ids` (P,) int64 has one placeholder per image *token*, as the policy takes it; `short_ids` has one per
    image, as vLLM takes it; `token_types` (P,) is 1 at image tokens and 0 elsewhere.
    """

    sample: Sample
    short_ids: list[int]
    token_ids: Tensor
    token_types: Tensor


class Preprocessor:
    """Applies a model's own chat template and image processor; `system_prompt` None is vogue's own.

    Raises `DataError` for a prompt longer than `max_prompt_tokens` and for an image whose placeholders don't
    add up, both before anything is generated or trained.
    """

    def __init__(self, processor: ProcessorMixin, system_prompt: str | None, max_prompt_tokens: int):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.system_prompt = SYSTEM_PROMPT if system_prompt is None else system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.image_token_id = processor.image_token_id

    def view(self, images: Sequence[Image.Image]) -> View:
        """Turn PIL images into the vision tower's input."""
        if not images:
            return View((), None, None)
        features = self.processor.image_processor(images=list(images), return_tensors="pt")
        return View(tuple(images), features["pixel_values"], features["image_grid_thw"])

    def prompt(self, sample: Sample, view: View) -> Prompt:
        """Tokenize `sample` for images of `view`'s size."""
        text = self.processor.apply_chat_template(
            chat_messages(sample, self.system_prompt), tokenize=False, add_generation_prompt=True
        )
        short_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        counts = self._image_tokens(view)
        if short_ids.count(self.image_token_id) != len(counts):
            raise DataError(
                f"{sample.place}: {len(counts)} images, but the prompt has {short_ids.count(self.image_token_id)} "
                f"places for one; does the text hold {self.processor.image_token} itself?"
            )
        token_ids = torch.tensor(_expand(short_ids, self.image_token_id, counts))
        if len(token_ids) > self.max_prompt_tokens:
            raise DataError(
                f"{sample.place}: the prompt has {len(token_ids)} tokens ({sum(counts)} of them of images), more "
                f"than data.max_prompt_tokens={self.max_prompt_tokens}"
            )
        return Prompt(sample, short_ids, token_ids, (token_ids == self.image_token_id).long())

    def _image_tokens(self, view: View) -> list[int]:
        if view.grid_thw is None:
            return []
        merge = self.processor.image_processor.merge_size
        return (view.grid_thw.prod(dim=1) // merge**2).tolist()


def load_processor(path: str) -> ProcessorMixin:
    """Tokenizer and image processor of the model at `path`; raises `ConfigError` where there is none."""
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: {str(error).splitlines()[0]}") from None


def _expand(ids: list[int], placeholder: int, counts: list[int]) -> list[int]:
    """Repeat the i-th placeholder `counts[i]` times."""
    repeats = iter(counts)
    return [token for i in ids for token in ([i] * next(repeats) if i == placeholder else [i])]
