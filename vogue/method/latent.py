"""Latent Visual Reasoning (arXiv 2509.24251): for some steps the model reads its own states in place of words.

    x_{t+1} = h_t                            the next input, h_t the last hidden state, after the final norm
    L = NTP + 0.1 mean_t ||h_t - v_t||^2     the warm start, v_t the vision tokens that the states are to show

Both are of the paper's equations: its code takes the mean over the D dimensions too, a D-th of that.
"""

import torch
from torch import Tensor

START, END = "<|lvr_start|>", "<|lvr_end|>"  # after the first one states are read; the second one is said behind them
LOSS_WEIGHT = 0.001  # about the authors' code, 0.1 over the dimensions; the paper's 0.1 drowns the words


def latent_loss(states: Tensor, features: Tensor) -> Tensor:
    """The mean over T states (T, D) of their squared distances from the vision tokens `features` (T, D): ()."""
    return (states - features).square().sum(dim=-1).mean()


def read_state(hidden: Tensor, kind: str, noise: Tensor) -> Tensor:
    """What is read in the place of R states (R, D): themselves, `noise` (R, D) of each one's length, or zeros.

    kind  "hidden", "noise" or "zero"
    """
    if kind == "hidden":
        return hidden
    if kind == "zero":
        return torch.zeros_like(hidden)
    wide = noise.float()
    return (wide * (hidden.float().norm(dim=-1, keepdim=True) / wide.norm(dim=-1, keepdim=True))).to(hidden.dtype)
