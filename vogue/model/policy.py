"""The policy: a vision-language model of transformers, read out per token without its logits.

`PolicyHead` takes the place of the output projection *as a module*. It owns the projection's weight, so ZeRO-3's
hooks gather it for the head's forward and backward as for any layer, tied to the embedding or not, and hands it to
the fused operators of `vogue_kernels`: no (tokens x vocabulary) tensor exists. Only the positions that predict a
completion's token reach it.

A row holds one prompt and the completions that share it (see packing). Position i attends to j <= i where j belongs to
the prompt or to i's own completion (see attention), and every completion's positions continue from the prompt's, so
each completion sees exactly what it would see alone. The vision tower sees each distinct image once.

A reference, which `kl` compares the policy with, is a frozen model beside it, or the policy's own without its adapters.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.runtime.zero.utils import is_zero_param
from torch import Tensor, nn
from transformers import PreTrainedModel

from vogue.families import Family, family_of
from vogue.method.kl import Reference
from vogue.method.uncertainty import OtherBranch, TokenStats
from vogue.model.attention import FLEX, IMPLEMENTATIONS, MASKED, OWN, attention_inputs, automatic, layer_masks
from vogue.model.embedding import changed, reading
from vogue.model.lora import without_adapters
from vogue.model.packing import PAD, Batch, Images
from vogue.model.vision import prepare_tower
from vogue.rollout.engine import BAN
from vogue.settings import ConfigError
from vogue_kernels import BranchStats, LogprobStats, linear_branch_stats, linear_logprob


class PolicyHead(nn.Module):
    """Output projection and per-token statistics in one: hidden states (N, D) to results (N,), float32, in nats.

    The distribution is the one that is sampled from, before any truncation: logits divided by `temperature`, `banned`
    tokens excluded.
    keep_logits_bytes: memory within which the trained branch's logits are kept for the backward pass.
    """

    bias: Tensor

    def __init__(self, projection: nn.Linear, temperature: float, banned: Sequence[int], keep_logits_bytes: int = 0):
        super().__init__()
        self.weight = weight = projection.weight
        self.temperature, self.keep_logits_bytes = temperature, keep_logits_bytes
        bias = torch.zeros(projection.out_features, dtype=weight.dtype, device=weight.device)
        bias[list(banned)] = BAN
        self.register_buffer("bias", bias, persistent=False)
        self.perceives = False  # divergences from the first other view have gradients
        self.moves_both = False  # those from degraded views have one through the trained branch, too
        self._reference: list[nn.Parameter] = []  # not registered: it is no part of what is trained and saved

    def set_reference(self, weight: nn.Parameter) -> None:
        """The output projection (V, D') of a reference that has one of its own."""
        self._reference.append(weight)
        if is_zero_param(weight):  # so that it is whole where this module's own are
            register_external_parameter(self, weight)

    def forward(
        self,
        hidden: Tensor,
        others: Sequence[Tensor],
        targets: Tensor,
        reference: Tensor | None = None,
        degraded: Sequence[Tensor] = (),
    ) -> TokenStats:
        """The statistics of N tokens.

        others     hidden states (M, D) of the first M tokens on each view that they are compared with, M falling
        reference  those (N, D') of the reference model; None where nothing reads it
        degraded   as `others`, of the degraded views, with gradient
        """
        found = self._plain(hidden, others, targets, reference)
        held = tuple(OtherBranch(*self._held(view, hidden[: len(view)], targets[: len(view)])) for view in degraded)
        return found._replace(degraded=held)

    def _plain(self, hidden: Tensor, others: Sequence[Tensor], targets: Tensor, reference: Tensor | None) -> TokenStats:
        if reference is not None:
            return self._beside_reference(hidden, others, targets, reference)
        if not others:
            alone = self._alone(hidden, targets, self.keep_logits_bytes)
            return TokenStats(alone.logprob, alone.entropy, ())
        m = len(others[0])
        keep = self.keep_logits_bytes * m // max(len(hidden), 1)
        both = [self._compared(others[0], hidden[:m], targets[:m], keep)]
        # The trained branch's statistics are the first comparison's; further ones send no second gradient.
        both += [self._both(other, hidden[: len(other)].detach(), targets[: len(other)]) for other in others[1:]]
        logprob, entropy = both[0].logprob_q, both[0].entropy_q
        if m < len(hidden):
            alone = self._alone(hidden[m:], targets[m:], self.keep_logits_bytes - keep)
            logprob, entropy = torch.cat([logprob, alone.logprob]), torch.cat([entropy, alone.entropy])
        return TokenStats(logprob, entropy, self._others(both))

    def _beside_reference(
        self, hidden: Tensor, others: Sequence[Tensor], targets: Tensor, reference: Tensor
    ) -> TokenStats:
        """The comparison with the reference is of all tokens, and sends the gradient of all that has one."""
        keep, bias = self.keep_logits_bytes, self.bias
        if self._reference:
            args = reference, hidden, self._reference[0], targets, bias, self.temperature
            found = linear_branch_stats(*args, keep_logits_bytes=keep, weight_q=self.weight, bias_q=bias)
        else:
            found = self._both(reference, hidden, targets, keep)
        both = []
        for i, other in enumerate(others):
            m, trains = len(other), self.perceives and i == 0
            compare = self._compared if trains else self._both
            both.append(compare(other, hidden[:m] if trains else hidden[:m].detach(), targets[:m]))
        compared = Reference(found.logprob_p.detach(), found.kl_qp)
        return TokenStats(found.logprob_q, found.entropy_q, self._others(both), compared)

    def _others(self, both: Sequence[BranchStats]) -> tuple[OtherBranch, ...]:
        return tuple(_other_branch(each, self.perceives and i == 0) for i, each in enumerate(both))

    def _both(self, other: Tensor, hidden: Tensor, targets: Tensor, keep: int = 0) -> BranchStats:
        """Branch p is the other one, q the one that is trained."""
        args = other, hidden, self.weight, targets, self.bias, self.temperature
        return linear_branch_stats(*args, keep_logits_bytes=keep)

    def _compared(self, other: Tensor, hidden: Tensor, targets: Tensor, keep: int = 0) -> BranchStats:
        """The same, with a gradient through the trained branch alone where the other one's states have none.

        Else the divergence's would go through the other branch's logits to the weight that both share.
        """
        if not self.perceives or other.requires_grad:
            return self._both(other, hidden, targets, keep)
        args, bias = (other, hidden, self.weight.detach(), targets, self.bias, self.temperature), self.bias
        return linear_branch_stats(*args, keep_logits_bytes=keep, weight_q=self.weight, bias_q=bias)

    def _held(self, view: Tensor, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """A degraded view, with its gradient, beside the trained branch, which is its target unless both move."""
        if self.moves_both:
            return _branch_values(self._both(view, hidden, targets))
        args = view, hidden.detach(), self.weight, targets, self.bias, self.temperature
        return _branch_values(linear_branch_stats(*args, weight_q=self.weight.detach(), bias_q=self.bias))

    def _alone(self, hidden: Tensor, targets: Tensor, keep: int) -> LogprobStats:
        args = hidden, self.weight, targets, self.bias, self.temperature
        return linear_logprob(*args, keep_logits_bytes=keep)


class Policy(nn.Module):
    """`forward(batch)` gives the statistics of the batch's N completion tokens; but for degraded ones, other views have
    no gradient.

    `reference` is a frozen model of the same family and vocabulary that `forward(batch, refers=True)` compares with, or
    None for the policy's own without its adapters. `perception` says which views divergences have a gradient through:
    None, or "clean", the trained one, or "both"; `robust` the same of degraded views: "view", that one, or "both". With
    `states` the results have the hidden states.

    `attention` is the text model's: one of transformers', or "auto" for `vogue.model.attention.automatic`'s choice of
    those that let completions share a prompt. `why_separate` says why they can't (None where they can); every row must
    then hold one completion. `keep_logits_bytes` is the head's. Raises ValueError for a model type that isn't in
    `vogue.families`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float,
        banned: Sequence[int] = (),
        attention: str = "auto",
        keep_logits_bytes: int = 0,
        reference: PreTrainedModel | None = None,
        perception: str | None = None,
        robust: str = "view",
        states: bool = False,
    ):
        super().__init__()
        self.family = family_of(model)
        if told := self.family.refusal(model.config):
            raise ConfigError(told)
        check_attention(model, attention)
        if attention == "auto":
            attention = "sdpa" if self.family.both_ways else automatic(model.dtype, _head_size(model))
        attention = FLEX if attention == "flex_attention" else attention
        self.why_separate = _why_separate(model, attention)
        if self.why_separate and attention in OWN:
            attention = "sdpa"
        for each in (model, reference) if reference else (model,):
            each.set_attn_implementation({"text_config": attention})
            prepare_tower(each, self.family)
        model.lm_head = PolicyHead(model.lm_head, temperature, banned, keep_logits_bytes)
        model.lm_head.perceives, self._sees_both = perception is not None, perception == "both"
        model.lm_head.moves_both, self._tells_states = robust == "both", states
        if reference:
            model.lm_head.set_reference(reference.lm_head.weight)
        self.model, self.reference = model, reference
        self.attention = attention
        # LLaVA-OneVision's own parameter, read outside of its forward: one of this module's is whole in this one's.
        self.image_newline = getattr(model.model, "image_newline", None)
        self.reference_newline = getattr(reference.model, "image_newline", None) if reference else None

    def forward(self, batch: Batch, refers: bool = False) -> TokenStats:
        """`refers`: compare with the reference, too."""
        with torch.no_grad():
            first = int(self._sees_both)
            others = [self._hidden(other, self.model) for other in batch.others[first:]]
            reference = self._hidden_of_reference(batch) if refers else None
        others = [self._hidden(other, self.model) for other in batch.others[:first]] + others
        degraded = [self._hidden(view, self.model) for view in batch.degraded]
        hidden = self._hidden(batch, self.model)
        stats = self.model.lm_head(hidden, others, batch.targets, reference, degraded)
        return stats._replace(hidden=hidden.detach()) if self._tells_states else stats

    def _hidden_of_reference(self, batch: Batch) -> Tensor:
        if self.reference is not None:
            return self._hidden(batch, self.reference)
        with without_adapters(self.model):
            return self._hidden(batch, self.model)

    def _hidden(self, batch: Batch, model: PreTrainedModel) -> Tensor:
        """Hidden states (N, D) of a model at the positions that predict the completions' tokens."""
        images = batch.images
        # Not on the weights' device: those that are offloaded are elsewhere.
        features = self._features(images or _blank(self.family, model).to(batch.input_ids.device), model)
        inputs = {"input_ids": batch.input_ids, "position_ids": self._positions(batch), "use_cache": False}
        inputs |= self._attention_inputs(batch, inputs["position_ids"], model)
        with reading(model, batch.latent_positions, batch.latents):
            if images is not None:
                output = _see(model.model, _in_order(features, images), inputs)
            else:
                # Under ZeRO-3 every rank must call the same modules in the same order, vision included, and have a
                # gradient for each. So the blank's features come in where images' do: what is behind them has one, too.
                nothing = sum((x.sum() for x in _tensors(features)), torch.zeros((), device=batch.input_ids.device))
                embedding: Any = model.get_input_embeddings()
                with changed(embedding, lambda output: output + 0 * nothing):
                    output = model.model(**inputs)
        return output.last_hidden_state.flatten(0, 1)[batch.positions]

    def _attention_inputs(self, batch: Batch, positions: Tensor, model: PreTrainedModel) -> dict:
        """What lets a token attend to its row's prompt and its own completion alone."""
        both_ways = self.family.both_ways
        if self.why_separate:
            types = self.family.token_inputs(batch.token_types) if both_ways else {}
            return {"attention_mask": (batch.segments != PAD).long(), **types}
        if both_ways:
            window = model.config.text_config.sliding_window
            masks = layer_masks(self.attention, batch.segments, batch.token_types, positions, window)
            return {"attention_mask": masks}
        return attention_inputs(self.attention, batch.segments, model.dtype)

    def _features(self, images: Images, model: PreTrainedModel):
        """What a model's vision tower makes of the images, as the model's own forward takes it."""
        given = self.family.tower_inputs(images.sizes, images.counts)
        pixels = images.pixel_values.to(model.dtype)
        features = model.model.get_image_features(pixels, **given, return_dict=True)
        if layers := features.get("deepstack_features"):  # transformers 5.17 has all images' in one tensor a layer
            lengths = [len(image) for image in features.pooler_output]
            features.deepstack_features = [x.split(lengths) if isinstance(x, Tensor) else x for x in layers]
        return features

    def _positions(self, batch: Batch) -> Tensor:
        """Positions of the prompt's tokens, each completion counting on from there."""
        images = batch.images
        prompt = batch.segments == 0
        sizes, videos, seconds = None, None, []
        if images is not None:
            sizes, videos = images.sizes[images.of_kind(video=False)], images.video_sizes
            seconds = [cast(float, images.seconds[i]) for i in images.of_kind(video=True)]
        in_prompt = self.family.positions(
            self.model, batch.input_ids, batch.token_types, prompt, sizes, videos, seconds
        )
        last = in_prompt.masked_fill(~prompt, -1).view(-1, *prompt.shape).amax(dim=(0, 2))  # (B,)
        index = torch.arange(batch.segments.shape[1], device=batch.segments.device).expand_as(batch.segments)
        begins = torch.ones_like(prompt)
        begins[:, 1:] = batch.segments[:, 1:] != batch.segments[:, :-1]
        start = index.masked_fill(~begins, 0).cummax(dim=1).values
        return torch.where(prompt, in_prompt, last[:, None] + 1 + index - start)


def _other_branch(both: BranchStats, with_gradient: bool) -> OtherBranch:
    return OtherBranch(*(value if with_gradient else value.detach() for value in _branch_values(both)))


def _branch_values(both: BranchStats) -> tuple[Tensor, ...]:
    """What an `OtherBranch` has of both, where p is the other one."""
    return both.logprob_p, both.entropy_p, both.kl_qp, both.kl_pq, both.symmetric_kl


def _head_size(model: PreTrainedModel) -> int:
    text = model.config.text_config
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def check_attention(model: PreTrainedModel, attention: str) -> None:
    """Raise `ConfigError` where `model.attention` can't be had: a token of an image attends to later ones by a mask."""
    if family_of(model).both_ways and attention not in ("auto", "flex_attention", "eager", *MASKED):
        raise ConfigError(
            f"model.attention={attention}: it takes no mask, by which tokens of an image attend to each other in "
            f"{model.config.model_type}; there are auto, sdpa, flex_attention and eager"
        )


def _why_separate(model: PreTrainedModel, attention: str) -> str | None:
    """Why a model's rows can't share a prompt, if they can't."""
    if kinds := family_of(model).unmasked_layers(model.config.text_config):
        return f"{model.config.model_type} has layers of {', '.join(kinds)}"
    if attention not in IMPLEMENTATIONS:
        return f"{attention} attention takes no mask of that kind"
    return None


def _blank(family: Family, model: PreTrainedModel) -> Images:
    """The smallest input of the vision tower, as of a single prompt."""
    pixel_values, sizes = family.blank(model)
    return Images(pixel_values, sizes, (len(sizes),), tuple(range(len(sizes))), (None,) * len(sizes))


def _see(body: nn.Module, features: dict[str, Any], inputs: dict):
    """The body's forward with features of images ("image") and of videos ("video") in their place.

    The forward of transformers 5.17 has no argument for features: it would take theirs for any other keyword, and leave
    the images out in silence. It takes pixels, and asks the model's own `get_image_features` for what the vision tower
    makes of them; here that answers with what the tower has made of them.
    """
    if "mm_encoder_outputs" in inspect.signature(body.forward).parameters:
        return body(**inputs, mm_encoder_outputs=dict(features))
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
    for kind, found in features.items():
        if layers := found.get("deepstack_features"):
            found.deepstack_features = [torch.cat(layer) for layer in layers]
        setattr(body, f"get_{kind}_features", lambda *_, found=found, **__: found)
    try:
        return body(**inputs, **{pixels[kind]: found.pooler_output[0] for kind, found in features.items()})
    finally:
        for kind in features:
            delattr(body, f"get_{kind}_features")


def _in_order(features, images: Images) -> dict[str, Any]:
    """`features` by kind, with those of the i-th image or video of the rows in the i-th place.

    Those that appear twice were computed once.
    """
    by_kind = {"image": images.of_kind(video=False), "video": images.of_kind(video=True)}
    if by_kind["image"] == list(range(len(images.sizes))):
        return {"image": features}
    return {kind: _picked(features, order, images.sizes) for kind, order in by_kind.items() if order}


def _picked(features, order: Sequence[int], sizes: Tensor):
    """A copy of `features` with those that `order` names."""
    chosen, found = copy.copy(features), features.pooler_output
    if isinstance(found, Tensor):  # (tiles, S, D), as many of each image as its size says
        tiles = found.split(sizes.tolist())
        chosen.pooler_output = torch.cat([tiles[i] for i in order])
    else:
        chosen.pooler_output = tuple(found[i] for i in order)
    if "deepstack_features" in features:
        chosen.deepstack_features = [tuple(layer[i] for i in order) for layer in features.deepstack_features]
    return chosen


def _tensors(features) -> list[Tensor]:
    return [*features.pooler_output, *(x for layer in features.get("deepstack_features") or () for x in layer)]
