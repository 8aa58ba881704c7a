"""Which tokens depend on the image, by the exact KL and by its estimate from the sampled token, and which print it.

    python bench/dependence.py examples/digits/vogue.yaml method=vppo model.path=MODEL data.train=DATA --prompts 64

The model answers problems, and every completion is read on the image x and on T(x), `perturb`'s view: S = KL(x‖T(x)) of
each token, over the whole vocabulary and as VPPO's code estimates it (k3, never below 0). Printed: both KLs, how alike
the two S order a completion's tokens (Spearman's rank correlation, the mean over completions), which of the S chosen
share they both choose, and how many of the tokens that print what the image shows are among them, or among as many as
there are. Those are the ones that first name a digit, on the digits task, and all between <think> and </think> where a
warm start on `state` has taught the model to write it there.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, pstdev

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from vogue.config import load_config
from vogue.data.dataset import check_samples, training_samples
from vogue.data.digits import QUESTIONS
from vogue.inputs import Preprocessor
from vogue.method.credit import kept_tokens
from vogue.metrics import Clock, Means
from vogue.run.completion_records import pieces
from vogue.step.groups import generate
from vogue.step.objective import dependence
from vogue.trainer import Trainer

DIGITS = re.compile(r"<think>(\d) and (\d)")
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
KINDS = ("print the image", "other digits", "all others")


@dataclass(frozen=True)
class Completion:
    """A completion of T tokens; S in nats, by the whole vocabulary and by the sampled token."""

    texts: Sequence[str]
    exact: Tensor  # (T,)
    estimate: Tensor  # (T,)
    reverse: Tensor  # (T,) KL(T(x)‖x)
    printing: Tensor  # (T,) bool: it prints what the image shows

    def kinds(self) -> Iterator[tuple[int, str]]:
        """Each token's number, and which of KINDS it is."""
        for i, text in enumerate(self.texts):
            yield i, KINDS[0] if self.printing[i] else KINDS[1] if text.strip().isdigit() else KINDS[2]


def printing(texts: Sequence[str], category: str) -> Tensor:
    """Which of a completion's tokens (T,) bool print what the image shows."""
    found = (DIGITS if category in QUESTIONS else THOUGHT).search("".join(texts))
    spans = [found.span(i) for i in range(1, found.re.groups + 1)] if found else []
    marked, start = torch.zeros(len(texts), dtype=torch.bool), 0
    for i, text in enumerate(texts):
        end = start + len(text)
        marked[i] = bool(text.strip()) and any(start < high and low < end for low, high in spans)
        start = end
    return marked


def read(settings: str, overrides: list[str], prompts: int) -> list[Completion]:
    """Completions of the first so many samples' problems by the model, with S of their tokens."""
    fixed = [f"rollout.prompts={prompts}", "rollout.rounds=1", "trainer.measure_every=1", "credit.estimator=exact"]
    config = load_config(settings, [*overrides, *fixed])
    preprocessor = Preprocessor.of(config)
    data = check_samples(training_samples(config.data), preprocessor.lengths)
    trainer = Trainer(config, data, preprocessor, resume=None)
    groups = generate(trainer.engine, config, trainer.loader.items(0), 0)
    n, completions = config.rollout.n, []
    groups = [replace(group, advantages=(1.0,) * n, scores=(), paid=(False,) * n) for group in groups]
    tokenizer = trainer.processor.tokenizer
    for batch in trainer.micro_batches(dict(enumerate(groups)), groups[0], Means(), Clock()):
        with torch.no_grad():
            stats = trainer.policy(batch)
        exact, estimate = (dependence(batch, stats, name) for name in ("exact", "k3"))
        for here, place, one in zip(batch.slices, batch.places, batch.completions, strict=True):
            if place is None or stats.other is None:
                continue
            texts = pieces(one.token_ids, tokenizer)
            told = printing(texts, groups[place.group].item.prompt.sample.category)
            completions.append(Completion(texts, exact[here], estimate[here], stats.other.kl_other_own[here], told))
    return completions


def summary(completions: Sequence[Completion], share: float) -> dict[str, float]:
    """Means over completions; shares are 0 to 1, divergences nats a token."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in completions:
        found["tokens"].append(len(one.exact))
        found["KL(x‖T(x))"].append(float(one.exact.mean()))
        found["KL(T(x)‖x)"].append(float(one.reverse.mean()))
        found["k3"].append(float(one.estimate.mean()))
        if one.exact.unique().numel() > 1 < one.estimate.unique().numel():  # else it is undefined
            correlation = spearmanr(one.exact, one.estimate).statistic
            found["rank correlation, exact and k3"].append(float(correlation))
        chosen, estimated = kept_tokens(one.exact, share), kept_tokens(one.estimate, share)
        found["chosen by both"].append(float((chosen & estimated).sum() / chosen.sum()))
        if not one.printing.any():
            continue
        for name, mask in (("exact", chosen), ("k3", estimated)):
            hits = float((mask & one.printing).sum())
            found[f"precision, {name}"].append(hits / float(mask.sum()))
            found[f"recall, {name}"].append(hits / float(one.printing.sum()))
        count = int(one.printing.sum())
        found["best precision there is"].append(min(int(chosen.sum()), count) / float(chosen.sum()))
        for name, known in (("exact", one.exact), ("k3", one.estimate)):  # of as many tokens as print the image
            first = torch.sort(known, descending=True, stable=True).indices[:count]
            found[f"precision among as many, {name}"].append(float(one.printing[first].float().mean()))
    return {name: mean(values) for name, values in found.items()}


def by_kind(completions: Sequence[Completion], share: float) -> list[tuple[str, int, float, float, float, int, int]]:
    """Of each kind of token: how many, mean S, k3's mean and std, and how many the exact S, or k3's, chooses alone."""
    exact, estimate = defaultdict(list), defaultdict(list)
    alone = {kind: [0, 0] for kind in KINDS}
    for one in completions:
        chosen, estimated = kept_tokens(one.exact, share), kept_tokens(one.estimate, share)
        for i, kind in one.kinds():
            exact[kind].append(float(one.exact[i]))
            estimate[kind].append(float(one.estimate[i]))
            alone[kind][0] += bool(chosen[i] and not estimated[i])
            alone[kind][1] += bool(estimated[i] and not chosen[i])
    return [
        (kind, len(exact[kind]), mean(exact[kind]), mean(estimate[kind]), pstdev(estimate[kind]), *alone[kind])
        for kind in KINDS
        if exact[kind]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=int, default=64, help="problems, each answered rollout.n times")
    parser.add_argument("--share", type=float, default=0.4, help="of a completion's tokens that S chooses")
    arguments = parser.parse_intermixed_args()
    completions, console = read(str(arguments.settings), arguments.overrides, arguments.prompts), Console()
    table = Table(f"{len(completions)} completions", "mean")
    for name, value in summary(completions, arguments.share).items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    table = Table("tokens", "how many", "S, nats", "k3: mean", "std", "exact alone chooses", "k3 alone")
    for kind, count, exact, estimate, deviation, *alone in by_kind(completions, arguments.share):
        table.add_row(kind, str(count), f"{exact:.4g}", f"{estimate:.4g}", f"{deviation:.3g}", *map(str, alone))
    console.print(table)


if __name__ == "__main__":
    main()
