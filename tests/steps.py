"""What the tests of a trainer's step share: settings, groups with advantages, gradients, and an update's result."""

import copy
import ipaddress
from dataclasses import replace

import psutil
import torch

from vogue.method import branch
from vogue.metrics import Clock, Means
from vogue.step.groups import Group, generate, rows
from vogue.step.objective import Objective, objective
from vogue_kernels import GuidanceConfig

TWO_BY_TWO = ("rollout.prompts=2", "rollout.n=2")


def with_settings(trainer, config):
    """`trainer` under other settings, with the same weights; it must not be stepped."""
    other = copy.copy(trainer)
    other.config, other.loader = config, copy.copy(trainer.loader)
    other.loader.config = config
    other.guidance = GuidanceConfig(**config.guidance.model_dump(exclude={"sign_transition"}))
    return other


def group_of(item, completions, view="raw", **given):
    """A group of which all is kept, and paid where it is trained on the noisy view."""
    n = len(completions)
    known = {"sources": (view,) * n, "kept": (True,) * n, "paid": (view == "noisy",) * n}
    return Group(item=item, view=view, completions=completions, **(known | given))


def generated(trainer, items=None):
    """The step's groups of completions, not judged."""
    if items is None:
        items = trainer.loader.items(trainer.step)
    return generate(trainer.engine, trainer.config, items, trainer.step)


def rows_of(trainer, group):
    return rows({0: group}, trainer.config, trainer.step, trainer.shared_prefix)


def batches_of(trainer, groups):
    return trainer.micro_batches(dict(enumerate(groups)), groups[0], Means(), Clock())


def objective_of(trainer, batch, signals=None, first=True) -> Objective:
    """The batch's loss and metrics, by the policy's own signals where no others are given."""
    signals = signals or trainer.signals(batch, trainer.policy(batch))
    config = trainer.config
    sign = branch.bonus_sign(trainer.step, config.trainer.steps, config.guidance.sign_transition)
    terms = {"kl": config.kl, "perception": config.perception}
    return objective(batch, signals, config.loss, trainer.guidance, sign, first=first, **terms)


def both_groups(trainer, prompts):
    """Raw and noisy group of the first prompts, with advantages as if one completion of each was right."""
    items = [trainer.loader.item(trainer.loader.samples[i], 0, i, (False, True)) for i in range(prompts)]
    groups = generated(trainer, items)
    assert [group.view for group in groups] == ["raw", "noisy"] * prompts
    return [replace(group, advantages=(1.0 + i, -0.5 - i)) for i, group in enumerate(groups)]


def drawn(groups, draws):
    """Of both groups of every prompt, what draws (P, G) train on."""
    kept = [replace(g, kept=tuple((draws[g.item.number] == (g.view == "noisy")).tolist())) for g in groups]
    return [group for group in kept if any(group.kept)]


def loss_gradient(trainer, groups, normalise=True):
    """The gradient of an update's loss, flat, and the policy left as it was."""
    batches = batches_of(trainer, groups)
    loss = sum(objective_of(trainer, batch).loss for batch in batches)
    if normalise:
        loss = loss / sum(batch.weights.sum() for batch in batches)
    parameters = list(trainer.policy.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients)])


def noisy_batch(trainer):
    """The noisy group of one prompt, both completions trained on."""
    (batch,) = batches_of(trainer, drawn(both_groups(trainer, 1), torch.ones(1, 2, dtype=torch.bool)))
    return batch


def weights_after(trainer, groups):
    means = Means()
    trainer.update(groups, means, Clock())
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]), means


def listening():
    """The addresses at which this process listens."""
    found = psutil.Process().net_connections()
    return {ipaddress.ip_address(c.laddr.ip) for c in found if c.status == psutil.CONN_LISTEN}
