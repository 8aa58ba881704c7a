"""From a sample to what models take: token ids, and tensors of images and videos for each branch.

A `Prompt` holds what all views of its images share: the text. T(x) keeps an image's size, so views have the same token
ids and differ in a `View` alone. A video is several frames of one size, to which T(x) does the same.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from transformers import AutoProcessor, ProcessorMixin

from vogue.config import Config
from vogue.data import DataError, Sample
from vogue.data.dataset import OverlongError
from vogue.data.images import NO_LIMITS, PixelLimits
from vogue.data.prompts import chat_messages, system_prompt
from vogue.data.samples import PLACEHOLDER
from vogue.data.videos import QWENS, Clip, Outline, VideoLimits
from vogue.families import family_of_processor
from vogue.settings import ConfigError

RAW, NOISY = "raw", "noisy"  # names of views: x and T(x)
OPENED = re.compile(r"<think>\s*(?:</think>\s*)?$")  # at the end of a prompt, behind the header of the model's turn
MARKED, MARK_END = "\uf8f0", "\uf8f1"  # of a private area: around what is text although it reads like a special token
MARKS = re.compile(f"{MARKED}(.*?){MARK_END}", re.DOTALL)
# A fast tokenizer keeps, for all threads, whether it splits special tokens, and reads that after it was set.
TOKENIZING = Lock()

Spans = tuple[tuple[int, int], ...]  # (first, how many) of runs of tokens
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class View:
    """The images and videos of a prompt, raw or perturbed, and what the model's own processors make of them."""

    images: tuple[Image.Image, ...]
    # float32: Qwen's and GLM's (patches, D), LLaVA-OneVision's (images, tiles, 3, height, width), InternVL's and
    # Gemma's (tiles, 3, height, width)
    pixel_values: Tensor | None
    # int64: (images, 3) patches in time, height and width; (images, 2) pixels high and wide; (images,) tiles
    sizes: Tensor | None
    clips: tuple[Clip, ...] = ()
    video_pixel_values: Tensor | None = None  # float32 (patches, D), as those of images
    video_sizes: Tensor | None = None  # int64 (videos, 3) patches in time, height and width

    @property
    def shown(self) -> bool:
        """Whether there is an image or a video."""
        return bool(self.images or self.clips)


@dataclass(frozen=True)
class Prompt:
    """The text of a sample as token ids.

    `opened` is what the chat template itself has written of the model's turn: "", "<think>", or, where thinking is
    switched off, an empty thought.

    `token_ids` (P,) int64 has a placeholder for each token of an image or a video; `image_spans` says where each
    image's lie, (first, how many), `video_spans` where each video's do, of which some models have one for each pair of
    frames, with the time in text before it; `token_types` (P,) is 1 at image tokens, 2 at a video's and 0 elsewhere.
    """

    sample: Sample
    image_spans: Spans
    token_ids: Tensor
    token_types: Tensor
    opened: str = ""
    video_spans: tuple[Spans, ...] = ()


