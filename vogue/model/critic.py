"""CDE's value heads: on hidden states of the policy, without gradient into it, with an optimizer of their own.

CDE's critic is a second model of the policy's size. This one is K linear heads on the states that the policy's forward
has anyway, those that predict a completion's tokens. They are the same on every rank, which sums their gradients, and
stand in the run's state with their moments: no part of the model that is saved, and none of DeepSpeed's norm.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vogue.config import Config
from vogue.method.critic import curious_advantages, prefixes_of_a_head, value_loss
from vogue.metrics import Mean, Means
from vogue.model.packing import Batch
from vogue.seeds import Purpose, seed_for
from vogue.step.run_state import RunState

HEADS = "critic"  # the run's state under this name


class Critic:
    """K heads on hidden states of `width`, as they were left in the run's `state`, or new ones."""

    def __init__(self, config: Config, width: int, device: torch.device, state: RunState):
        self.settings, self.clip, self.state = config.critic, config.optimizer.max_grad_norm, state
        generator = torch.Generator().manual_seed(seed_for(config.seed, Purpose.CRITIC))
        bound = width**-0.5  # as torch's own linear layers: each head begins as another function
        drawn = (2 * torch.rand(self.settings.heads, width, generator=generator) - 1) * bound
        self.weight, self.bias = nn.Parameter(drawn.to(device)), nn.Parameter(torch.zeros(len(drawn), device=device))
        self.optimizer = torch.optim.AdamW([self.weight, self.bias], self.settings.lr, weight_decay=0.0)
        if (known := state.current.get(HEADS)) is not None:
            with torch.no_grad():
                self.weight.copy_(known["weight"])
                self.bias.copy_(known["bias"])
            self.optimizer.load_state_dict(known["optimizer"])

    def values(self, hidden: Tensor) -> Tensor:
        """V (N, K) of the states `hidden` (N, D)."""
        return nn.functional.linear(hidden.float(), self.weight, self.bias)

    def advantages(self, batch: Batch, hidden: Tensor, step: int, means: Means) -> Batch:
        """The batch with each token's advantage by the heads, in place of its completion's reward; 0 in the warm-up."""
        settings = self.settings
        given = settings.model_dump(include={"gamma", "lam", "weight", "alpha", "cap"})
        with torch.no_grad():
            values = self.values(hidden).cpu()
        found = torch.zeros_like(batch.advantages)
        for here in batch.slices if step >= settings.warmup_steps else ():
            found[here] = curious_advantages(values[here], float(batch.advantages[here][0]), **given)
        seen = batch.weights > 0
        means.add("value", float(values.mean(dim=1)[seen].sum()), int(seen.sum()))
        means.add("value_spread", float(values.std(dim=1, correction=0)[seen].sum()), int(seen.sum()))
        return replace(batch, advantages=found, returns=batch.advantages)

    def pairs(self, lengths: Iterable[int]) -> int:
        """How many values of heads learn from completions of these lengths."""
        return self.settings.heads * sum(prefixes_of_a_head(length, self.settings.share) for length in lengths)

    def learn(self, batch: Batch, hidden: Tensor, pairs: float) -> dict[str, Mean]:
        """Add the gradient of the batch's part of the loss, of `pairs` values in the update of all ranks."""
        if batch.dealt is None or batch.returns is None:  # rows that only keep ranks in step
            return {}
        dealt = batch.dealt & (batch.weights > 0)[:, None]
        with torch.enable_grad():
            loss = value_loss(self.values(hidden), batch.returns, dealt)
            (loss / pairs).backward()
        return {"value_loss": Mean(float(loss.detach()), int(dealt.sum()))}

    def step(self) -> None:
        """One update from the gradients of all ranks, clipped to optimizer.max_grad_norm; collective."""
        parameters: Sequence[nn.Parameter] = (self.weight, self.bias)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
        nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.current[HEADS] = {
            "weight": self.weight.detach().cpu(),
            "bias": self.bias.detach().cpu(),
            "optimizer": self.optimizer.state_dict(),
        }
