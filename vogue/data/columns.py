r"""A row in one of the shapes that data sets have becomes a `Sample`.

| shape         | question                           | images                      | answer                           |
|---------------|------------------------------------|-----------------------------|----------------------------------|
| EasyR1        | problem: text                      | images: a list              | answer                           |
| verl          | prompt: messages                   | images: a list              | reward_model.ground_truth        |
| TRL           | prompt: messages, of text or parts | image, images, or in a part | solution, answer, ground_truth   |
| ms-swift      | messages                           | images: a list of paths     | solution, or the assistant's     |
| LLaVA, VLM-R1 | conversations: from and value      | image: a path or a list     | the assistant's                  |
| a table       | problem, question, query …         | image: a path               | answer, solution or ground_truth |

Videos stand in a column `videos` or `video` of any of these, or in parts of messages, {"type": "video", "video": …}.

Which columns are meant is settled once for a data set, from the names that it has, and never guessed between two.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from vogue.answer_extraction import boxed
from vogue.config.sections import DataConfig
from vogue.data import videos
from vogue.data.files import DataError, Row
from vogue.data.images import ImageError, Reference, reference, short
from vogue.data.samples import OPTIONAL, PLACEHOLDER, VIDEO, Sample, is_visible

# What a column may be called, the names of vogue's own (and EasyR1's) schema first: where one of those is there, it is
# meant; of the others exactly one may be.
QUESTIONS = ("problem", "prompt", "messages", "conversations", "question", "query", "instruction")
ANSWERS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
IMAGES = ("images", "image")
VIDEOS = ("videos", "video")
SOURCES = ("source", "data_source")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
# Marks for an image's place in other schemas than EasyR1's: <image 1>, <image_1>, <|image_1|>, (image)[…], ![…](…).
NUMBERED = re.compile(r"<\|?image[ _-]?(\d+)\|?>", re.IGNORECASE)
NAMED = re.compile(r"\(image\)\[[^\]]*\]|!\[[^\]]*\]\([^)]*\)|<img>|<\|image\|>", re.IGNORECASE)
OTHER_MEDIA = re.compile(r"<audio>", re.IGNORECASE)
ANSWER_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Shape:
    """The settings that say where things stand in a row; unset ones are found by the columns' names.

    Keys may lead into a record: reward_model.ground_truth. `images_key` and `videos_key` "" say that there are none.
    `format_prompt` is a Jinja template, or the path of one, of `content` (the question) and the row's columns.
    """

    problem_key: str | None = None
    answer_key: str | None = None
    images_key: str | None = None
    videos_key: str | None = None
    image_folder: Path | None = None
    format_prompt: str | None = None


def shape_of(settings: DataConfig) -> Shape:
    """The shape that the settings under `data` describe."""
    return Shape(*(getattr(settings, field.name) for field in fields(Shape)))


@dataclass(frozen=True)
class Question:
    """What a row asks.

    `cells` are images that stand in the messages themselves, `videos` videos, `answer` an assistant's turn.
    """

    text: str
    system: str = ""
    cells: list[Any] = field(default_factory=list)
    answer: str | None = None
    videos: list[Any] = field(default_factory=list)


class Reader:
    """Makes samples of a data set's rows; raises `DataError` where its columns don't say what is meant."""

    def __init__(self, shape: Shape, columns: tuple[str, ...], first: Row, name: str):
        self.folder = shape.image_folder
        self.columns, self.name = columns, name
        self.problem = self._key(shape.problem_key, QUESTIONS, "problem", "the question")
        self.template = _template(shape.format_prompt)
        shown = _question(_get(first.values, self.problem), self.problem, first.place)
        self.answer = self._key(shape.answer_key, ANSWERS, "answer", "the right answer", needed=shown.answer is None)
        self.videos = self._key(shape.videos_key, VIDEOS, "videos", "videos", needed=False)
        shown_already = shown.cells or shown.videos or self.videos
        self.images = self._key(shape.images_key, IMAGES, "images", "images", needed=not shown_already)
        self.source = next((name for name in SOURCES if name in columns), "")
        used = (self.problem, self.answer, self.images, self.videos, self.source, *OPTIONAL)
        self.further = tuple(name for name in columns if name not in used)

    def sample(self, row: Row) -> Sample:
        """Raises DataError with the row's place for one that can't be used."""
        try:
            return self._sample(row)
        except (ImageError, TemplateError) as error:
            raise DataError(f"{row.place}: {error}.") from error

    def _sample(self, row: Row) -> Sample:
        values, place = row.values, row.place
        question = _question(_get(values, self.problem), self.problem, place)
        text = question.text
        if self.template is not None:
            text = self.template.render(values | {"content": text})
        cells = question.cells or _cells(_get(values, self.images), self.images, place)
        folder = row.folder if self.folder is None else self.folder
        clips = question.videos or _cells(_get(values, self.videos), self.videos, place)
        found = tuple(videos.reference(cell, folder) for cell in clips)
        text, images = _placed(text, [reference(cell, folder) for cell in cells], place)
        # Marks of one kind alone: the others come first, as without any mark.
        if images and VIDEO in text and PLACEHOLDER not in text:
            text = PLACEHOLDER * len(images) + text
        if found and PLACEHOLDER in text and VIDEO not in text:
            text = VIDEO * len(found) + text
        written = _get(values, self.answer)
        if written is None and question.answer is not None:
            written = question.answer
        answer = _answer(written, self.answer or self.problem, place)
        if self.answer == "solution" or written is question.answer:
            answer = _unwrapped(answer)
        return Sample(
            text,
            answer,
            images,
            _text(values.get(self.source)),
            _text(values.get("category")),
            _text(values.get("state")),
            place,
            question.system,
            {name: _plain(values[name]) for name in self.further if name in values},
            found,
        )

    def _key(self, chosen: str | None, known: tuple[str, ...], own: str, meaning: str, needed: bool = True) -> str:
        """The column that holds `meaning`, "" for none; `known` are the names it may have."""
        setting = f"data.{own}_key"
        if chosen is not None:
            if chosen and chosen not in self.columns and chosen.split(".")[0] not in self.columns:
                raise DataError(f"{self.name}: {setting}={chosen}: no such column (it has: {self._told()}).")
            return chosen
        found = [name for name in known if name in self.columns or name.split(".")[0] in self.columns]
        if found and (found[0] == known[0] or len(found) == 1):
            return found[0]
        if not found and not needed:
            return ""
        if not found:
            none = "; data.images_key='' says that there are none" if own == "images" else ""
            told = f"{setting} names the one of {meaning}{none}"
            raise DataError(f"{self.name}: no column '{own}' (it has: {self._told()}); {told}.")
        raise DataError(
            f"{self.name}: columns {' and '.join(found)} may each hold {meaning}: {setting} says which does."
        )

    def _told(self) -> str:
        return ", ".join(self.columns)


def _template(format_prompt: str | None):
    """The compiled template; raises `DataError` for a path of no file and for what isn't Jinja."""
    if format_prompt is None:
        return None
    text = format_prompt
    if "{{" not in text and "{%" not in text:
        path = Path(text)
        if not path.is_file():
            raise DataError(f"data.format_prompt={text}: neither a template with {{{{ content }}}} nor a file of one.")
        text = path.read_text(encoding="utf-8")
    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text)
    except TemplateError as error:
        raise DataError(f"data.format_prompt: {error}.") from error


