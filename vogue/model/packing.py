"""Groups become micro-batches.

A row of a micro-batch is one prompt followed by the completions that share it:

    [ prompt | completion 1 | completion 2 | ... | pad ]      segments 0, 1, 2, ..., -1

Completions attend to the prompt and to themselves (`vogue.model.policy`), so a group costs one prompt. States that one
has read (`vogue.rollout.latent_spans`) have places in it, and are no tokens. Only the positions that predict a
completion's token reach the output head; they are listed flat, as N tokens.
"""

import itertools
import math
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from vogue.inputs import NOISY, Prompt, View, cat_images
from vogue.method.uncertainty import Signals
from vogue.model.attention import PAD
from vogue.rollout.engine import Completion


class Place(NamedTuple):
    """Where a completion stands among a step's groups."""

    group: int  # among those of its rank
    completion: int
    rank: int = 0  # that generated it, which may not be the one that trains on it


@dataclass(frozen=True)
class Row:
    """Completions of one prompt that are trained on one view, and what training needs of them."""

    prompt: Prompt
    views: Mapping[str, View]
    trained: str  # the view that they are trained on
    completions: tuple[Completion, ...]
    advantages: tuple[Tensor, ...]  # of each completion (T,) float32, one a token: the base ones, without bonuses
    others: tuple[str, ...] = ()  # the views that the loss or the log compares that one with, a forward each
    sources: tuple[str, ...] = ()  # the view that each completion was generated from; empty: the trained one
    paid: bool = False  # the loss reads u_per
    weight: float = 1.0  # 0 for a row that only keeps ranks in step
    places: tuple[Place, ...] = ()  # of each completion; empty for a row that only keeps ranks in step
    repeats: tuple[int, ...] = ()  # how often each completion is trained on; empty: once
    # Of each completion (T,) nats, by the policy that generated it, None of those that today's did; empty: all today's.
    behaviours: tuple[Tensor | None, ...] = ()
    degraded: int = 0  # how many of `others`, the last ones, are degraded views
    right: tuple[bool, ...] = ()  # each completion; empty: none
    dealt: tuple[Tensor, ...] = ()  # of each completion (T, K) bool, which value head learns of which token

    @property
    def tokens(self) -> int:
        return len(self.prompt.token_ids) + sum(len(_inputs(c)) for c in self.completions)

    @property
    def compared(self) -> bool:
        return bool(self.others)


@dataclass(frozen=True)
class Images:
    """Images and videos of B rows, each distinct `View` once: `pixel_values` and `sizes` as there, view after view.

    Of a view its images come first, then its videos: a vision tower that takes both sees them in one call.
    `counts`: how many each view has. `order`: for every one of the rows, which of these it is.
    `seconds`: of each of these, between two frames of a video; None of an image.
    """

    pixel_values: Tensor
    sizes: Tensor
    counts: tuple[int, ...]
    order: tuple[int, ...]
    seconds: tuple[float | None, ...]

    def of_kind(self, *, video: bool) -> list[int]:
        """Of every image of the rows, or of every video, in order, which of these it is."""
        return [i for i in self.order if (self.seconds[i] is not None) == video]

    @property
    def video_sizes(self) -> Tensor | None:
        """Sizes of every video of the rows, in order; None where there is none."""
        return self.sizes[videos] if (videos := self.of_kind(video=True)) else None

    def to(self, device: torch.device) -> "Images":
        return replace(self, pixel_values=self.pixel_values.to(device), sizes=self.sizes.to(device))


@dataclass(frozen=True)
class Batch:
    """B rows padded to L tokens, and their N completion tokens, flat."""

    input_ids: Tensor  # (B, L) int64
    token_types: Tensor  # (B, L) int64
    segments: Tensor  # (B, L) int64
    images: Images | None  # None where there is no image
    completions: tuple[Completion, ...]  # in the tokens' order
    places: tuple[Place | None, ...]  # of each completion, None in a row that only keeps ranks in step
    positions: Tensor  # (N,) where in the B L hidden states token n is predicted
    targets: Tensor  # (N,) int64
    advantages: Tensor  # (N,) float32, the base ones
    engine_logprob: Tensor  # (N,) float32 nats, by the rollout engine; NaN where it saw another view than the trained
    weights: Tensor  # (N,) float32, in the loss
    noisy: Tensor  # (N,) bool: trained on the noisy view
    paid: Tensor  # (N,) bool: the loss reads u_per
    others: tuple["Batch", ...]  # the first rows on the views that they are compared with, the i-th of each in the i-th
    right: Tensor  # (N,) bool: of a completion that is right
    degraded: tuple["Batch", ...] = ()  # the first rows on the degraded views, as `others`
    old: Signals | None = None  # before the first of several updates
    behaviour: Tensor | None = None  # (N,) float32 nats, by the policy that generated; NaN: today's. None: all today's
    dealt: Tensor | None = None  # (N, K) bool: which value head learns of the token
    returns: Tensor | None = None  # (N,) float32: the completion's reward, which it learns
    latents: Tensor | None = None  # (n, D): the states that are read in place of tokens; None where there are none
    latent_positions: Tensor | None = None  # (n,) where in the B L tokens

    @property
    def slices(self) -> list[slice]:
        """Where each completion stands among the tokens."""
        lengths = [len(completion.token_ids) for completion in self.completions]
        return [slice(end - length, end) for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Images)}
        views = {name: tuple(view.to(device) for view in getattr(self, name)) for name in ("others", "degraded")}
        return replace(self, **moved, **views)


