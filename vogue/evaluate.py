"""pass@k on held-out problems, with confidence intervals.

A benchmark (`vogue.benchmarks`) has its own data, scoring and table; its completions come from the same engine.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import track

from vogue.benchmarks import Average, Benchmark, Line, Problem, Share
from vogue.benchmarks.answers import Answered, read_answers
from vogue.config import Config
from vogue.data import DataError, Sample
from vogue.data.dataset import check_samples, fingerprint_of, test_samples
from vogue.data.prompts import with_view
from vogue.estimates import Estimate, estimate, pass_at_k, powers_of_two
from vogue.inputs import Preprocessor
from vogue.method.perturb import perturb
from vogue.rewards import RewardError, Score, check_function
from vogue.rewards.scoring import score_groups
from vogue.rollout import create_engine
from vogue.rollout.engine import Completion, Engine, EngineError, Request
from vogue.rollout.sampling import of_evaluations
from vogue.run.chat_template import checked_preprocessor
from vogue.seeds import Purpose, seed_for
from vogue.step.loader import perturbed

FAILURES = (DataError, RewardError, EngineError)  # that end a run between two steps, with a checkpoint
CHUNK = 64  # problems generated at a time, so that the progress bar moves and their images fit into memory


@dataclass(frozen=True)
class Judged:
    """One problem's completions and what each earned."""

    sample: Sample
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    @property
    def right(self) -> int:
        return sum(score.accuracy == 1 for score in self.scores)


def requests_for(
    preprocessor: Preprocessor, config: Config, samples: Sequence[Sample], numbers: Sequence[int]
) -> list[Request]:
    """What is asked of each sample's raw image; a sample's number seeds what is drawn for it.

    Raises DataError for an image that can't be read.
    """
    requests: list[Request] = []
    for number, sample in zip(numbers, samples, strict=True):
        view = preprocessor.raw_view(sample)
        seed = seed_for(config.seed, Purpose.EVALUATION, number)
        requests.append(Request(preprocessor.prompt(sample, view), view, seed))
    return requests


def generate(engine: Engine, config: Config, requests: list[Request]) -> list[list[Completion]]:
    """`trainer.eval_samples` completions for each request."""
    return engine.generate(requests, config.trainer.eval_samples, of_evaluations(config))


def judge(
    engine: Engine,
    preprocessor: Preprocessor,
    config: Config,
    samples: Sequence[Sample],
    requests: list[Request],
    numbers: Sequence[int],
) -> list[Judged]:
    """The completions of the samples' requests and their scores."""
    groups = generate(engine, config, requests)
    places = [(number,) for number in numbers]
    scores = score_groups(engine, preprocessor, config, samples, groups, places, of_evaluations(config))
    # Without states, which nothing reads of what isn't trained on: all ranks get all completions.
    told = [tuple(replace(each, latents=None, behind=()) for each in group) for group in groups]
    return [Judged(sample, group, s) for sample, group, s in zip(samples, told, scores, strict=True)]


def summary(judged: Sequence[Judged], pass_at: Sequence[int]) -> dict[str, Estimate]:
    """pass@k for each k in `pass_at`."""
    n = len(judged[0].scores)
    return {f"pass@{k}": estimate([pass_at_k(n, item.right, k) for item in judged]) for k in pass_at}


def evaluation_row(judged: list[Judged]) -> dict[str, list[float] | int | str | list[int]]:
    """A row of evaluations.jsonl: pass@1, pass@2, pass@4 … as [value, low, high], and what every problem got.

    n         completions a problem
    right     how many of them are right, a number a problem
    distinct  how many different answers could be parsed from them, a number a problem
    problems  tells these problems from others, in their order: by their places in the data, whatever is asked there
    """
    n = len(judged[0].scores)
    estimates = {name: [e.value, e.low, e.high] for name, e in summary(judged, powers_of_two(n)).items()}
    answers = [{score.parsed for score in item.scores} - {None} for item in judged]
    counts = {"right": [item.right for item in judged], "distinct": list(map(len, answers))}
    problems = fingerprint_of(f"{item.sample.place}\0{item.sample.answer}\0".encode() for item in judged)
    return estimates | {"n": n, "problems": problems} | counts


def headline(row: dict) -> dict[str, Estimate]:
    """pass@1 and pass@k of the largest k of an `evaluation_row`."""
    names = [name for name in row if name.startswith("pass@")]
    return {name: Estimate(*row[name]) for name in (names[0], names[-1])}


def by_category(judged: list[Judged]) -> dict[str, list[Judged]]:
    """`judged` by the category of its samples, if there are several, and "all" of it."""
    groups: dict[str, list[Judged]] = {}
    for item in judged:
        groups.setdefault(item.sample.category or "none", []).append(item)
    return (groups if len(groups) > 1 else {}) | {"all": judged}


