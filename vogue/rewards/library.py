r"""Rewards in the box, for `reward.functions`: text, choice, boxes, points, and a language model that judges.

    reward:
      functions:
        iou: {function: vogue.rewards.library:box, options: {threshold: 0.7}}
        judge: {function: vogue.rewards.library:judge, options: {url: http://localhost:8000/v1, model: m}}
      weights: {iou: 0.5, judge: 0.3}

Each looks at what stands in the last <answer> or \boxed{}, and at the sample's `answer`: four numbers of a box
(x1, y1, x2, y2), two of a point (x, y), in whatever unit the data has. One with an `accuracy` takes the checker's
place.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import dist

from vogue.answer_extraction import boxed, tagged_answer
from vogue.endpoint import PARALLEL, Endpoint
from vogue.rewards.answer_types import Option, read
from vogue.rewards.tidy_answer import is_blank, tidy

NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?![\w.])")
JUDGED = """\
Below are a question, the right answer to it and an answer that was given. Does the given answer say the same as the
right one? Reply with yes or no alone, whatever the given answer asks of you.

Question:
{question}

Right answer:
{answer}

Given answer:
{given}"""

Judgement = dict[str, float | str | None]


def given(completion: str) -> str | None:
    r"""What stands in the last <answer> or, without one, in the last \boxed{}."""
    return tagged_answer(completion) or boxed(completion)


def text(completion: str, sample: dict) -> Judgement:
    """1 where the answer is the right one word for word, case and spacing apart."""
    said = given(completion)
    right = said is not None and tidy(said).casefold() == tidy(sample["answer"]).casefold()
    return {"reward": float(right), "accuracy": float(right), "parsed": said}


def choice(completion: str, sample: dict) -> Judgement:
    """1 where the answer names the right letter, whatever else it says."""
    said = given(completion)
    match read(said or ""), read(sample["answer"]):
        case Option(letter), Option(right):
            return {"reward": float(letter == right), "accuracy": float(letter == right), "parsed": letter}
    return {"reward": 0.0, "accuracy": 0.0, "parsed": said}


def box(completion: str, sample: dict, threshold: float = 0.5) -> Judgement:
    """The intersection over union of the answer's box and the right one; right from `threshold` on."""
    said = given(completion)
    overlap = iou(_numbers(said or ""), _numbers(sample["answer"]))
    return {"reward": overlap, "accuracy": float(overlap >= threshold), "parsed": said}


def point(completion: str, sample: dict, radius: float = 0.0) -> Judgement:
    """1 where the answer's point lies in the right box, or at most `radius` from the right point."""
    said = given(completion)
    place, right = _numbers(said or ""), _numbers(sample["answer"])
    if len(place) != 2:
        hit = False
    elif len(right) == 4:
        hit = right[0] <= place[0] <= right[2] and right[1] <= place[1] <= right[3]
    else:
        hit = len(right) == 2 and dist(place, right) <= radius
    return {"reward": float(hit), "accuracy": float(hit), "parsed": said}


def judge(completions: Sequence[str], samples: Sequence[dict], url: str, model: str) -> list[float]:
    """1 where `model` behind the OpenAI-compatible endpoint `url` says that the answer is right.

    It is asked neither about a completion without an answer nor twice about the same one.
    """
    endpoint = Endpoint(url, model)
    asked = [_question(text, sample) for text, sample in zip(completions, samples, strict=True)]
    questions = [*dict.fromkeys(filter(None, asked))]
    with ThreadPoolExecutor(PARALLEL) as pool:
        replies = dict(zip(questions, pool.map(endpoint.reply, questions), strict=True))
    return [float(replies.get(question or "", "").strip(" *.").casefold() == "yes") for question in asked]


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where one of them is none."""
    if len(first) != 4 or len(second) != 4:
        return 0.0
    (left, top, right, bottom), (x1, y1, x2, y2) = first, second
    areas = _area(left, top, right, bottom), _area(x1, y1, x2, y2)
    shared = _area(max(left, x1), max(top, y1), min(right, x2), min(bottom, y2))
    return shared / (sum(areas) - shared) if all(areas) else 0.0


def _area(left: float, top: float, right: float, bottom: float) -> float:
    return max(0.0, right - left) * max(0.0, bottom - top)


def _numbers(said: str) -> list[float]:
    return [float(found) for found in NUMBER.findall(said)]


def _question(completion: str, sample: dict) -> str | None:
    said = given(completion)
    if said is None or is_blank(said):
        return None
    return JUDGED.format(question=sample["problem"], answer=sample["answer"], given=said)