MAX_PADDING = 0.1  # of a micro-batch's tokens


class Sized(Protocol):
    """All that packing reads of a row."""

    @property
    def tokens(self) -> int: ...

    @property
    def others(self) -> Sequence[str]: ...


AnyRow = TypeVar("AnyRow", bound=Sized)


def pack(rows: Iterable[AnyRow], budget: int) -> list[list[AnyRow]]:
    """Rows into micro-batches of at most `budget` tokens, of which at most a tenth is padding.

    Compared rows come first, so that few micro-batches have any, and the longest of each kind. A row longer than the
    budget is a micro-batch of its own: a prompt with one completion, so that `data.max_prompt_tokens` and
    `rollout.max_tokens` bound it. Patches of images aren't counted beside tokens, which bound them: a Qwen's image
    token stands for four patches, and an image of LLaVA-OneVision has at least one tile's tokens and at most so many
    tiles as its configuration lists.
    """
    packed: list[list[AnyRow]] = []
    longest = real = 0  # of the last micro-batch: the longest row's tokens, and those of all rows
    for row in sorted(rows, key=lambda row: (len(row.others), row.tokens), reverse=True):
        if packed:
            size = max(longest, row.tokens) * (len(packed[-1]) + 1)
            if size <= budget and real + row.tokens >= (1 - MAX_PADDING) * size:
                packed[-1].append(row)
                longest, real = max(longest, row.tokens), real + row.tokens
                continue
        packed.append([row])
        longest = real = row.tokens
    return packed


def spread(micro_batches: list[list[AnyRow]], count: int, filler: AnyRow) -> list[list[AnyRow]]:
    """Exactly `count` micro-batches: every rank must run as many forwards as the others (ZeRO-3's collectives).

    The largest are cut in two, both with compared rows where there were any (so not one with a single such row); where
    none can be cut, idle ones of `filler` are added.
    """
    spread_out = list(micro_batches)
    while len(spread_out) < count and any(map(_can_be_cut, spread_out)):
        i = max(range(len(spread_out)), key=lambda i: (_can_be_cut(spread_out[i]), tokens_of(spread_out[i])))
        spread_out[i : i + 1] = [spread_out[i][::2], spread_out[i][1::2]]
    return spread_out + [[filler]] * (count - len(spread_out))


def tokens_of(rows: Sequence[Sized]) -> int:
    return sum(row.tokens for row in rows)


def _can_be_cut(rows: Sequence[Sized]) -> bool:
    return (sum(bool(row.others) for row in rows) or len(rows)) > 1


