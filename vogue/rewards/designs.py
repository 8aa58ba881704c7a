r"""The reward designs: what a completion is asked for, and what it earns.

reward = sum of weight · score over the scores of `reward.design` (`reward.weights`, else `presets.DESIGNS` has them)

With `reward.wrong` = w the score s that judges the answer counts as w + (1 − w) s: 1 if right, w if wrong.

VOGUE (arXiv 2510.01444), `verifiable`, the default:  <think> … </think> … \boxed{answer}
    accuracy       1 for a right answer
    format         1 for the form above

The six of arXiv 2601.00215, with tags around everything:  … <think> … </think> … <answer> … </answer>
    answer         1 for a right answer; with partial credit (`continuous`); 1 for its mere presence (`no_accuracy`)
    another tag    tanh(distinct sentences) - tanh(repeated sentences);  0 where it is absent

Vision-SR1 (arXiv 2508.19652), `vision_sr1`:  <description> … </description> <think> … </think> … \boxed{answer}
    accuracy, format
    blind          1 if the policy, asked again with its description in the image's place, answers right

PeBR-R1 (arXiv 2509.13031), `pebr_perception` and `pebr_reasoning`, under headings: `vogue.rewards.pebr_r1`

Ours, since arXiv 2601.00215 doesn't state it or we couldn't find it: the tags' names; that an absent tag scores 0 and
that their order isn't checked; that the same tag twice counts as one with both contents, and the last answer is the
answer, inside its \boxed{} if it has one; that <visual> counts within <think> alone, whose sentences include it; what
a sentence is (`sentences`); that an answer that can't be read, or isn't of the form H:MM or a plain number, earns no
partial credit.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import tanh

from vogue.answer_extraction import boxed, tagged_answer
from vogue.config.presets import DESIGNS, HEADED, JUDGING
from vogue.config.sections import RewardConfig
from vogue.data import Sample
from vogue.rewards.answer_types import Number, Time, read
from vogue.rewards.correctness import verdicts
from vogue.rewards.format import boxed_demonstration, is_formatted
from vogue.rewards.function import Earned, RewardError, description_scorer, own_rewards
from vogue.rewards.pebr_r1 import (
    cosines,
    has_headings,
    headed_answer,
    headed_demonstration,
    keyword_score,
    keywords_of,
    length_score,
    share_of_enough,
)
from vogue.rewards.tidy_answer import is_blank

DEMONSTRATIONS = {  # of a state and an answer, cut before the answer: what a warm start can teach
    "verifiable": boxed_demonstration,
    "pebr_perception": headed_demonstration,
    "pebr_reasoning": headed_demonstration,
}
DEFAULT = RewardConfig()  # pyright: ignore[reportCallIssue]
TAGS = ("description", "think", "visual", "rethink")
MARKUP = re.compile(rf"</?(?:{'|'.join(TAGS)})>")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")


@dataclass(frozen=True)
class Score:
    r"""What a completion earned.

    reward      what it is trained on
    accuracy    1 for a right answer, whether the design rewards that or not; 0 otherwise
    format      1 where everything that the design asks for is there, rewarded or not; 0 otherwise
    parsed      the answer: the content of the last \boxed{} or <answer>; None without one
    components  the scores of the design's other components
    """

    reward: float
    accuracy: float
    format: float
    parsed: str | None
    components: dict[str, float] = field(default_factory=dict)


def score(completion: str, answer: str, settings: RewardConfig = DEFAULT, blind: str | None = None) -> Score:
    """The score of a completion by `settings.design`; for several completions, `score_batch` is faster.

    blind  what the policy answered from the completion's description without the image, where its weight isn't 0;
           None without a description

    Never raises for what a model wrote: what cannot be parsed is wrong. Raises ValueError for a design with a score
    that takes more than texts (`pebr_perception`): those are for `score_batch`.
    """
    return _scores([completion], [answer], settings, [blind], [{}])[0]


def score_batch(
    completions: Sequence[str],
    samples: Sequence[Sample],
    settings: RewardConfig = DEFAULT,
    blind: Sequence[str | None] | None = None,
    tokens: Sequence[int] | None = None,
) -> list[Score]:
    """The scores of completions, each for the sample at its position, with the functions of the user's own.

    tokens  of each completion, which a score of length reads

    Raises ValueError where the lengths differ and RewardError where such a function fails.
    """
    blind = [None] * len(completions) if blind is None else blind
    seen = perceived(completions, samples, settings, tokens)
    scores = _scores(completions, [sample.answer for sample in samples], settings, blind, seen)
    own = own_rewards(settings)
    if not own:
        return scores
    with ThreadPoolExecutor(len(own)) as pool:  # each waits for a process of its own
        found = pool.map(lambda function: function(completions, samples), own.values())
        earned = dict(zip(own, found, strict=True))
    weights = {"": 1.0} if settings.function else settings.weights
    rows = [dict(zip(earned, row, strict=True)) for row in zip(*earned.values(), strict=True)]
    return [_with_own(score, row, weights) for score, row in zip(scores, rows, strict=True)]


def perceived(
    completions: Sequence[str], samples: Sequence[Sample], settings: RewardConfig, tokens: Sequence[int] | None
) -> list[dict[str, float]]:
    """What of each completion's scores reads its sample, or its tokens, as far as it is weighed; {} in most designs."""
    weights, found = settings.weights, [{} for _ in completions]
    if settings.design != "pebr_perception":
        return found
    if weights.get("similarity"):
        for scores, cosine in zip(found, cosines(description_scorer(settings), completions, samples), strict=True):
            scores["similarity"] = share_of_enough(cosine, settings.similar_enough)
    if weights.get("keywords"):
        for scores, completion, sample in zip(found, completions, samples, strict=True):
            scores["keywords"] = keyword_score(completion, keywords_of(sample))
    if weights.get("length") and tokens is not None:
        for scores, count in zip(found, tokens, strict=True):
            scores["length"] = length_score(count, settings.expected_length)
    return found