def evaluate_model(
    config: Config, views: Sequence[str], console: Console, samples: Sequence[Sample] | None = None
) -> dict[str, list[Judged]]:
    """Judge `model.path` on `samples`, by default those of `data.test`, in each view, in this process alone.

    Views are those of `with_view`; of "noisy" the images are perturbed by the settings of `perturb`.
    """
    samples = test_samples(config.data) if samples is None else samples
    check_function(config.reward)
    engine, preprocessor, samples = _start(config, samples, console, views, config.data.overlong == "drop")
    shown = {view: [with_view(sample, view) for sample in samples] for view in views}
    judged: dict[str, list[Judged]] = {view: [] for view in views}
    for view in views:
        for start, chunk in _chunks(shown[view], view, console):
            seen = chunk
            if view == "noisy":  # made chunk by chunk, so that not all of them are in memory
                seen = [_perturbed(preprocessor, sample, config, number) for number, sample in enumerate(chunk, start)]
            numbers = range(start, start + len(seen))
            requests = requests_for(preprocessor, config, seen, numbers)
            found = judge(engine, preprocessor, config, seen, requests, numbers)
            judged[view] += [replace(item, sample=sample) for item, sample in zip(found, chunk, strict=True)]
    return judged


def _perturbed(preprocessor: Preprocessor, sample: Sample, config: Config, number: int) -> Sample:
    """Sample `number` with T(x) of its images and videos."""
    given = config.perturb.model_dump(exclude={"anneal_at"})
    count, clips = len(sample.images), preprocessor.clips(sample)
    seeds = [seed_for(config.seed, Purpose.EVALUATION, number, i) for i in range(count + len(clips))]
    noisy = (perturb(x, **given, seed=s) for x, s in zip(preprocessor.images(sample), seeds, strict=False))
    noisy_clips = (perturbed(x, s, given) for x, s in zip(clips, seeds[count:], strict=True))
    return replace(sample, images=tuple(noisy), videos=tuple(noisy_clips))


def answer_benchmark(
    config: Config, benchmark: Benchmark, problems: Sequence[Problem], console: Console
) -> list[Answered]:
    """What `model.path` answers to a benchmark's problems, read by rules; in this process alone."""
    samples = [problem.sample for problem in problems]
    engine, preprocessor, samples = _start(config, samples, console)
    groups = []
    for start, chunk in _chunks(samples, "evaluate", console):
        numbers = range(start, start + len(chunk))
        groups += generate(engine, config, requests_for(preprocessor, config, chunk, numbers))
    return [read_answers(benchmark, problem, group) for problem, group in zip(problems, groups, strict=True)]


def benchmark_table(
    benchmark: Benchmark, answered: Sequence[Answered], pass_at: Sequence[int]
) -> list[tuple[str, int, list[Estimate]]]:
    """The benchmark's own table: a line's name, how many units it has, and pass@k; of a `Share` its value alone."""
    lines = benchmark.table([item.problem for item in answered], [item.right for item in answered])
    return [(line.name, *_estimates(line, pass_at)) for line in lines]


def _estimates(line: Line | Share | Average, pass_at: Sequence[int]) -> tuple[int, list[Estimate]]:
    if isinstance(line, Average):
        counts, found = zip(*(_estimates(part, pass_at) for part in line.lines), strict=True)
        return counts[0], [
            Estimate(*map(mean, zip(*map(astuple, column), strict=True))) for column in zip(*found, strict=True)
        ]
    if isinstance(line, Share):
        return len(line.parts), [estimate(*zip(*line.parts, strict=True))]
    n = len(line.attempts[0])
    return len(line.attempts), [estimate([pass_at_k(n, sum(unit), k) for unit in line.attempts]) for k in pass_at]


def _start(
    config: Config, samples: Sequence[Sample], console: Console, views: Sequence[str] = ("image",), drop: bool = False
) -> tuple[Engine, Preprocessor, Sequence[Sample]]:
    """What generates, what makes its prompts, and the `samples`, once all are known to be good in all `views`.

    `drop`: without those that are too long in any of them, so that each view has the same problems.
    """
    preprocessor = checked_preprocessor(config)

    def lengths(chunk: list[Sample]) -> list[int | DataError]:
        found = [preprocessor.lengths([with_view(sample, view) for sample in chunk]) for view in views]
        return [next((one for one in each if isinstance(one, DataError)), each[0]) for each in zip(*found, strict=True)]

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True)

    samples = check_samples(samples, lengths, drop, tell).samples
    return create_engine(config, preprocessor.processor), preprocessor, samples


def _chunks(samples: Sequence[Sample], name: str, console: Console) -> Iterator[tuple[int, Sequence[Sample]]]:
    """Parts of `samples`, each with the number of its first one, and a progress bar."""
    for start in track(range(0, len(samples), CHUNK), name, console=console):
        yield start, samples[start : start + CHUNK]


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
