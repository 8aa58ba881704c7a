"""All that vogue knows of a model family: names of its parts, image tokens, positions, how its features are laid out.

A model type of transformers has an entry in `FAMILIES`; to add one, see docs/model_families.md. Two ways of seeing
exist so far. Qwen's cuts an image of any size into patches and places its tokens in height and width. LLaVA-OneVision's
resizes to squares, cuts a single image of a prompt into several, and counts its tokens like words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Family:
    """What a model's forward and its image processor take, beyond what all models of transformers have in common."""

    sizes: str  # name of the images' sizes, beside `pixel_values`
    tower: str  # name of the vision tower in `model.model`
    projectors: tuple[str, ...]  # names in `model.model` of what brings its features to the text model
    patches: bool  # pixel_values are (patches, D) of all images; else (images, tiles, 3, height, width)
    grid_positions: bool  # positions (3, B, L) in time, height and width, by token types; else (B, L), counted

    def image_tokens(self, processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens that each of a prompt's images takes, by their (width, height), by a family's own processor."""
        if not self.patches and len(sizes) > 1:  # each is one whole square, and a line end
            return [processor.num_image_tokens + 1] * len(sizes)
        upright = [(height, width) for width, height in sizes]
        return processor._get_num_multimodal_tokens(image_sizes=upright)["num_image_tokens"]

    def tower_inputs(self, sizes: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        """What the vision tower takes beside `pixel_values`, of prompts with `counts` images."""
        given = {self.sizes: sizes}
        return given if self.patches else given | {"batch_num_images": torch.tensor(counts)}

    def blank(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """`pixel_values` and sizes of the smallest images that the tower takes, on the model's device."""
        vision, device = model.config.vision_config, model.device
        if self.patches:
            merge = vision.spatial_merge_size
            patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            sizes = torch.tensor([[1, merge, merge]], device=device)
            return torch.zeros(merge * merge, patch_dim, device=device), sizes
        side = vision.image_size
        # Two, because a single one would be cut into tiles.
        sizes = torch.full((2, 2), side, device=device)
        return torch.zeros(2, 1, vision.num_channels, side, side, device=device), sizes

    def positions(
        self, model: PreTrainedModel, ids: Tensor, types: Tensor, real: Tensor, sizes: Tensor | None
    ) -> Tensor:
        """Positions of the prompts `ids` (B, P) where they are `real` (B, P): (3, B, P) or (B, P)."""
        if self.grid_positions:
            grid = {self.sizes: sizes}
            return model.model.get_rope_index(ids, types, **grid, attention_mask=real)[0]
        return (real.cumsum(dim=1) - 1).clamp(min=0)


QWEN = Family(
    sizes="image_grid_thw",
    tower="visual",
    projectors=("visual.merger", "visual.deepstack_merger_list"),
    patches=True,
    grid_positions=True,
)
LLAVA = Family(
    sizes="image_sizes",
    tower="vision_tower",
    projectors=("multi_modal_projector",),
    patches=False,
    grid_positions=False,
)
FAMILIES = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_5": QWEN,
    "llava_onevision": LLAVA,
}


def family_of(model: PreTrainedModel) -> Family:
    """Raises ValueError for a model type that isn't in `FAMILIES`."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"model type {kind} is not known here; these are: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def family_of_processor(processor: ProcessorMixin) -> Family:
    """The family whose images `processor` prepares, told by the name of their sizes; raises ValueError for others."""
    names = processor.image_processor.model_input_names
    for family in FAMILIES.values():
        if family.sizes in names:
            return family
    raise ValueError(f"{type(processor).__name__} gives {', '.join(names)}, which no family known here takes")
