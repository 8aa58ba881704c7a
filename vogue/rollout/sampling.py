"""How completions are sampled: which tokens may come next, how likely each of them is, and which strings end one.

    p_v     softmax of (logit_v + ban_v) / temperature             what is trained, over the whole vocabulary
    min_p   keeps the tokens with p_v >= min_p max p
    top_k   keeps the k likeliest of those, and what is as likely as the last of them
    top_p   keeps the likeliest of those until their share of what was left is top_p or more
    q_v     p_v / K, with K the sum of p over the kept tokens       what is sampled, and the engine's log-probability

Both engines do it in this order, which is vLLM's. Where nothing is left out K is 1. Elsewhere an engine's
log-probability is the trainer's less log K: log q_v = log p_v - log K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from vogue.config import Config


@dataclass(frozen=True)
class Sampling:
    """How an engine samples a completion; at `temperature` 0 each token is the likeliest, whatever else is set."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0  # 1: all tokens
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # 0: all tokens
    stop: tuple[str, ...] = ()  # a completion ends with the first of them that it says


def of_rollouts(config: Config) -> Sampling:
    """How completions are sampled that are trained on."""
    given = config.rollout
    return Sampling(given.max_tokens, given.temperature, given.top_p, given.top_k, given.min_p, tuple(given.stop))


def of_evaluations(config: Config) -> Sampling:
    """How completions are sampled that answer held-out problems and benchmarks."""
    chosen = config.trainer.evaluation_sampling
    return Sampling(config.rollout.max_tokens, **chosen, stop=tuple(config.rollout.stop))


def told_of_truncation(config: Config) -> str | None:
    """A warning where completions aren't sampled from the whole distribution that is trained."""
    if not config.rollout.truncation:
        return None
    return (
        f"{' and '.join(config.rollout.truncation)}: completions are sampled from a part of the distribution that is "
        "trained, so that mismatch/... and the ratio of loss.importance_cap have that part's share in them; the "
        "policy's log-probabilities, u_out and u_per are of the whole vocabulary"
    )


def truncated(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (S, V), divided by the temperature already, with -inf for the tokens that aren't to be sampled."""
    if sampling.min_p:
        least = logits.amax(-1, keepdim=True) + log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -inf)
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -inf)
    if sampling.top_p < 1:
        ordered, tokens = logits.sort(descending=True)
        # In float64: a float32 sum over a large vocabulary is off by more than its last tokens are worth.
        likely = ordered.double().softmax(-1)
        before = likely.cumsum(-1) - likely
        late = before >= sampling.top_p  # the tokens before have enough; never the first
        logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, tokens, late), -inf)
    return logits


class StopWatch:
    """Says which of so many completions, read token by token, has completed one of the strings for the first time.

    The prompt, and what the chat template opens of the model's turn, don't count; special tokens have no text.
    """

    def __init__(self, stop: Sequence[str], tokenizer: Any, count: int):
        self._stop, self._tokenizer = stop, tokenizer
        self._streams = [DecodeStream(skip_special_tokens=True) for _ in range(count if stop else 0)]
        self._texts = [""] * len(self._streams)

    def stopped(self, tokens: Tensor) -> Tensor:
        """Whether each completion's next token, of `tokens` (S,), completes its first one: (S,) bool."""
        found = torch.zeros_like(tokens, dtype=torch.bool)
        if not self._stop:
            return found
        overlap = max(map(len, self._stop)) - 1
        for i, token in enumerate(tokens.tolist()):
            text = self._texts[i] + (self._streams[i].step(self._tokenizer.backend_tokenizer, token) or "")
            found[i] = any(stop in text for stop in self._stop)
            self._texts[i] = text[max(0, len(text) - overlap) :]
        return found


def until_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the end of the string that it says first; its last token may have said more. All of it for none."""
    ends = [text.index(string) + len(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text
