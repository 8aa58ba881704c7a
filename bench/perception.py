"""What a step along PAPO's term alone does to the divergence that the term is to raise, whichever way it is written.

    python bench/perception.py examples/digits/vogue.yaml method=papo model.path=MODEL data.train=DATA --prompts 32

The model answers problems, and its gradient of the mean KL between what it says with the image x and with the masked
one T(x) is computed: of KL(x‖T(x)), which PAPO names, of KL(T(x)‖x), and by k3 of the sampled token (`low_var_kl`), as
its code has it; through what is said with x alone, or through both. Then the weights move along it, by a share of their
own norm, and both KLs and the entropy are measured on the same completions.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vogue.config import load_config
from vogue.data.dataset import check_samples, training_samples
from vogue.inputs import Preprocessor
from vogue.method.kl import Reference, divergence
from vogue.method.uncertainty import OtherBranch, TokenStats
from vogue.metrics import Clock, Means
from vogue.model.packing import Batch
from vogue.step.groups import generate
from vogue.trainer import Trainer

STEPS = (1e-4, 1e-3)  # of the weights' norm


class Measured(NamedTuple):
    """Means over tokens with an image, in nats."""

    forward: float  # KL(x‖T(x))
    reverse: float  # KL(T(x)‖x)
    entropy: float  # with x


def estimate(stats: TokenStats, other: OtherBranch) -> Tensor:
    """k3 of the sampled token, as PAPO's code has it: without a gradient through T(x)."""
    own = stats.logprob[: len(other.logprob)]
    reference = Reference(other.logprob.detach(), other.kl_own_other)
    return divergence(own, own.detach(), reference, "low_var_kl")


TERMS: dict[str, Callable[[TokenStats, OtherBranch], Tensor]] = {
    "KL(x‖T(x))": lambda stats, other: other.kl_own_other,
    "KL(T(x)‖x)": lambda stats, other: other.kl_other_own,
    "k3 of the sampled token": estimate,
}


def batches_of(trainer: Trainer) -> list[Batch]:
    """The completions of the first step's prompts, read on both views."""
    config = trainer.config
    groups = generate(trainer.engine, config, trainer.loader.items(0), 0)
    groups = [replace(group, advantages=(1.0,) * config.rollout.n) for group in groups]
    return trainer.micro_batches(dict(enumerate(groups)), groups[0], Means(), Clock())


def measured(trainer: Trainer, batches: list[Batch]) -> Measured:
    sums, count = torch.zeros(3), 0
    with torch.no_grad():
        for batch in batches:
            stats = trainer.policy(batch)
            other = cast(OtherBranch, stats.other)
            m = len(other.logprob)
            sums += torch.stack([other.kl_own_other.sum(), other.kl_other_own.sum(), stats.entropy[:m].sum()])
            count += m
    return Measured(*(sums / count).tolist())


def gradient(trainer: Trainer, batches: list[Batch], term: Callable[[TokenStats, OtherBranch], Tensor]) -> list[Tensor]:
    """Of the term's sum over all tokens, by the policy's parameters; of norm 1."""
    parameters = list(trainer.policy.parameters())
    for parameter in parameters:
        parameter.grad = None
    for batch in batches:
        stats = trainer.policy(batch)
        term(stats, cast(OtherBranch, stats.other)).sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    norm = torch.stack([g.norm() for g in found]).norm()
    return [g / norm for g in found]


def moved(trainer: Trainer, batches: list[Batch], direction: list[Tensor], share: float) -> Measured:
    """What is measured a step along the direction away, by this share of the weights' norm; they are put back."""
    parameters = list(trainer.policy.parameters())
    before = [p.detach().clone() for p in parameters]
    size = share * float(torch.stack([p.norm() for p in before]).norm())
    with torch.no_grad():
        for parameter, along in zip(parameters, direction, strict=True):
            parameter += size * along
        found = measured(trainer, batches)
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=int, default=32, help="problems, each answered rollout.n times")
    arguments = parser.parse_intermixed_args()
    table = Table("term", "gradient through", "step", "KL(x‖T(x))", "KL(T(x)‖x)", "entropy")
    for through in ("clean", "both"):
        fixed = [f"perception.gradient={through}", f"rollout.prompts={arguments.prompts}", "kl.coef=0"]
        config = load_config(arguments.settings, [*arguments.overrides, *fixed])
        preprocessor = Preprocessor.of(config)
        data = check_samples(training_samples(config.data), preprocessor.lengths)
        trainer = Trainer(config, data, preprocessor, resume=None)
        batches = batches_of(trainer)
        if through == "clean":
            table.add_row("", "", "none", *(f"{value:.4f}" for value in measured(trainer, batches)))
        for name, term in TERMS.items():
            if through == "both" and term is estimate:
                continue  # its code has no gradient there
            direction = gradient(trainer, batches, term)
            for share in STEPS:
                values = (f"{value:.4f}" for value in moved(trainer, batches, direction, share))
                table.add_row(name, {"clean": "x", "both": "x and T(x)"}[through], f"{share:g}", *values)
    Console().print(table)


if __name__ == "__main__":
    main()
