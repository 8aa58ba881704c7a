"""What `vogue data check` and `vogue data show` find out about a data set before a run does."""

import base64
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from markupsafe import escape as escape_html
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from vogue.config import Config
from vogue.config.presets import DESIGNS, HEADED
from vogue.data import DataError, Sample, Samples
from vogue.data.columns import NAMED, NUMBERED
from vogue.data.dataset import Offender, broken_images, fingerprint_of, offenders_of, remember_decoded
from vogue.data.images import png
from vogue.data.samples import PLACEHOLDER
from vogue.data.videos import QWENS, Outline, VideoLimits, strip
from vogue.inputs import MARKED, MARKS, Preprocessor
from vogue.rewards import Score, score

LONG_ANSWER = 200  # characters, from which on an answer looks like a solution
SIDE = 448  # pixels of an image's longer side on the page
SHOWN = 20  # offenders in the table

PAGE = """\
<!doctype html><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
pre { white-space: pre-wrap; background: #f6f6f4; padding: 1rem; border-radius: 6px }
mark { background: #cfe3ff; border-radius: 3px } .odd { color: #a33 } dt { font-weight: 600 }
img { max-width: 100%; border: 1px solid #ddd } figure { display: inline-block; margin: 0 1rem 1rem 0 }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1a; color: #e8e8e4 } pre { background: #262624 } mark { background: #27456b; color: inherit }
  .odd { color: #f0938f } img { border-color: #444 } }
</style>
<h1>{{ title }}</h1>
{% for shown in samples %}<section><h2>{{ shown.sample.place }}</h2>
{% for image, line in shown.pictures %}<figure>
<img alt="image {{ loop.index }}" src="data:image/png;base64,{{ image }}">
<figcaption>{{ line }}</figcaption></figure>{% endfor %}
{% if shown.text is not none %}<pre>{{ marked(shown.text) }}</pre>{% endif %}
<dl>{% for name, value in shown.facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for line in shown.odd %}<p class="odd">{{ line }}</p>{% endfor %}</section>
{% endfor %}"""


@dataclass(frozen=True)
class Shown:
    """A sample as the model will see it; `text` is None where no model is named."""

    sample: Sample
    text: str | None
    facts: list[tuple[str, str]]
    images: list[tuple[tuple[int, int], tuple[int, int], int | None]]  # size before and after, tokens
    odd: list[str]
    videos: list[tuple[Outline, int | None]]  # what is shown of each, tokens
    limits: VideoLimits

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Each image with no more detail than the model sees, as the page holds it, and the line below it.

        Of a video its first frames, side by side.
        """
        small = [image.copy() for image in self.sample.load_images()]
        for image, (_, (width, height), _) in zip(small, self.images, strict=True):
            image.thumbnail((min(SIDE, width), min(SIDE, height)))
        small += map(strip, self.sample.load_videos(self.limits))
        content = [base64.b64encode(png(image)).decode() for image in small]
        return list(zip(content, [*map(image_line, self.images), *map(video_line, self.videos)], strict=True))


def show(sample: Sample, config: Config, preprocessor: Preprocessor | None) -> Shown:
    """Look at one sample; raises DataError for one that can't be used."""
    before = sample.image_sizes()
    after, counts, text = before, [None] * len(before), None
    limits = preprocessor.video_limits if preprocessor else QWENS
    outlines = preprocessor.outlines(sample) if preprocessor else sample.video_outlines(limits)
    video_counts: list[int | None] = [None] * len(outlines)
    facts = [("answer", sample.answer)]
    if not config.reward.function:
        facts.append(("as the reward reads it", str(self_scored(sample, config).parsed)))
    if preprocessor:
        after = sample.image_sizes(preprocessor.limits)
        counts = preprocessor.image_tokens(sample)
        video_counts = [sum(count) for count in preprocessor.video_tokens(outlines)]
        text = preprocessor.text(sample, outlines)
        (length,) = preprocessor.lengths([sample])
        if isinstance(length, DataError):
            raise length
        of_videos = f" and {sum(map(sum, preprocessor.video_tokens(outlines)))} of videos" if outlines else ""
        facts.insert(
            0,
            (
                "tokens",
                f"{length}, {sum(counts)} of them of images{of_videos}; at most {config.data.max_prompt_tokens}",
            ),
        )
    named = {"source": sample.source, "category": sample.category, "state": sample.state}
    facts += [(name, value) for name, value in named.items() if value]
    facts += [(f"column {name}", str(value)) for name, value in sample.columns.items()]
    shown = list(zip(before, after, counts, strict=True)), odd(sample, text, config)
    return Shown(sample, text, facts, *shown, list(zip(outlines, video_counts, strict=True)), limits)