def _question(value: Any, key: str, place: str) -> Question:
    """The question of a text, or of messages as a list or as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("[{") and key in QUESTIONS[1:4]:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: '{key}' begins like a list of messages, but is not valid JSON: {error}."
            ) from error
    if not isinstance(value, list):
        return Question(_string(value, key, place))
    turns: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    cells, clips = [], []
    for message in value:
        if not isinstance(message, Mapping):
            raise DataError(f"{place}: '{key}' must hold messages, but holds {short(message)}.")
        role = message.get("role") or message.get("from")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        known = ROLES.get(str(role).lower(), str(role).lower())
        if known not in turns:
            raise DataError(f"{place}: a message of '{key}' has the role {role!r}, not one of {', '.join(turns)}.")
        turns[known].append(_content(content, cells, clips, key, place))
    if len(turns["user"]) != 1 or len(turns["assistant"]) > 1:
        counts = f"{len(turns['user'])} user turns and {len(turns['assistant'])} of an assistant"
        raise DataError(f"{place}: '{key}' has {counts}; a sample is one question, and its answer at most.")
    answer = turns["assistant"][0] if turns["assistant"] else None
    return Question(turns["user"][0], "\n".join(turns["system"]), cells, answer, clips)


def _content(content: Any, cells: list[Any], clips: list[Any], key: str, place: str) -> str:
    """A message's text, with a placeholder for each image or video; what the parts hold goes into `cells`, `clips`."""
    if not isinstance(content, list):
        return _string(content, key, place)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_string(part.get("text"), key, place))
        elif kind in ("image", "image_url"):
            texts.append(PLACEHOLDER)
            held = next((part[name] for name in ("image", "image_url", "path", "url", "bytes") if part.get(name)), None)
            if held is not None:
                cells.append(held)
        elif kind in ("video", "video_url"):
            texts.append(VIDEO)
            if any(part.get(name) for name in videos.NAMES):
                clips.append({name: value for name, value in part.items() if name != "type"})
        else:
            raise DataError(f"{place}: a part of '{key}' must be text, an image or a video, but is {short(part)}.")
    return "".join(texts)