def _with_own(score: Score, earned: dict[str, Earned], weights: dict[str, float]) -> Score:
    """A design's score with what functions of the user's own add to it, and with their accuracy where one judges.

    A component has the function's name, or name/component; without a name there is only the latter.

    Raises RewardError where two functions judge.
    """
    judging = [name for name, one in earned.items() if one.judged]
    if len(judging) > 1:
        raise RewardError(f"reward.functions: both {judging[0]} and {judging[1]} give accuracy or parsed; one may")
    judged = earned[judging[0]].judged if judging else {}
    components = dict(score.components)
    for name, one in earned.items():
        components |= {name: one.reward} if name else {}
        components |= {f"{name}/{part}".lstrip("/"): value for part, value in one.components.items()}
    reward = score.reward + sum(weights[name] * one.reward for name, one in earned.items())
    return replace(score, reward=reward, components=components, **judged)


def _scores(
    completions: Sequence[str],
    answers: Sequence[str],
    settings: RewardConfig,
    blind: Sequence[str | None],
    seen: Sequence[Mapping[str, float]],
) -> list[Score]:
    """The scores of completions by their design; all their answers are checked together."""
    parsed = [find_answer(completion, settings.design) for completion in completions]
    again = [boxed(text or "") for text in blind] if settings.weights.get("blind") else []
    found = verdicts([*_pairs(parsed, answers), *_pairs(again, answers if again else [])])
    right = [verdict.right for verdict in found]
    again = right[len(parsed) :] or [None] * len(parsed)
    rows = zip(completions, answers, parsed, right[: len(parsed)], again, seen, strict=True)
    return [_score(*row, settings) for row in rows]  # pyright: ignore[reportCallIssue]


def _pairs(parsed: Sequence[str | None], answers: Sequence[str]) -> list[tuple[str, str]]:
    return [(given or "", answer) for given, answer in zip(parsed, answers, strict=True)]