def odd(sample: Sample, text: str | None, config: Config) -> list[str]:
    """What looks as if it were not meant."""
    found = []
    marks = [match[0] for pattern in (NUMBERED, NAMED) for match in pattern.finditer(sample.problem)]
    if marks:
        found.append(f"the question has {marks[0]!r} as plain text; {PLACEHOLDER} is what marks an image's place")
    if not sample.images and not sample.videos:
        found.append("there is no image: raw and noisy views are alike, and nothing is paid for their difference")
    if not config.reward.function and self_scored(sample, config).accuracy != 1:
        found.append(f"a completion that gives the answer {sample.answer!r} as it stands there would not be right")
    if len(sample.answer) > LONG_ANSWER:
        found.append(f"the answer has {len(sample.answer)} characters: is it a solution rather than an answer?")
    if text is None:
        return found
    if MARKED in text:
        spelled = ", ".join(dict.fromkeys(MARKS.findall(text)))
        found.append(f"the text spells special tokens, which stay plain text: {spelled}")
    if text.rstrip().endswith("<think>"):
        found.append("the chat template opens <think> itself: completions begin inside of it")
    design = config.reward.design
    weighs_box = "accuracy" in DESIGNS[design] and design not in HEADED and not config.reward.function
    if weighs_box and "\\boxed" not in text:
        found.append(f"nothing in the prompt asks for \\boxed{{}}, which reward.design={config.reward.design} reads")
    return found


def image_line(image: tuple[tuple[int, int], tuple[int, int], int | None]) -> str:
    """What is said of an image: its size, the one it is given to the model in, and its tokens."""
    before, after, tokens = image
    line = f"{before[0]} x {before[1]} pixels"
    if after != before:
        line += f", made {after[0]} x {after[1]}"
    return line if tokens is None else f"{line}, {tokens} tokens"


def video_line(video: tuple[Outline, int | None]) -> str:
    """What is said of a video: the frames that are shown of it, and its tokens."""
    outline, tokens = video
    frames, (width, height) = len(outline.times), outline.size
    line = (
        f"{frames} frames of {width} x {height} pixels, from {outline.times[0]:.1f} to {outline.times[-1]:.1f} seconds"
    )
    return line if tokens is None else f"{line}, {tokens} tokens"


def print_shown(shown: Shown, special: Sequence[str], console: Console) -> None:
    """Print a sample: its chat text with special tokens in inverse, its images' sizes, and what looks odd."""
    console.rule(escape(shown.sample.place))
    if shown.text is not None:
        text = escape(MARKS.sub(r"\1", shown.text))
        for token in special:
            text = text.replace(token, f"[reverse]{token}[/reverse]")
        console.print(text, soft_wrap=True)
        console.rule()
    else:
        console.print(shown.sample.problem, markup=False, soft_wrap=True)
    for number, image in enumerate(shown.images, 1):
        console.print(f"image {number}: {image_line(image)}", highlight=False)
    for number, video in enumerate(shown.videos, 1):
        console.print(f"video {number}: {video_line(video)}", highlight=False)
    for name, value in shown.facts:
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    for line in shown.odd:
        console.print(f"odd: {line}", markup=False, style="red", highlight=False, soft_wrap=True)


def write_page(shown: Sequence[Shown], title: str, special: Sequence[str], path: Path) -> None:
    """Write one page with the samples and their images, which needs nothing else."""

    def marked(text: str) -> Markup:
        text = escape_html(MARKS.sub(r"\1", text))
        for token in map(escape_html, special):
            text = text.replace(token, Markup("<mark>{}</mark>").format(token))
        return text

    template = Environment(autoescape=True).from_string(PAGE)
    path.write_text(template.render(samples=shown, title=title, marked=marked), encoding="utf-8")


def find_offenders(samples: Samples, preprocessor: Preprocessor | None, console: Console) -> list[Offender]:
    """All samples that can't be used: by their texts and headers, then by decoding each image of the others."""

    def progress(positions: Iterable[Offender | None]) -> Iterable[Offender | None]:
        return track(positions, "images", len(good), console=console)

    def sized(samples: list[Sample]) -> list[int | DataError]:
        return [0] * len(samples)  # without a model there are no lengths

    found = offenders_of(samples, preprocessor.lengths if preprocessor else sized)
    wrong = {offender.position for offender in found}
    good = [position for position in range(len(samples)) if position not in wrong]
    broken = broken_images(samples.at(good), progress)
    found += [offender._replace(position=good[offender.position]) for offender in broken]
    if not found:
        remember_decoded(fingerprint_of(sample.digest() for sample in samples))
    return sorted(found)


def print_offenders(samples: Samples, offenders: Sequence[Offender], console: Console) -> None:
    """Print the first of them as a table."""
    table = Table("row", "what is wrong", title=f"{samples.spec}: {len(offenders)} of {len(samples)} can't be used")
    for offender in offenders[:SHOWN]:
        table.add_row(str(samples.rows[offender.position]), escape(offender.message))
    if len(offenders) > SHOWN:
        table.add_row("…", f"and {len(offenders) - SHOWN} more")
    console.print(table)


def write_rows(samples: Samples, offenders: Sequence[Offender], path: Path) -> None:
    """Write the row numbers, each with what is wrong, as `data.skip` takes them; the file appears whole."""
    unfinished = path.with_name(f".{path.name}.partial")
    with open(unfinished, "w", encoding="utf-8") as file:
        for offender in offenders:
            file.write(f"{samples.rows[offender.position]}  # {' '.join(offender.message.split())}\n")
    os.replace(unfinished, path)


def self_scored(sample: Sample, config: Config) -> Score:
    """The score of a completion that gives the sample's own answer, in every form that a reward design reads."""
    completion = f"<think>\n</think>\\boxed{{{sample.answer}}}<answer>{sample.answer}</answer>"
    return score(completion, sample.answer, config.reward.unweighed())  # some scores take more than a text
