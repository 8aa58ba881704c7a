"""Whether a rollout engine's weights are the policy's, after a sync: a completion's log-probabilities by both.

A label says which weights a server was given, not whether all of them arrived: a head that vLLM packs apart from the
embedding, or a file that was cut, stays old without a word. So that every server that is in samples a few tokens of a
prompt of the step, and the policy says how likely they are.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from vogue import distributed
from vogue.config import Config
from vogue.inputs import RAW
from vogue.method.uncertainty import TokenStats
from vogue.model.packing import Batch, Row, collate
from vogue.rollout.engine import Completion, EngineError, Request
from vogue.rollout.sampling import Sampling
from vogue.seeds import Purpose, seed_for
from vogue.step.loader import Item

TOKENS = 16  # of each server
# Mean nats a token. The two computations differ by rounding, in bfloat16 by some hundredths; other weights by tenths.
MOST = {"float32": 0.01, "bfloat16": 0.2}


class Servers(Protocol):
    """An engine of several servers."""

    def everywhere(self, request: Request, sampling: Sampling) -> list[Completion]: ...


def mismatch(
    engine: Servers,
    forward: Callable[[Batch], TokenStats],
    item: Item,
    config: Config,
    step: int,
    device: torch.device,
    pad_id: int,
) -> float:
    """Return the largest mean of |log pi - log engine| (nats a token) over the servers and ranks; every rank calls.

    item  a prompt of this rank's, which its raw view is shown with
    """
    seed = seed_for(config.seed, Purpose.PROBE, step, dist.get_rank())
    sampling = Sampling(min(TOKENS, config.rollout.max_tokens), config.rollout.temperature)
    completions = engine.everywhere(Request(item.prompt, item.views[RAW], seed), sampling)
    rows = [
        Row(item.prompt, item.views, RAW, (completion,), (torch.zeros(len(completion.token_ids)),))
        for completion in completions
    ]
    if not all(distributed.gather(len(rows))):  # the next rollout says that no server is left
        return 0.0
    with torch.no_grad():
        batch = collate(rows, pad_id, token_mean=True).to(device)
        difference = (forward(batch).logprob - batch.engine_logprob).abs()
    worst = max(float(difference[tokens].mean()) for tokens in batch.slices)
    return max(distributed.gather(worst))


def doubt(found: float, config: Config, step: int) -> EngineError | None:
    """What is wrong with servers whose `mismatch` is more than rounding."""
    if found <= MOST[config.model.dtype]:
        return None
    return EngineError(
        f"after {step} steps a server's log-probabilities are {found:.3g} nats a token from the policy's, more "
        f"than {MOST[config.model.dtype]}: it hasn't all of the policy's weights"
    )
