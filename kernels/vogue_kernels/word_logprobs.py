"""Log-probabilities of several given words a token: a teacher's likeliest ones, the letters of a choice.

    log p_k = z_k − lse        z_k = (W_k h + bias_k) / τ        lse = log Σ_v e^z_v

lse is `linear_logprob`'s, of one pass over the vocabulary. The logits z_k come of the words' own rows of the weight,
a bounded number of which is gathered at a time. Their gradients are

    ∂h = Σ_k g_k W_k / τ        ∂W_v = Σ_{k: word v} g_k h / τ        ∂lse = − Σ_k g_k

or, where logits are capped, with the cap's slope at each of them.

Where p_k is near 1, z_k − lse would be little but the rounding of both. So log p_k is reckoned from the likeliest of
the words, whose log-probability is `linear_logprob`'s and free of it: log p_k = log p_top + (z_k − z_top).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operator import IGNORE, linear_logprob

CHUNK_ELEMENTS = 1 << 22  # of the gathered rows of the weight, and of the hidden states: 16 MB of float32


def linear_logprob_of(
    hidden: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    *,
    softcap: float | None = None,
    keep_logits_bytes: int = 0,
) -> Tensor:
    """Log-probabilities of K given words per token under softmax((W h + bias) / τ), exactly.

    hidden: (..., D). words: (..., K) integers in [0, V), in any order, a word as often as you like; -100 marks a place
    without a word, whose result is 0 and sends no gradient. All else is as in `linear_logprob`.

    Returns (..., K) in nats, float32 (float64 for float64 inputs), never positive, differentiable in the hidden states,
    weight and bias (once). It takes the time of `linear_logprob` and that of K scalar products a token. Memory beyond
    that is a few (N, K) tensors and chunks of 16 MB; and, where the weight has a gradient, a second one of its size,
    as the words' and that of lse are added up.

    Raises ValueError for a word outside of the vocabulary and for K = 0, and what `linear_logprob` raises.
    """
    shape = words.shape
    if words.dim() == 0 or shape[-1] == 0:
        raise ValueError(f"words must be (..., K) with at least one place for a word, got {tuple(shape)}")
    if hidden.shape[:-1] != shape[:-1]:
        raise ValueError(f"hidden must be {(*shape[:-1], 'D')}, got {tuple(hidden.shape)}, with words {tuple(shape)}")
    rest = bias, temperature, backend
    hidden, words = hidden.reshape(-1, hidden.shape[-1]), words.reshape(-1, shape[-1])
    linear_logprob(
        hidden[:0], weight, words[:0, 0], *rest, softcap=softcap
    )  # of no token: it raises for what can't be used
    words = words.long()
    _check_words(words, len(weight))
    with torch.no_grad():
        logits, slope = _capped(_logits(hidden, weight, bias, words), softcap)
        logits, slope = logits / temperature, slope / temperature
        top = logits.argmax(1, keepdim=True)
        from_top = logits - logits.gather(1, top)
    target = words.gather(1, top).squeeze(1)
    stats = linear_logprob(hidden, weight, target, *rest, softcap=softcap, keep_logits_bytes=keep_logits_bytes)
    results = _Given.apply(hidden, weight, bias, stats.lse, stats.logprob.detach(), from_top, slope, words)
    return results.view(shape)


def _check_words(words: Tensor, vocab: int) -> None:
    bad = ((words < 0) | (words >= vocab)) & (words != IGNORE)
    if bad.any():
        token, place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"words[{token}, {place}] = {int(words[token, place])} is outside [0, {vocab}); "
            f"only {IGNORE} marks a place without a word"
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor) -> Tensor:
    """(N, K): W_k h + bias_k of every word, −∞ where there is none; inputs are rounded as in `linear_logprob`."""
    autocast = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64
    rounded = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    dtype = torch.promote_types(rounded, torch.float32)
    logits = torch.full_like(words, -torch.inf, dtype=dtype)
    for token, place in _chunks((words != IGNORE).nonzero(), hidden.shape[1]):
        word = words[token, place]
        products = (weight[word].to(rounded).to(dtype) * hidden[token].to(rounded).to(dtype)).sum(1)
        if bias is not None:
            products += bias[word].to(rounded if autocast else dtype)
        logits[token, place] = products
    return logits


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Logits as they are or capped, and the slope of that, 1 − (l / c)²: (N, K) each."""
    if softcap is None:
        return logits, torch.ones_like(logits)
    there, part = logits > -torch.inf, torch.tanh(logits / softcap)
    return torch.where(there, softcap * part, logits), 1 - part.square()


def _chunks(places: Tensor, width: int):
    """(token, place) of places (P, 2), as many at a time as have CHUNK_ELEMENTS."""
    return (chunk.unbind(1) for chunk in places.split(max(1, CHUNK_ELEMENTS // width)))


class _Given(torch.autograd.Function):
    """The results from their distance to the likeliest word's, with the gradient of z − lse."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, lse, top_logprob, from_top, slope, words):
        ctx.save_for_backward(hidden, weight, bias, slope, words)  # the weight itself, as in registration.py
        return torch.where(words == IGNORE, 0.0, top_logprob.unsqueeze(1) + from_top)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, slope, words = ctx.saved_tensors
        grad = grad.masked_fill(words == IGNORE, 0.0)
        of_logits = grad * slope
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = _of_hidden(of_logits, weight, words).to(hidden.dtype) if needs_hidden else None
        grad_weight = _of_weight(of_logits, hidden, weight, words) if needs_weight else None
        grad_bias = _of_bias(of_logits, bias, words) if needs_bias else None
        return grad_hidden, grad_weight, grad_bias, -grad.sum(1), None, None, None, None


# index_put_ adds up in a fixed order on a GPU too, where index_add_ doesn't.


def _of_hidden(grad: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    total = grad.new_zeros(len(words), weight.shape[1])
    for token, place in _chunks((words != IGNORE).nonzero(), weight.shape[1]):
        products = grad[token, place].unsqueeze(1) * weight[words[token, place]]
        total.index_put_((token,), products.to(grad.dtype), accumulate=True)
    return total


def _of_weight(grad: Tensor, hidden: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    """In the weight's dtype, to which a word's sum is rounded once, however many tokens it is given to."""
    total = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    places = (words != IGNORE).nonzero()
    places = places[words[places[:, 0], places[:, 1]].argsort(stable=True)]
    last, unfinished = words.new_tensor(-1), grad.new_zeros(weight.shape[1])
    for token, place in _chunks(places, weight.shape[1]):
        distinct, which = words[token, place].unique_consecutive(return_inverse=True)
        sums = grad.new_zeros(len(distinct), weight.shape[1])
        products = grad[token, place].unsqueeze(1) * hidden[token]
        sums.index_put_((which,), products.to(grad.dtype), accumulate=True)
        sums[0] += torch.where(distinct[0] == last, unfinished, 0.0)  # a chunk may end in the middle of a word
        total[distinct] = sums.to(weight.dtype)
        last, unfinished = distinct[-1], sums[-1]
    return total


def _of_bias(grad: Tensor, bias: Tensor, words: Tensor) -> Tensor:
    there = words != IGNORE
    total = grad.new_zeros(len(bias))
    return total.index_put_((words[there],), grad[there], accumulate=True).to(bias.dtype)
