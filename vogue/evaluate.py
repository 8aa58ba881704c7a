"""pass@k on held-out problems, with confidence intervals.

    pass@k = mean over problems of 1 - C(n - c, k) / C(n, k)      n samples, c of them right (arXiv 2107.03374)

The estimator is unbiased for every k <= n. The interval resamples *problems*, since samples of one problem are not
independent.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig

from vogue.config import Config
from vogue.data import Sample, load_samples
from vogue.data.prompts import system_prompt, with_view
from vogue.inputs import Preprocessor, load_processor
from vogue.rewards import Score, check_function
from vogue.rewards.groups import score_groups
from vogue.rollout import Completion, Engine, Request, create_engine
from vogue.seeds import Purpose, seed_for

RESAMPLES = 2000
CHUNK = 64  # problems generated at a time, so that the progress bar moves


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Judged:
    """One problem's completions and what each earned."""

    sample: Sample
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    @property
    def right(self) -> int:
        return sum(score.accuracy == 1 for score in self.scores)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, drawn without putting back, hold one of the `right` ones."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return 1 - comb(n - right, k) / comb(n, k)


def estimate(values: list[float]) -> Estimate:
    """Mean and 95% percentile-bootstrap interval over problems."""
    array = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def judge(
    engine: Engine, preprocessor: Preprocessor, config: Config, samples: list[Sample], n: int, first: int = 0
) -> list[Judged]:
    """Generate `n` completions for each sample's raw image and score them; `first` numbers the first sample."""
    requests = []
    for number, sample in enumerate(samples, first):
        view = preprocessor.view(sample.load_images())
        seed = seed_for(config.seed, Purpose.EVALUATION, number)
        requests.append(Request(preprocessor.prompt(sample, view), view.images, seed))
    groups = engine.generate(requests, n, config.rollout.max_tokens, config.rollout.temperature)
    places = [(number,) for number in range(first, first + len(samples))]
    scores = score_groups(engine, preprocessor, config, samples, groups, places)
    return [Judged(sample, tuple(group), s) for sample, group, s in zip(samples, groups, scores, strict=True)]


def summary(judged: list[Judged], pass_at: Sequence[int] = ()) -> dict[str, Estimate]:
    """pass@1, pass@2, pass@4 … of every power of two that there are samples for, and of each k in `pass_at`."""
    n = len(judged[0].scores)
    ks = sorted({2**power for power in range(n.bit_length())} | set(pass_at))
    return {f"pass@{k}": estimate([pass_at_k(n, item.right, k) for item in judged]) for k in ks}


def record(judged: list[Judged], pass_at: Sequence[int] = ()) -> dict[str, list[float] | int | list[int]]:
    """A row of evaluations.jsonl: `summary` as [value, low, high], and what every problem got.

    n         completions a problem
    right     how many of them are right, a number a problem
    distinct  how many different answers could be parsed from them, a number a problem
    """
    estimates = {name: [e.value, e.low, e.high] for name, e in summary(judged, pass_at).items()}
    answers = [{score.parsed for score in item.scores} - {None} for item in judged]
    counts = {"right": [item.right for item in judged], "distinct": list(map(len, answers))}
    return estimates | {"n": len(judged[0].scores)} | counts


def headline(row: dict) -> dict[str, Estimate]:
    """pass@1 and pass@k of the largest k of a `record`."""
    names = [name for name in row if name.startswith("pass@")]
    return {name: Estimate(*row[name]) for name in (names[0], names[-1])}


def by_category(judged: list[Judged]) -> dict[str, list[Judged]]:
    """`judged` by the category of its samples, if there are several, and "all" of it."""
    groups: dict[str, list[Judged]] = {}
    for item in judged:
        groups.setdefault(item.sample.category or "none", []).append(item)
    return (groups if len(groups) > 1 else {}) | {"all": judged}


def evaluate_model(config: Config, n: int, views: Sequence[str], console: Console) -> dict[str, list[Judged]]:
    """Judge `model.path` on `data.test` in each view with `n` completions a problem, in this process alone."""
    samples = load_samples(config.data.test, config.data.test_limit)
    shown = {view: [with_view(sample, view) for sample in samples] for view in views}
    processor = load_processor(config.model.path)
    preprocessor = Preprocessor(processor, system_prompt(config), config.data.max_prompt_tokens)
    for viewed in shown.values():
        preprocessor.check(viewed)
    check_function(config.reward)
    tied = AutoConfig.from_pretrained(config.model.path).tie_word_embeddings
    engine = create_engine(config, processor, tied)
    starts = range(0, len(samples), CHUNK)
    judged: dict[str, list[Judged]] = {view: [] for view in views}
    for view, start in track([*product(views, starts)], "evaluate", console=console):
        judged[view] += judge(engine, preprocessor, config, shown[view][start : start + CHUNK], n, first=start)
    return judged


def write_judged(judged: dict[str, list[Judged]], path: Path) -> None:
    """One JSON object a completion, view by view."""
    with open(path, "w") as file:
        for view, items in judged.items():
            for number, item in enumerate(items):
                sample = item.sample
                row = {"view": view, "category": sample.category, "problem": number}
                row |= {"question": sample.problem, "answer": sample.answer}
                for completion, score in zip(item.completions, item.scores, strict=True):
                    earned = {"parsed": score.parsed, "reward": score.reward, "accuracy": score.accuracy}
                    file.write(json.dumps(row | {"completion": completion.text} | earned) + "\n")
