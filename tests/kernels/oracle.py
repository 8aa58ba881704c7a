"""Naive versions of the operators, with the whole (N, V) tensor, straight from the definitions.

In float64 they are the truth; in a model's own dtype they are what most trainers do (the matrix product in that dtype,
the softmax in float32), the yardstick for the operators' error.
"""

import torch

from vogue_kernels import IGNORE, BranchStats, LogprobStats


def log_softmax(hidden, weight, bias, temperature):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, dim=-1)


def linear_logprob(hidden, weight, targets, bias=None, temperature=1.0):
    logp = log_softmax(hidden, weight, bias, temperature)
    return LogprobStats(*_skip(targets, _pick(logp, targets), _entropy(logp)))


def linear_branch_stats(hidden_p, hidden_q, weight, targets, bias=None, temperature=1.0):
    logp = log_softmax(hidden_p, weight, bias, temperature)
    logq = log_softmax(hidden_q, weight, bias, temperature)
    forward, reverse = (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)
    results = (_pick(logp, targets), _pick(logq, targets), _entropy(logp), _entropy(logq), forward, reverse)
    return BranchStats(*_skip(targets, *results, (forward + reverse) / 2))


def divergence_terms(hidden_p, hidden_q, weight, bias, temperature):
    """Σ p |log p − log q| in float64, (N,): the size of what cancels in KL(p‖q)."""
    raw, noisy, weight = hidden_p.double(), hidden_q.double(), weight.double()
    bias = None if bias is None else bias.double()
    logp, logq = log_softmax(raw, weight, bias, temperature), log_softmax(noisy, weight, bias, temperature)
    return (logp.exp() * (logp - logq).abs()).sum(-1)


def _entropy(logp):
    return -(logp.exp() * logp).sum(-1)


def _pick(logp, targets):
    return logp.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)


def _skip(targets, *results):
    return (torch.where(targets == IGNORE, 0.0, result) for result in results)
