"""Naive versions of the operators, with the whole (N, V) tensor, straight from the definitions.

In float64 they are the truth; in a model's own dtype they are what most trainers do (the matrix product in that dtype,
the softmax in float32), the yardstick for the operators' error.
"""

import torch

from vogue_kernels import IGNORE, BranchStats, LogprobStats


def logits(hidden, weight, bias, temperature, softcap=None):
    products = torch.nn.functional.linear(hidden, weight, bias)
    products = products if products.dtype == torch.float64 else products.float()
    return (products if softcap is None else softcap * torch.tanh(products / softcap)) / temperature


def linear_logprob(hidden, weight, targets, bias=None, temperature=1.0, softcap=None):
    a = logits(hidden, weight, bias, temperature, softcap)
    logp = torch.log_softmax(a, dim=-1)
    return LogprobStats(*_skip(targets, _pick(logp, targets), _entropy(logp), a.logsumexp(-1), _top(logp)))


def linear_branch_stats(
    hidden_p, hidden_q, weight, targets, bias=None, temperature=1.0, softcap=None, weight_q=None, bias_q=None
):
    a, b = both_logits(hidden_p, hidden_q, weight, bias, temperature, softcap, weight_q, bias_q)
    logp, logq = torch.log_softmax(a, dim=-1), torch.log_softmax(b, dim=-1)
    forward, reverse = (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)
    results = (_pick(logp, targets), _pick(logq, targets), _entropy(logp), _entropy(logq), forward, reverse)
    others = (a.logsumexp(-1), b.logsumexp(-1), _top(logp), _top(logq))
    return BranchStats(*_skip(targets, *results, (forward + reverse) / 2, *others))


def both_logits(hidden_p, hidden_q, weight, bias, temperature, softcap=None, weight_q=None, bias_q=None):
    head_q = (weight, bias) if weight_q is None else (weight_q, bias_q)
    return logits(hidden_p, weight, bias, temperature, softcap), logits(hidden_q, *head_q, temperature, softcap)


def divergence_terms(hidden_p, hidden_q, weight, bias, temperature, softcap=None, weight_q=None, bias_q=None):
    """Σ p |log p − log q| in float64, (N,): the size of what cancels in KL(p‖q)."""
    hidden_p, hidden_q, weight, bias, weight_q, bias_q = (
        None if x is None else x.double() for x in (hidden_p, hidden_q, weight, bias, weight_q, bias_q)
    )
    both = both_logits(hidden_p, hidden_q, weight, bias, temperature, softcap, weight_q, bias_q)
    logp, logq = (x.log_softmax(-1) for x in both)
    return (logp.exp() * (logp - logq).abs()).sum(-1)


def _entropy(logp):
    return -(logp.exp() * logp).sum(-1)


def _top(logp):
    return logp.amax(-1).detach()


def _pick(logp, targets):
    return logp.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)


def _skip(targets, *results):
    return (torch.where(targets == IGNORE, 0.0, result) for result in results)
