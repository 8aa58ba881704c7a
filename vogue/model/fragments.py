"""Which part of which weight a rank trains, and where its optimizer state lies, however DeepSpeed has laid it out.

A weight is taken as a flat row of its elements. A rank's fragment of it is a run of them:

    ZeRO-3         every weight is cut into equal parts, one a rank; the last ones are padded
    ZeRO-1 and 2   all weights of a group, one after the other, are; a rank has parts of some weights, none of others
    stage 0        every rank has all of every weight

AdamW updates float32 copies, the master weights. They and the two moments lie in flat tensors of many fragments each.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")  # the moments by AdamW's own names


class Fragment(NamedTuple):
    """Elements `first` to `first + count` of a weight, which lie from `offset` on in what AdamW updates."""

    name: str  # of the weight, in DeepSpeed's engine
    shape: tuple[int, ...]  # of the whole weight
    first: int
    count: int
    flat: Tensor  # one of AdamW's parameters, float32
    offset: int

    def of(self, values: Tensor) -> Tensor:
        """(count,): this fragment's part of a tensor that is laid out as `flat` is; it shares its memory."""
        return values.detach().view(-1).narrow(0, self.offset, self.count)

    def share(self, rank: int, ranks: int) -> "Fragment":
        """The part of it that a rank writes where all ranks have the same fragment."""
        start, end = self.count * rank // ranks, self.count * (rank + 1) // ranks
        return self._replace(first=self.first + start, count=end - start, offset=self.offset + start)


def trained(engine: Any) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name; a tied one once, under its first name."""
    return {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}


def held(engine: Any) -> list[Fragment]:
    """All fragments whose state this rank holds; with ZeRO-3 some may have no element."""
    stage = engine.zero_optimization_stage()
    layout = {0: _whole_weights, 3: _cut_weights}.get(stage, _cut_groups)
    return list(layout(engine, trained(engine)))


def written(engine: Any) -> list[Fragment]:
    """The fragments that this rank writes: those of all ranks are every trained weight."""
    found = held(engine)
    if engine.zero_optimization_stage() == 0:
        found = [fragment.share(dist.get_rank(), dist.get_world_size()) for fragment in found]
    return [fragment for fragment in found if fragment.count]


def _cut_weights(engine: Any, weights: Mapping[str, Any]) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for name, weight in weights.items():
        group, offset, part = optimizer.grad_position[optimizer.get_param_id(weight)]
        first = part * dist.get_rank(weight.ds_process_group)
        count = max(0, min(part, weight.ds_numel - first))  # the rest is padding
        yield Fragment(
            name, tuple(weight.ds_shape), first, count, optimizer.fp32_partitioned_groups_flat[group], offset
        )


def _cut_groups(engine: Any, weights: Mapping[str, Any]) -> Iterator[Fragment]:
    groups = engine.basic_optimizer.param_groups
    for name, weight in weights.items():
        if mapping := weight._hp_mapping:  # None where this rank has nothing of it
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = groups[mapping.param_group_index]["params"][0]
            yield Fragment(name, tuple(weight.shape), here.start, here.numel, flat, there.start)


def _whole_weights(engine: Any, weights: Mapping[str, nn.Parameter]) -> Iterator[Fragment]:
    updated = [group["params"] for group in engine.basic_optimizer.param_groups]
    own = getattr(engine.optimizer, "fp16_groups", updated)  # in bfloat16 AdamW updates copies of them
    masters = {id(x): y for pair in zip(own, updated, strict=True) for x, y in zip(*pair, strict=True)}
    for name, weight in weights.items():
        yield Fragment(name, tuple(weight.shape), 0, weight.numel(), masters[id(weight)], 0)


def updates_of(optimizer: torch.optim.Optimizer, flat: Tensor) -> int:
    """How often AdamW has updated one of its parameters."""
    return int(optimizer.state.get(flat, {}).get("step", 0))


def state_of(optimizer: torch.optim.Optimizer, fragment: Fragment) -> dict[str, Tensor]:
    """The fragment's master weights and moments, each (count,); the first alone before the first update."""
    found = {MASTER: fragment.of(fragment.flat)}
    if updates_of(optimizer, fragment.flat):
        state = optimizer.state[fragment.flat]
        found |= {name: fragment.of(state[name]) for name in MOMENTS}
    return found


def begin(optimizer: torch.optim.Optimizer, flat: Tensor, updates: int) -> None:
    """Give one of AdamW's parameters the state that it has after so many updates, with moments of 0."""
    count: Any = updates
    if not isinstance(optimizer, DeepSpeedCPUAdam):  # whose count is a number
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        count = torch.tensor(float(updates), dtype=torch.float32, device=flat.device if on_device else "cpu")
    optimizer.state[flat] = {"step": count, **{name: torch.zeros_like(flat) for name in MOMENTS}}


def spread(engine: Any) -> None:
    """Let the model have the master weights, which have changed; every rank calls."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # small weights are whole on every rank
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        weights = trained(engine)
        for fragment in held(engine):
            weights[fragment.name].data.copy_(fragment.flat.data)