def collate(rows: Sequence[Row], pad_id: int, *, token_mean: bool) -> Batch:
    """Pad `rows` into a batch; those that are compared with more views must come first.

    A token's weight is 1 (token-mean), or 1 / its completion's length (sequence-mean), times its row's and how often it
    is trained on; the trainer divides by their sum over the whole update, so that splitting it into micro-batches
    changes nothing.
    """
    counts = [len(row.others) for row in rows]
    assert counts == sorted(counts, reverse=True), "a row that is compared with more views follows one with fewer"
    length = max(row.tokens for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    token_types = torch.zeros_like(input_ids)
    segments = torch.full_like(input_ids, PAD)
    sizes, starts, prompt_ends, weights, places = [], [], [], [], []  # of each completion
    targets, logprobs, advantages, read = [], [], [], []  # of each token; `read`: states before it in its completion
    latents, latent_positions = [], []
    for b, row in enumerate(rows):
        prompt = len(row.prompt.token_ids)
        input_ids[b, :prompt], token_types[b, :prompt] = row.prompt.token_ids, row.prompt.token_types
        ids, segment_ids = [], [0] * prompt
        places += row.places or [None] * len(row.completions)
        sources = row.sources or (row.trained,) * len(row.completions)
        repeats = row.repeats or (1,) * len(row.completions)
        for i, (completion, shaped, source, times) in enumerate(
            zip(row.completions, row.advantages, sources, repeats, strict=True)
        ):
            size = len(completion.token_ids)
            sizes.append(size)
            starts.append(b * length + prompt + len(ids))
            prompt_ends.append(b * length + prompt - 1)
            read += [bisect(completion.behind, i) for i in range(size)] if completion.behind else [0] * size
            if completion.latents is not None:
                latents.append(completion.latents)
                latent_positions += [starts[-1] + after + j for j, after in enumerate(completion.behind)]
            advantages.append(shaped)
            weights.append(row.weight * times if token_mean else row.weight * times / size)
            targets += completion.token_ids
            logprobs += completion.logprobs if source == row.trained else [math.nan] * size
            inputs = _inputs(completion)
            ids += inputs
            segment_ids += [i + 1] * len(inputs)
        input_ids[b, prompt : len(segment_ids)] = torch.tensor(ids)
        segments[b, : len(segment_ids)] = torch.tensor(segment_ids)
    size = torch.tensor(sizes)

    def per_token(values: list) -> Tensor:
        return torch.tensor(values).repeat_interleave(size)

    # The first token is predicted where the prompt ends, each further one by the token or the state before it.
    number = torch.arange(len(targets)) - (size.cumsum(0) - size).repeat_interleave(size)
    batch = Batch(
        input_ids=input_ids,
        token_types=token_types,
        segments=segments,
        images=_stack([row.views[row.trained] for row in rows]),
        completions=tuple(completion for row in rows for completion in row.completions),
        places=tuple(places),
        positions=torch.where(number == 0, per_token(prompt_ends), per_token(starts) + number + torch.tensor(read) - 1),
        targets=torch.tensor(targets),
        advantages=torch.cat(advantages),
        engine_logprob=torch.tensor(logprobs),
        weights=per_token(weights),
        noisy=per_token([row.trained == NOISY for row in rows for _ in row.completions]),
        paid=per_token([row.paid for row in rows for _ in row.completions]),
        others=(),
        behaviour=_behaviour(rows),
        right=per_token([right for row in rows for right in row.right or (False,) * len(row.completions)]),
        dealt=_dealt(rows),
        latents=torch.cat(latents) if latents else None,
        latent_positions=torch.tensor(latent_positions, dtype=torch.int64) if latents else None,
    )
    views = [_other(batch, rows, i, pad_id, token_mean) for i in range(counts[0])]
    degraded = counts[0] - rows[0].degraded  # from here on
    return replace(batch, others=tuple(views[:degraded]), degraded=tuple(views[degraded:]))


def _behaviour(rows: Sequence[Row]) -> Tensor | None:
    """The log-probabilities (N,) of replayed tokens by the policy that generated them, NaN for the others."""
    known = [b for row in rows for b in row.behaviours or (None,) * len(row.completions)]
    if all(values is None for values in known):
        return None
    completions = (completion for row in rows for completion in row.completions)
    nothing = (torch.full((len(completion.token_ids),), math.nan) for completion in completions)
    return torch.cat([b if b is not None else none for b, none in zip(known, nothing, strict=True)])


def _other(batch: Batch, rows: Sequence[Row], i: int, pad_id: int, token_mean: bool) -> Batch:
    """The batch of the rows that are compared with an i-th view, on that view."""
    compared = [replace(row, trained=row.others[i], others=(), degraded=0) for row in rows if len(row.others) > i]
    if len(compared) < len(rows):
        return collate(compared, pad_id, token_mean=token_mean)
    return replace(batch, images=_stack([row.views[row.trained] for row in compared]))


def _dealt(rows: Sequence[Row]) -> Tensor | None:
    """Which value head learns of which of the N tokens: of those of an idle row none does."""
    known = [dealt for row in rows for dealt in row.dealt]
    if not known:
        return None
    none = known[0].new_zeros(1, known[0].shape[1])
    idle = ([none.expand(len(c.token_ids), -1) for c in row.completions] for row in rows)
    return torch.cat([part for row, rest in zip(rows, idle, strict=True) for part in row.dealt or rest])


def _inputs(completion: Completion) -> list[int]:
    """The tokens that the model reads: the last one predicts nothing (kept where it is alone, so that some are).

    In the place of a state the token before it stands once more.
    """
    inputs = list(completion.token_ids[: max(1, len(completion.token_ids) - 1)])
    for i, after in enumerate(completion.behind):
        inputs.insert(after + i, inputs[after + i - 1])
    return inputs


def _stack(views: Sequence[View]) -> Images | None:
    """Images and videos of several rows, one after the other, as the vision tower takes them."""
    distinct = {id(view): view for view in views if view.sizes is not None or view.video_sizes is not None}
    if not distinct:
        return None
    seconds, sizes, pixel_values = [], [], []
    counts: dict[int, int] = {}
    for key, view in distinct.items():
        parts = [part for part in (view.sizes, view.video_sizes) if part is not None]
        sizes += parts
        pixel_values += [x for x in (view.pixel_values, view.video_pixel_values) if x is not None]
        counts[key] = sum(map(len, parts))
        seconds += [None] * (counts[key] - len(view.clips)) + [clip.interval for clip in view.clips]
    first = dict(zip(distinct, itertools.accumulate(counts.values(), initial=0), strict=False))
    order = (first[id(view)] + i for view in views if id(view) in distinct for i in range(counts[id(view)]))
    return Images(cat_images(pixel_values), torch.cat(sizes), tuple(counts.values()), tuple(order), tuple(seconds))
