"""What the tests of a trainer's step share: settings, groups with advantages, gradients, and an update's result."""

import copy
from dataclasses import replace

import torch

from vogue.metrics import Clock, Sums
from vogue_kernels import GuidanceConfig

TWO_BY_TWO = ("rollout.prompts=2", "rollout.n=2")


def with_settings(trainer, config):
    """`trainer` under other settings, with the same weights; it must not be stepped."""
    other = copy.copy(trainer)
    other.config = config
    other.guidance = GuidanceConfig(**config.guidance.model_dump(exclude={"sign_transition"}))
    return other


def both_groups(trainer, prompts):
    """Raw and noisy group of the first prompts, with advantages as if one completion of each was right."""
    items = [trainer.item(trainer.samples[i], 0, i, (False, True)) for i in range(prompts)]
    groups = trainer.generate(items)
    assert [group.noisy for group in groups] == [False, True] * prompts
    return [replace(group, advantages=(1.0 + i, -0.5 - i)) for i, group in enumerate(groups)]


def drawn(groups, draws):
    """Of both groups of every prompt, what draws (P, G) train on."""
    kept = [replace(g, kept=tuple((draws[g.item.number] == g.noisy).tolist())) for g in groups]
    return [group for group in kept if any(group.kept)]


def loss_gradient(trainer, groups, normalise=True):
    """The gradient of an update's loss, flat, and the policy left as it was."""
    batches = trainer.batches(groups)
    found = [trainer.signals(batch, trainer.policy(batch)) for batch in batches]
    loss = sum(trainer.loss(batch, signals, Sums(), first=True) for batch, signals in zip(batches, found, strict=True))
    if normalise:
        loss = loss / sum(batch.weights.sum() for batch in batches)
    parameters = list(trainer.policy.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients)])


def noisy_batch(trainer):
    """The noisy group of one prompt, both completions trained on."""
    (batch,) = trainer.batches(drawn(both_groups(trainer, 1), torch.ones(1, 2, dtype=torch.bool)))
    return batch


def weights_after(trainer, groups):
    sums = Sums()
    trainer.update(groups, sums, Clock())
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]), sums