class Preprocessor:
    """Applies a model's own chat template and image processor.

    A special token that a question spells stays the text that it is: a question can't end its own turn.

    system_prompt      of every prompt
    max_prompt_tokens  of a prompt with its images; a longer one is refused
    limits             of the images' sizes, before anything sees them
    own_system         a row's own system message takes the place of `system_prompt`
    video_limits       which frames of a video are taken, and how large they are

    Raises `DataError` for an image that can't be read and a prompt that is too long; `lengths` finds both, but for
    what an image's header doesn't tell, before anything is generated or trained.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        system_prompt: str,
        max_prompt_tokens: int,
        limits: PixelLimits = NO_LIMITS,
        own_system: bool = False,
        video_limits: VideoLimits = QWENS,
    ):
        self.processor: Any = processor  # has more than transformers' types say
        self.tokenizer = self.processor.tokenizer
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.limits = limits
        self.own_system = own_system
        self.video_limits = video_limits
        self.family = family_of_processor(processor)
        self.image_token_id: int = self.family.image_token_id(self.processor)
        self.image_options = self.family.image_options(self.processor)
        self._frame = self.family.frame(self.processor)
        # What a sample spells itself stands in a mark.
        self._written = re.compile(f"(?<!{MARKED}){re.escape(self.processor.image_token)}")
        video_token = getattr(self.processor, "video_token", None)
        self._video = re.compile(f"(?<!{MARKED}){re.escape(video_token)}" if video_token else "(?!)")
        self.video_token_id: int = getattr(self.processor, "video_token_id", -1)
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        # Longest first; LLaVA-OneVision has one that reads like the placeholder.
        self.special_tokens = sorted((text for text in special if text != PLACEHOLDER), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self.special_tokens)) or "(?!)")

    @classmethod
    def of(cls, config: Config) -> "Preprocessor":
        """The one of a run: its model's processor, and the system prompt of its settings or its reward's design."""
        data = config.data
        return cls(
            load_processor(config.model.path),
            system_prompt(config),
            data.max_prompt_tokens,
            PixelLimits(data.min_pixels, data.max_pixels),
            own_system=data.system_prompt is None,
            video_limits=VideoLimits(
                data.video_fps, data.video_max_frames, PixelLimits(data.video_min_pixels, data.video_max_pixels)
            ),
        )

    def lengths(self, samples: Sequence[Sample]) -> list[int | DataError]:
        """The prompts' lengths in tokens, or what is wrong with one; of images only the headers are read."""
        with ThreadPoolExecutor() as pool:
            counts = list(pool.map(_caught(self.image_tokens), samples))
            outlines = list(pool.map(_caught(self.outlines), samples))
        texts = [
            told if isinstance(told, DataError) else _caught(self.text)(sample, told)
            for sample, told in zip(samples, outlines, strict=True)
        ]
        plain = [text for text in texts if isinstance(text, str) and MARKED not in text]
        # Many at once, since the tokenizer shares them out over the cores.
        with TOKENIZING:
            tokenized = iter(self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else [])
        found: list[int | DataError] = []
        for sample, count, told, text in zip(samples, counts, outlines, texts, strict=True):
            ids: list[int] = []
            if isinstance(text, str):
                ids = self._tokenize(text) if MARKED in text else next(tokenized)
            if isinstance(told, DataError):
                found.append(told)
            elif isinstance(text, DataError):
                found.append(text)
            elif isinstance(count, DataError):
                found.append(count)
            else:
                found.append(_caught(self._length)(sample, ids, count, self.video_tokens(told)))
        return found

    def image_tokens(self, sample: Sample) -> list[int]:
        """Tokens that each of a sample's images takes, by their headers."""
        return self._image_tokens(sample, sample.image_sizes(self.limits))

    def images(self, sample: Sample) -> list[Image.Image]:
        """A sample's images as everything after this sees them."""
        return sample.load_images(self.limits)

    def clips(self, sample: Sample) -> list[Clip]:
        """A sample's videos as everything after this sees them."""
        return sample.load_videos(self.video_limits)

    def outlines(self, sample: Sample) -> list[Outline]:
        """What is known of a sample's videos without their pixels; raises `DataError` where the model takes none."""
        if sample.videos and not self.family.videos:
            raise DataError(
                f"{sample.place}: it has a video, and prompts of {type(self.processor).__name__} are made with images "
                "alone here; Qwen2.5-VL and Qwen3-VL take videos"
            )
        return sample.video_outlines(self.video_limits)

    def raw_view(self, sample: Sample) -> View:
        """A sample's own images and videos as the vision tower's input."""
        return self.view(self.images(sample), self.clips(sample))

    def text(self, sample: Sample, outlines: Sequence[Outline] = ()) -> str:
        """The prompt's text by the model's chat template; special tokens of the sample's own stand in marks.

        outlines  of its videos: what stands between their frames is text, too
        """
        own = self._special.sub(_marked, sample.system) if self.own_system else ""
        quoted = replace(sample, problem=self._special.sub(_marked, sample.problem))
        try:
            text = self.processor.apply_chat_template(
                chat_messages(quoted, own or self.system_prompt), tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError) as error:  # a template that takes no system message, or none at all
            raise DataError(f"{sample.place}: the model's chat template says: {error}") from error
        frame = self._frame
        text = text if frame is None else self._written.sub(lambda _: frame, text)
        between = iter([self.family.video_text(self.processor, outline.times) for outline in outlines])
        return self._video.sub(lambda match: next(between, match[0]), text) if outlines else text

    def view(self, images: Sequence[Image.Image], clips: Sequence[Clip] = ()) -> View:
        """Turn PIL images and videos into the vision tower's input."""
        seen = self._view_of_images(images)
        if not clips:
            return seen
        frames = [torch.stack([F.pil_to_tensor(frame) for frame in clip.frames]) for clip in clips]
        features = self.processor.video_processor(
            videos=frames, do_sample_frames=False, return_tensors="pt", **self.family.video_options(self.processor)
        )
        return replace(
            seen,
            clips=tuple(clips),
            video_pixel_values=features["pixel_values_videos"],
            video_sizes=features["video_grid_thw"],
        )

    def _view_of_images(self, images: Sequence[Image.Image]) -> View:
        if not images:
            return View((), None, None)
        # A list of lists: of several images of one prompt LLaVA-OneVision cuts none into tiles.
        features = self.processor.image_processor(images=[list(images)], return_tensors="pt", **self.image_options)
        return View(tuple(images), features["pixel_values"], self.family.view_sizes(features))

    def prompt(self, sample: Sample, view: View) -> Prompt:
        """Tokenize `sample` for images of `view`'s size."""
        counts = self._image_tokens(sample, [image.size for image in view.images])
        outlines = [Outline(clip.times, clip.interval, clip.frames[0].size) for clip in view.clips]
        text = self.text(sample, outlines)
        short_ids = self._tokenize(text)
        video_counts = self.video_tokens(outlines)
        self._length(sample, short_ids, counts, video_counts)
        of_each = {self.image_token_id: counts}
        if video_counts:
            of_each[self.video_token_id] = [count for clip in video_counts for count in clip]
        token_ids, spans = _expand(short_ids, of_each)
        ids = torch.tensor(token_ids)
        types = (ids == self.image_token_id).long()
        video_spans: tuple = ()
        if video_counts:
            types += 2 * (ids == self.video_token_id)
            runs = iter(spans[self.video_token_id])
            video_spans = tuple(tuple(next(runs) for _ in clip) for clip in video_counts)
        opened = OPENED.search(text)
        opening = opened.group() if opened else ""
        return Prompt(sample, spans[self.image_token_id], ids, types, opening, video_spans)

    def _tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt's text; what stands in marks is plain text."""
        ids: list[int] = []
        with TOKENIZING:
            for number, piece in enumerate(MARKS.split(text)):
                plain = {"add_special_tokens": False, "split_special_tokens": number % 2 == 1}
                ids += self.tokenizer(piece, **plain)["input_ids"]
        return ids

    def _image_tokens(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> list[int]:
        try:
            return self.family.image_tokens(self.processor, sizes)
        except ValueError as error:  # of a shape that the model doesn't take; the processor doesn't say which image
            for number, (width, height) in enumerate(sizes):
                try:
                    self.family.image_tokens(self.processor, [(width, height)])
                except ValueError:
                    where = f"{sample.image_place(number)} of {width} x {height} pixels"
                    raise DataError(f"{where}: the model's processor says: {error}") from error
            raise DataError(f"{sample.place}: the model's processor says: {error}") from error

    def video_tokens(self, outlines: Sequence[Outline]) -> list[list[int]]:
        """Tokens that each video takes, for each of its placeholders in the text."""
        return [self.family.video_tokens(self.processor, len(outline.times), outline.size) for outline in outlines]

    def _length(self, sample: Sample, short_ids: list[int], counts: list[int], videos: list[list[int]]) -> int:
        """Tokens of a prompt whose images and videos take so many; raises DataError for one that is too long."""
        places = short_ids.count(self.image_token_id)
        if places != len(counts):
            raise DataError(f"{sample.place}: {len(counts)} images, but the chat template gives {places} a place")
        wanted, video_places = sum(map(len, videos)), short_ids.count(self.video_token_id) if videos else 0
        if video_places != wanted:
            raise DataError(
                f"{sample.place}: {len(videos)} videos take {wanted} places in the prompt, but the chat template gives "
                f"{video_places}"
            )
        of_videos = sum(map(sum, videos))
        length = len(short_ids) - places - video_places + sum(counts) + of_videos
        if length > self.max_prompt_tokens:
            both = f" and {of_videos} of videos" if videos else ""
            lower = "a lower data.max_pixels makes images smaller"
            if videos:
                lower = "lower data.video_fps, data.video_max_frames or data.video_max_pixels make videos shorter"
            raise OverlongError(
                f"{sample.place}: the prompt has {length} tokens ({sum(counts)} of them of images{both}), more "
                f"than data.max_prompt_tokens={self.max_prompt_tokens}; {lower}, "
                "data.overlong=drop leaves such samples out"
            )
        return length


def cat_images(pixel_values: Sequence[Tensor]) -> Tensor:
    """`pixel_values` of several views in one; where every image has room for as many tiles, missing ones are zero."""
    if pixel_values[0].dim() == 5:
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


def _marked(match: re.Match[str]) -> str:
    return f"{MARKED}{match[0]}{MARK_END}"


def _caught(function: Callable[Arguments, Result]) -> Callable[Arguments, Result | DataError]:
    """The function, except that it returns a `DataError` that it would raise."""

    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result | DataError:
        try:
            return function(*arguments, **named)
        except DataError as error:
            return error

    return call


def _expand(ids: list[int], counts: Mapping[int, Sequence[int]]) -> tuple[list[int], dict[int, Spans]]:
    """Repeat the i-th of each placeholder as often as its i-th count says; also (first, how many) of each."""
    expanded: list[int] = []
    spans: dict[int, list[tuple[int, int]]] = {placeholder: [] for placeholder in counts}
    repeats = {placeholder: iter(of_each) for placeholder, of_each in counts.items()}
    for token in ids:
        count = next(repeats[token]) if token in repeats else 1
        if token in repeats:
            spans[token].append((len(expanded), count))
        expanded += [token] * count
    return expanded, {placeholder: tuple(found) for placeholder, found in spans.items()}
