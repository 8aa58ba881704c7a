"""A rollout engine takes prompts and the policy's weights, and gives completions.

There are three: `vllm.py`, in the trainer's process; `server.py`, vLLM in processes of its own; and `hf.py` where vLLM
can't be installed. A rank generates for its own prompts; ranks that share an engine of vLLM call it together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vogue.families import family_of_processor
from vogue.inputs import Prompt, View
from vogue.rollout.sampling import Sampling

BAN = -100.0  # added to the logits of tokens that can't be sampled, in rollout and training alike


@dataclass(frozen=True)
class Request:
    """One prompt with the images of one branch, preprocessed once for engine and policy alike.

    Equal seeds give equal completions, whatever else is generated.
    """

    prompt: Prompt
    view: View
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sampled completion of a prompt.

    `token_ids` end with an end token, or with the one that completes a string of `Sampling.stop`, if it `finished`;
    `logprobs` (nats) are of the distribution sampled from. `text` is the model's whole turn: it begins with what the
    chat template has opened of it, and ends with the string that has stopped it.

    States that the model has read between tokens (`vogue.rollout.latent_spans`) are `latents` (n, D), the i-th of them
    behind the first `behind[i]` tokens; None with `rollout.latent_steps=0`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool
    latents: Tensor | None = field(default=None, compare=False)  # tensors have no truth value
    behind: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """What the model has read and said: tokens, and states in between."""
        return len(self.token_ids) + len(self.behind)

    def __getstate__(self):
        # What ranks send each other is read number by number, but for tensors.
        ids, logprobs = torch.tensor(self.token_ids), torch.tensor(self.logprobs, dtype=torch.float64)
        return vars(self) | {"token_ids": ids, "logprobs": logprobs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tuples = {name: tuple(state[name].tolist()) for name in ("token_ids", "logprobs")}
        vars(self).update(state | tuples)


class EngineError(RuntimeError):
    """Nothing generates any more, or what is to generate can't be used; the message says what and why."""


class Generates(Protocol):
    """What completions come from."""

    def generate(self, requests: list[Request], n: int, sampling: Sampling) -> list[list[Completion]]:
        """Generate `n` completions for each request; at temperature 0, which takes n = 1, of the likeliest tokens.

        Log-probabilities are then those of temperature 1, over the whole vocabulary. Every rank calls as often as the
        others, even for nothing: those that share an engine wait for each other here.
        """
        ...


class Engine(Generates, Protocol):
    version: int  # the optimizer update whose weights it has

    def sleep(self) -> None:
        """Give memory to training until the next `load_weights`, before which nothing can be generated, if at all."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    def up_to_date(self) -> bool:
        """Whether all that generates has the weights of `version`; every rank calls.

        False where a server has restarted: `load_weights` has to come before `generate`.
        """
        ...


def media_token_ids(processor: Any) -> list[int]:
    """The ids that stand for images or videos in a prompt; a sampled one would ask for an image that isn't there."""
    known = processor.tokenizer.get_vocab()
    tokens = (processor.image_token, getattr(processor, "video_token", None), *family_of_processor(processor).marks)
    return sorted({known[token] for token in tokens if token in known})
