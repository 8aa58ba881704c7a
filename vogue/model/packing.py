"""Groups become micro-batches.

A row of a micro-batch is one prompt followed by the completions that share it:

    [ prompt | completion 1 | completion 2 | ... | pad ]      segments 0, 1, 2, ..., -1

Completions attend to the prompt and to themselves (`vogue.model.policy`), so a group costs one prompt. Only the
positions that predict a completion's token reach the output head; they are listed flat, as N tokens.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vogue.inputs import Prompt, View, cat_images
from vogue.method.uncertainty import Signals
from vogue.rollout import Completion

PAD = -1  # segment of padding


@dataclass(frozen=True)
class Row:
    """Completions of one prompt that are trained on one branch, and what training needs of them.

    `advantages[i]` is the base advantage of `completions[i]`. `view` is their branch, the noisy one where `noisy`,
    `other` the other one, where the two are compared (`None` where no second forward is needed).
    `weight` is 0 for a row that only keeps ranks in step. `foreign[i]`: completion i was generated from another view
    than `view`, none was where it is empty. `paid`: their loss reads u_per.
    """

    prompt: Prompt
    view: View
    other: View | None
    completions: tuple[Completion, ...]
    advantages: tuple[float, ...]
    weight: float = 1.0
    foreign: tuple[bool, ...] = ()
    noisy: bool = False
    paid: bool = False

    @property
    def tokens(self) -> int:
        return len(self.prompt.token_ids) + sum(len(_read(c)) for c in self.completions)

    @property
    def compared(self) -> bool:
        return self.other is not None


@dataclass(frozen=True)
class Images:
    """Images of B rows, each distinct `View` once: `pixel_values` and `sizes` as there, one view after the other.

    `counts`: images of each view. `order`: for every image of the rows, which of these it is.
    """

    pixel_values: Tensor
    sizes: Tensor
    counts: tuple[int, ...]
    order: tuple[int, ...]

    def to(self, device: torch.device) -> "Images":
        return replace(self, pixel_values=self.pixel_values.to(device), sizes=self.sizes.to(device))


@dataclass(frozen=True)
class Batch:
    """B rows padded to L tokens, and their N completion tokens, flat.

    `input_ids`, `token_types`, `segments`: (B, L) int64. `positions` (N,): where in the B·L hidden states token n
    is predicted. `targets` (N,) int64; `advantages`, `rollout_logprob`, `weights` (N,) float32: base advantage, the
    engine's log-probability (NaN where the engine saw another view), and the token's weight in the loss. `noisy` and
    `paid` (N,) bool: tokens of the noisy branch, and those whose u_per is paid. `completions`: in the tokens' order.
    `view` is None where there is no image. `other`: the compared rows, which are the first ones, on their other branch;
    None where there are none. `old` holds what a pass before several updates found.
    """

    input_ids: Tensor
    token_types: Tensor
    segments: Tensor
    view: Images | None
    completions: tuple[Completion, ...]
    positions: Tensor
    targets: Tensor
    advantages: Tensor
    rollout_logprob: Tensor
    weights: Tensor
    noisy: Tensor
    paid: Tensor
    other: "Batch | None"
    old: Signals | None = None

    def to(self, device: torch.device) -> "Batch":
        kinds = Tensor | Images | Batch
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, kinds)})


MAX_PADDING = 0.1  # of a micro-batch's tokens


def pack(rows: Iterable[Row], budget: int) -> list[list[Row]]:
    """Rows into micro-batches of at most `budget` tokens, of which at most a tenth is padding.

    Compared rows come first, so that few micro-batches have any, and the longest of each kind. A row longer than the
    budget is a micro-batch of its own.
    """
    packed: list[list[Row]] = []
    longest = real = 0  # of the last micro-batch: the longest row's tokens, and those of all rows
    for row in sorted(rows, key=lambda row: (row.compared, row.tokens), reverse=True):
        if packed:
            size = max(longest, row.tokens) * (len(packed[-1]) + 1)
            if size <= budget and real + row.tokens >= (1 - MAX_PADDING) * size:
                packed[-1].append(row)
                longest, real = max(longest, row.tokens), real + row.tokens
                continue
        packed.append([row])
        longest = real = row.tokens
    return packed


def spread(micro_batches: list[list[Row]], count: int, filler: Row) -> list[list[Row]]:
    """Exactly `count` micro-batches: every rank must run as many forwards as the others (ZeRO-3's collectives).

    The largest are cut in two, both with compared rows where there were any (so not one with a single such row); where
    none can be cut, idle ones of `filler` are added.
    """
    spread_out = list(micro_batches)
    while len(spread_out) < count and any(map(_can_be_cut, spread_out)):
        i = max(range(len(spread_out)), key=lambda i: (_can_be_cut(spread_out[i]), _tokens(spread_out[i])))
        spread_out[i : i + 1] = [spread_out[i][::2], spread_out[i][1::2]]
    idle = replace(filler, weight=0.0, completions=filler.completions[:1], advantages=(0.0,), foreign=())
    return spread_out + [[idle]] * (count - len(spread_out))


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row.tokens for row in rows)


def _can_be_cut(rows: Sequence[Row]) -> bool:
    return (sum(row.compared for row in rows) or len(rows)) > 1


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Share out numbers 0 to len(costs) - 1, equally many a rank and of nearly equal cost, in ascending order each.

    Dealt from the most expensive on, to and fro: 0 1 2 2 1 0 0 1 ...
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place, i in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i])):
        lap, rank = divmod(place, ranks)
        shares[rank if lap % 2 == 0 else ranks - 1 - rank].append(i)
    return [sorted(share) for share in shares]


def collate(rows: Sequence[Row], pad_id: int, token_mean: bool) -> Batch:
    """Pad `rows` into a batch; compared ones must come first.

    A token's weight is 1 (token-mean), or 1 / its completion's length (sequence-mean), times its row's; the trainer
    divides by their sum over the whole update, so that splitting it into micro-batches changes nothing.
    """
    compared = [replace(row, view=row.other, other=None) for row in rows if row.compared]
    assert all(row.compared for row in rows[: len(compared)]), "a row that is compared follows one that isn't"
    length = max(row.tokens for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    token_types = torch.zeros_like(input_ids)
    segments = torch.full_like(input_ids, PAD)
    sizes, starts, prompt_ends, advantages, weights = [], [], [], [], []  # of each completion
    targets, logprobs = [], []  # of each token
    for b, row in enumerate(rows):
        prompt = len(row.prompt.token_ids)
        input_ids[b, :prompt], token_types[b, :prompt] = row.prompt.token_ids, row.prompt.token_types
        ids, segment_ids = [], [0] * prompt
        for i, (completion, advantage) in enumerate(zip(row.completions, row.advantages, strict=True)):
            size = len(completion.token_ids)
            sizes.append(size)
            starts.append(b * length + prompt + len(ids))
            prompt_ends.append(b * length + prompt - 1)
            advantages.append(advantage)
            weights.append(row.weight if token_mean else row.weight / size)
            targets += completion.token_ids
            logprobs += [math.nan] * size if row.foreign and row.foreign[i] else completion.logprobs
            read = _read(completion)
            ids += read
            segment_ids += [i + 1] * len(read)
        input_ids[b, prompt : len(segment_ids)] = torch.tensor(ids)
        segments[b, : len(segment_ids)] = torch.tensor(segment_ids)
    size = torch.tensor(sizes)

    def per_token(values: list) -> Tensor:
        return torch.tensor(values).repeat_interleave(size)

    # The first token is predicted where the prompt ends, each further one by the token before it.
    number = torch.arange(len(targets)) - (size.cumsum(0) - size).repeat_interleave(size)
    batch = Batch(
        input_ids=input_ids,
        token_types=token_types,
        segments=segments,
        view=_stack([row.view for row in rows]),
        completions=tuple(completion for row in rows for completion in row.completions),
        positions=torch.where(number == 0, per_token(prompt_ends), per_token(starts) + number - 1),
        targets=torch.tensor(targets),
        advantages=per_token(advantages),
        rollout_logprob=torch.tensor(logprobs),
        weights=per_token(weights),
        noisy=per_token([row.noisy for row in rows for _ in row.completions]),
        paid=per_token([row.paid for row in rows for _ in row.completions]),
        other=None,
    )
    if 0 < len(compared) < len(rows):
        return replace(batch, other=collate(compared, pad_id, token_mean))
    return replace(batch, other=replace(batch, view=_stack([row.view for row in compared]))) if compared else batch


def _read(completion: Completion) -> tuple[int, ...]:
    """The tokens that the model reads: the last one predicts nothing (kept where it is alone, so that some are)."""
    return completion.token_ids[: max(1, len(completion.token_ids) - 1)]


def _stack(views: Sequence[View]) -> Images | None:
    """Images of several rows, one after the other, as the vision tower takes them."""
    distinct = list({id(view): view for view in views if view.sizes is not None}.values())
    if not distinct:
        return None
    counts = tuple(len(view.sizes) for view in distinct)
    first = dict(zip(map(id, distinct), itertools.accumulate(counts, initial=0), strict=False))
    order = (first[id(view)] + i for view in views if view.sizes is not None for i in range(len(view.sizes)))
    pixel_values = cat_images([view.pixel_values for view in distinct])
    return Images(pixel_values, torch.cat([view.sizes for view in distinct]), counts, tuple(order))