def _cells(value: Any, key: str, place: str) -> list[Any]:
    """The cells of a column of images: a list, a list as JSON, one image alone, or none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: '{key}' begins like a list, but is not valid JSON: {error}.") from error
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, Mapping) and all(part is None for part in value.values()):
        return []
    return value if isinstance(value, list) else [value]


def _placed(text: str, images: list[Reference], place: str) -> tuple[str, tuple[Reference, ...]]:
    """The text with `<image>` at each image's place, and the images in the order of their places."""
    if media := OTHER_MEDIA.search(text):
        raise DataError(f"{place}: the problem has {media[0]}, which can't be heard here: {short(text)}.")
    if PLACEHOLDER in text or not images:
        return text, tuple(images)
    numbers = list(dict.fromkeys(int(match[1]) for match in NUMBERED.finditer(text)))
    if numbers:
        if sorted(numbers) != list(range(1, len(images) + 1)):
            raise DataError(
                f"{place}: the problem names images {numbers}, but the row has {len(images)}: {short(text)}."
            )
        unseen = set(numbers)
        text = NUMBERED.sub(lambda match: _first(int(match[1]), unseen), text)
        return text, tuple(images[number - 1] for number in numbers)
    marks = NAMED.findall(text)
    if marks and len(marks) != len(images):
        told = f"{len(marks)} marks such as {marks[0]!r}, but the row has {len(images)} image(s)"
        raise DataError(f"{place}: the problem has {told}; write {PLACEHOLDER} where each belongs.")
    return NAMED.sub(PLACEHOLDER, text), tuple(images)


def _first(number: int, unseen: set[int]) -> str:
    """What takes the place of a numbered mark: the image where it is first named, words after that."""
    if number not in unseen:
        return f"image {number}"
    unseen.remove(number)
    return PLACEHOLDER


def _answer(value: Any, key: str, place: str) -> str:
    """The answer as people write it: numbers without an exponent, and no more digits than say which one it is."""
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            raise DataError(f"{place}: '{key}' must be text or a number, but is {value}.")
        return np.format_float_positional(value, trim="-")
    if isinstance(value, int | np.integer):
        return str(value)
    return _string(value, key, place)


def _unwrapped(answer: str) -> str:
    r"""What a worked solution answers: the inside of its last <answer>…</answer>, and of the last \boxed{…} in that."""
    *_, inner = [answer, *ANSWER_TAGS.findall(answer)]
    found = boxed(inner)
    return (inner if found is None else found).strip()


def _string(value: Any, key: str, place: str) -> str:
    if not isinstance(value, str) or not is_visible(value):
        raise DataError(f"{place}: '{key}' must be text and not empty, but is {short(value)}.")
    return value


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _get(values: Mapping[str, Any], key: str) -> Any:
    """The value of a column, or inside of one by a key with dots; None where there is none."""
    if key in values or "." not in key:
        return values.get(key)
    found: Any = values
    for name in key.split("."):
        if isinstance(found, str) and found.lstrip().startswith("{"):
            found = json.loads(found)  # records are stored as JSON where a table has no type for them
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _plain(value: Any) -> Any:
    """A further column's value as JSON has it: what has no form there as text, bytes and images not at all."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bytes | pa.Buffer | Image.Image):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
