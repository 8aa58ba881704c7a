"""Gradients of small models, partitioned over the ranks that this is launched on, each with a batch of its own.

    partitioned.py FOLDER     FOLDER/KIND/model is a model, FOLDER/KIND/batches.pt a batch of each rank

Rank 0 writes FOLDER/KIND/gradients.pt: of the mean over the ranks of `loss`, which DeepSpeed makes.
"""

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from vogue import distributed
from vogue.config import load_config
from vogue.model.loading import load_model
from vogue.model.optimizer import start_deepspeed
from vogue.model.policy import Policy


def loss(logprob):
    return (torch.linspace(-1, 2, len(logprob)) * logprob).sum()


def gradients(folder, *overrides):
    """By the parameters' names, on every rank; only those that are trained."""
    config = load_config(None, [f"model.path={folder / 'model'}", "model.dtype=float32", *overrides])
    rank, _, device = distributed.start()
    policy = Policy(load_model(config, device), 1.0, attention=config.model.attention)
    assert all(parameter.numel() == 0 for parameter in policy.parameters()), "nothing is partitioned"
    engine = start_deepspeed(policy, config)
    engine.backward(loss(engine(torch.load(folder / "batches.pt", weights_only=False)[rank]).logprob))
    found = {name: safe_get_full_grad(parameter) for name, parameter in policy.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


if __name__ == "__main__":
    (root,) = [Path(text) for text in sys.argv[1:] if not text.startswith("--")]
    for kind in sorted(root.iterdir()):
        found = gradients(kind)
        if distributed.start()[0] == 0:
            torch.save(found, kind / "gradients.pt")
    distributed.leave(0)
