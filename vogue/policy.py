"""The policy: a vision-language model of transformers, read out per token without its logits.

`PolicyHead` takes the place of the output projection *as a module*. It owns the projection's weight, so ZeRO-3's
hooks gather it for the head's forward and backward as for any layer, tied to the embedding or not, and hands it to
the fused operators of `vogue_kernels`: no (tokens x vocabulary) tensor exists. Only the positions that predict a
completion's token reach it.

A row holds one prompt and the completions that share it (`vogue.packing`). Position i attends to j <= i where j
belongs to the prompt or to i's own completion, and every completion's positions continue from the prompt's, so each
completion sees exactly what it would see alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vogue.inputs import View
from vogue.packing import PAD, Batch
from vogue.rollout import BAN
from vogue_kernels import BranchStats, LogprobStats, linear_branch_stats, linear_logprob

# Models whose rows may share a prompt: causal attention in every layer, which takes a prepared mask, and multimodal
# rotary positions from the model's own `get_rope_index`.
SHARED_PREFIX_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Of transformers' attention functions, this one takes a boolean (B, 1, L, L) mask: "eager" would add it to the scores.
SHARED_PREFIX_ATTENTION = "sdpa"


class PolicyHead(nn.Module):
    """Output projection and per-token statistics in one: hidden states (N, D) to results (N,), float32, in nats.

    The distribution is the one that is sampled from: logits divided by `temperature`, `banned` tokens excluded.
    """

    def __init__(self, projection: nn.Linear, temperature: float, banned: Sequence[int]):
        super().__init__()
        self.weight = projection.weight
        self.temperature = temperature
        bias = torch.zeros(projection.out_features, dtype=projection.weight.dtype)
        bias[list(banned)] = BAN
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden: Tensor, other: Tensor | None, targets: Tensor) -> BranchStats | LogprobStats:
        """Statistics of the behaviour branch alone, or of both: `other` raw, `hidden` noisy."""
        if other is None:
            return linear_logprob(hidden, self.weight, targets, self.bias, self.temperature)
        return linear_branch_stats(other, hidden, self.weight, targets, self.bias, self.temperature)


class Policy(nn.Module):
    """`forward(batch)` gives the statistics of the batch's N completion tokens.

    Rows of the noisy branch get `BranchStats`: gradient flows through the noisy branch, and the raw one is computed
    without. Rows of the raw branch get `LogprobStats`.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, banned: Sequence[int] = ()):
        super().__init__()
        model.lm_head = PolicyHead(model.lm_head, temperature, banned)
        self.model = model

    def forward(self, batch: Batch) -> BranchStats | LogprobStats:
        other = None
        if batch.other is not None:
            with torch.no_grad():
                other = self._hidden(batch, batch.other)
        return self.model.lm_head(self._hidden(batch, batch.view), other, batch.targets)

    def _hidden(self, batch: Batch, view: View) -> Tensor:
        """Hidden states (N, D) at the positions that predict the completions' tokens."""
        body, length = self.model.model, batch.input_ids.shape[1]
        if view.grid_thw is None:
            batch, view = self._with_blank_image(batch)
        inputs = {"input_ids": batch.input_ids, "mm_token_type_ids": batch.token_types, "use_cache": False}
        inputs |= {"pixel_values": view.pixel_values, "image_grid_thw": view.grid_thw}
        if supports_shared_prefix(self.model):
            inputs |= {
                "attention_mask": shared_prefix_mask(batch.segments),
                "position_ids": shared_prefix_positions(body, batch, view),
            }
        else:
            inputs |= {"attention_mask": (batch.segments != PAD).long()}
        hidden = body(**inputs).last_hidden_state[:, :length]
        return hidden.flatten(0, 1)[batch.positions]

    def _with_blank_image(self, batch: Batch) -> tuple[Batch, View]:
        """`batch` with one more column of padding, which holds an image token in the first row, and its image.

        Nothing attends to it. Under ZeRO-3 every rank must call the same modules in the same order, vision included.
        """
        config, vision = self.model.config, self.model.config.vision_config
        merge = vision.spatial_merge_size
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, merge, merge]], device=batch.input_ids.device)
        is_image = torch.zeros_like(batch.input_ids[:, :1])
        is_image[0] = 1
        columns = {"input_ids": config.image_token_id * is_image, "token_types": is_image}
        columns["segments"] = torch.full_like(is_image, PAD)
        batch = replace(batch, **{name: torch.cat([getattr(batch, name), c], dim=1) for name, c in columns.items()})
        return batch, View((), torch.zeros(merge * merge, patch_dim, device=grid.device), grid)


def supports_shared_prefix(model: PreTrainedModel) -> bool:
    attention = model.config._attn_implementation
    return model.config.model_type in SHARED_PREFIX_MODELS and attention == SHARED_PREFIX_ATTENTION


def shared_prefix_mask(segments: Tensor) -> Tensor:
    """(B, L) segments to a (B, 1, L, L) boolean mask, true where attention is allowed.

    Padding attends to padding, so that no row of the softmax is empty.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (causal & ((key == query) | ((key == 0) & (query != PAD))))[:, None]


def shared_prefix_positions(body: nn.Module, batch: Batch, view: View) -> Tensor:
    """(3, B, L) rotary positions: the model's own for the prompt, each completion counting on from there."""
    prompt = batch.segments == 0
    in_prompt, _ = body.get_rope_index(
        batch.input_ids, batch.token_types, image_grid_thw=view.grid_thw, attention_mask=prompt
    )
    last = in_prompt.masked_fill(~prompt, -1).amax(dim=(0, 2))  # (B,)
    index = torch.arange(batch.segments.shape[1], device=batch.segments.device).expand_as(batch.segments)
    begins = torch.ones_like(prompt)
    begins[:, 1:] = batch.segments[:, 1:] != batch.segments[:, :-1]
    start = index.masked_fill(~begins, 0).cummax(dim=1).values
    in_completion = last[:, None] + 1 + index - start
    return torch.where(prompt, in_prompt, in_completion)