def _score(
    completion: str,
    answer: str,
    parsed: str | None,
    right: bool,
    again: bool | None,
    seen: Mapping[str, float],
    settings: RewardConfig,
) -> Score:
    """The score of a completion whose answer `parsed` is `right`, as is, or isn't, the one given without the image.

    seen  the scores that were made of more than texts
    """
    asked, accuracy = DESIGNS[settings.design], float(right)
    components = {tag: sentence_score(content(completion, tag) or "") for tag in TAGS if tag in asked}
    if settings.design == "continuous":
        components["answer"] = accuracy or partial_credit(parsed or "", answer)
    elif settings.design == "no_accuracy":
        components["answer"] = float(not is_blank(parsed or ""))
    elif "answer" in asked:
        components["answer"] = accuracy
    if again is not None:
        components["blind"] = float(again)
    components |= seen
    scores = {"accuracy": accuracy, "format": float(has_format(completion, settings.design))} | components
    worth = scores
    if judging := JUDGING.get(settings.design):
        worth = scores | {judging: settings.wrong + (1 - settings.wrong) * scores[judging]}
    if missing := [name for name, weight in settings.weights.items() if weight and name in asked and name not in worth]:
        raise ValueError(
            f"reward.design={settings.design}: the scores {', '.join(missing)} take the completion's sample and tokens"
        )
    reward = sum(weight * worth[name] for name, weight in settings.weights.items() if weight and name in asked)
    return Score(reward, accuracy, scores["format"], parsed, components)


def check_function(settings: RewardConfig) -> None:
    """Import the functions of `settings`; raises RewardError where that fails, before anything is trained."""
    own_rewards(settings)
    if settings.scorer and settings.design == "pebr_perception" and settings.weights.get("similarity"):
        description_scorer(settings)


def find_answer(completion: str, design: str) -> str | None:
    r"""What a completion answers where its design asks for it: in \boxed{}, in <answer> or behind its heading.

    None without that; a heading that is missing makes all of it the answer.
    """
    if design in HEADED:
        return headed_answer(completion)
    return tagged_answer(completion) if "answer" in DESIGNS[design] else boxed(completion)


def content(completion: str, tag: str) -> str | None:
    """The text between <tag> and </tag>; of several pairs a line each; None without one."""
    text = content(completion, "think") or "" if tag == "visual" else completion
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return "\n".join(found) if found else None


def has_format(completion: str, design: str) -> bool:
    """Whether a completion has all that the design asks for; VOGUE and Vision-SR1 ask for it in an order."""
    asked = DESIGNS[design]
    if design in HEADED:
        return has_headings(completion)
    if "answer" in asked:
        found = all(content(completion, tag) is not None for tag in asked)
        return found and not is_blank(tagged_answer(completion) or "")
    if "blind" not in asked:
        return is_formatted(completion)
    _, _, rest = completion.partition("</description>")
    return (
        completion.lstrip().startswith("<description>")
        and completion.count("<description>") == completion.count("</description>") == 1
        and is_formatted(rest)
    )


def sentence_score(text: str) -> float:
    """tanh(number of distinct sentences) - tanh(number of sentences that were there before)."""
    found = sentences(text)
    distinct = len(set(found))
    return tanh(distinct) - tanh(len(found) - distinct)


def sentences(text: str) -> list[str]:
    """Cut a text into sentences: at full stops, question and exclamation marks before a space, line breaks and tags.

    Spacing and case make no other sentence; what has no letter and no digit is none.
    """
    parts = SENTENCE_END.split(MARKUP.sub("\n", text))
    return [" ".join(part.split()).casefold() for part in parts if re.search(r"\w", part)]


def partial_credit(parsed: str, answer: str) -> float:
    """What a wrong answer earns for being near the right one; 0 where the right one is neither a time nor a number.

    time of day H:MM, with H 1..12:  mean of  1 - h/5 (0 if h > 2)  and  1 - m/20 (0 if m > 10)
    number:                          1 / (1 + d)  (0 if d > 5)

    h and m are the distances of the hours on a circle of 12 and of the minutes on one of 60, d is that of the numbers.
    """
    match read(parsed), read(answer):
        case Time(hour, minute), Time(right_hour, right_minute) if {hour, right_hour} <= set(range(1, 13)):
            h, m = _around(hour - right_hour, 12), _around(minute - right_minute, 60)
            return ((1 - h / 5 if h <= 2 else 0) + (1 - m / 20 if m <= 10 else 0)) / 2
        case Number(value, unit=None), Number(expected, unit=None):
            d = abs(value - expected)
            return float(1 / (1 + d)) if d <= 5 else 0.0
    return 0.0


def _around(difference: int, circle: int) -> int:
    """The distance on a circle: the shorter way round."""
    return min(difference % circle, -difference % circle)
