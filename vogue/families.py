"""All that vogue knows of a model family: names of its parts, image tokens, positions, how its features are laid out.

A model type of transformers has an entry in `FAMILIES`; to add one, see docs/model_families.md. There are three ways
of seeing. Qwen's and GLM's cuts an image of any size into patches and places its tokens in height and width.
LLaVA-OneVision's resizes to squares, cuts a single image of a prompt into several, and counts its tokens like words.
InternVL's does so too, with every image, and has the squares of all images in one line; Gemma 3's has one square an
image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin


class Seen(NamedTuple):
    """How a family's tower sees, for a plan of memory."""

    patches: int  # that become one token
    side: int  # of a patch, in pixels
    least: int  # tokens of the smallest image


@dataclass(frozen=True)
class Family:
    """What a model's forward and its image processor take, beyond what all models of transformers have in common."""

    processors: tuple[str, ...]  # names of the classes of transformers that prepare its prompts
    sizes: str  # name of the images' sizes, which the image processor gives beside `pixel_values`
    engine_sizes: str  # vLLM's name of them
    tower: str  # name of the vision tower in `model.model`
    projectors: tuple[str, ...]  # names in `model.model` of what brings its features to the text model
    marks: tuple[str, ...]  # tokens that stand around an image's or a video's in a prompt
    inner: str = "intermediate_size"  # name of the width of the tower's MLPs in its configuration
    engine_token: str | None = None  # vLLM's name of the image token, where it is to be given with the images
    # How a prompt holds a video: its tokens in a row, or those of each two frames behind their time; "": it takes none.
    videos: Literal["", "whole", "in_frames"] = ""

    patches: ClassVar[bool] = False  # pixel_values are (patches, D) of all images
    grid_positions: ClassVar[bool] = False  # positions (3, B, L) in time, height and width; else (B, L), counted
    # Kinds of layers that a mask can tell what to attend to, so that completions share a prompt.
    masked_layers: ClassVar[tuple[str, ...]] = ("full_attention",)
    # An image's tokens attend to all of their image, later ones too: attention takes a mask for every kind of layer.
    both_ways: ClassVar[bool] = False

    def image_token_id(self, processor: Any) -> int:
        """The token that a prompt has for each of an image's."""
        return processor.image_token_id

    def frame(self, processor: Any) -> str | None:
        """What takes the place of the image token that a chat template writes, where that isn't the token itself."""
        return None

    def image_tokens(self, processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens that each of a prompt's images takes, by their (width, height), by a family's own processor."""
        return _counted(processor, sizes)["num_image_tokens"]

    def video_text(self, processor: Any, times: Sequence[float]) -> str:
        """What takes the place of the video token that a chat template writes, for frames at these seconds."""
        raise NotImplementedError

    def video_tokens(self, processor: Any, frames: int, size: tuple[int, int]) -> list[int]:
        """Tokens of each of a video's placeholders in that text, by its number of frames and their (width, height)."""
        raise NotImplementedError

    def video_options(self, processor: Any) -> Mapping[str, Any]:
        """What the video processor is told beside the frames."""
        return {}

    def image_options(self, processor: Any) -> Mapping[str, Any]:
        """What the image processor is told by the processor that it is part of."""
        return {}

    def view_sizes(self, features: Mapping[str, Tensor]) -> Tensor:
        """The images' sizes (images, ...) int64 among what the image processor gives."""
        return features[self.sizes]

    def pixel_counts(self, sizes: Tensor) -> Tensor | None:
        """How many of the first dimension of `pixel_values` are each image's (images,); None where it is one."""
        raise NotImplementedError

    def tower_inputs(self, sizes: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        """What the vision tower takes beside `pixel_values`, of prompts with `counts` images."""
        raise NotImplementedError

    def token_inputs(self, types: Tensor) -> dict[str, Tensor]:
        """What the model's own forward takes of tokens' types (B, L), 1 at image tokens, beside positions."""
        return {}

    def blank(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """`pixel_values` and sizes of the smallest images that the tower takes, on the model's device."""
        raise NotImplementedError

    def positions(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        types: Tensor,
        real: Tensor,
        sizes: Tensor | None,
        video_sizes: Tensor | None = None,
        seconds: Sequence[float] = (),
    ) -> Tensor:
        """Positions of the prompts `ids` (B, P) where they are `real` (B, P): (3, B, P) or (B, P).

        sizes        of their images, in order
        video_sizes  of their videos, in order, and `seconds` between two frames of each
        """
        return (real.cumsum(dim=1) - 1).clamp(min=0)

    def unmasked_layers(self, text: Any) -> list[str]:
        """Kinds of a text model's layers that no mask tells what to attend to, by its configuration."""
        return sorted({*(getattr(text, "layer_types", None) or ["full_attention"])} - {*self.masked_layers})

    def seen(self, config: Any) -> Seen:
        """What a token of an image stands for, by the model's configuration."""
        raise NotImplementedError

    def refusal(self, config: Any) -> str | None:
        """Why a model of this configuration isn't trained, if it isn't."""
        return None


@dataclass(frozen=True)
class Patched(Family):
    """Qwen's and GLM's: patches of images of any size, whose tokens have places in height and width."""

    patches: ClassVar[bool] = True
    grid_positions: ClassVar[bool] = True

    def pixel_counts(self, sizes: Tensor) -> Tensor:
        return sizes.prod(-1)

    def tower_inputs(self, sizes: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        return {self.sizes: sizes}

    def token_inputs(self, types: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": types}

    def blank(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        vision, device = model.config.vision_config, model.device
        merge = vision.spatial_merge_size
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        sizes = torch.tensor([[1, merge, merge]], device=device)
        return torch.zeros(merge * merge, patch_dim, device=device), sizes

    def video_text(self, processor: Any, times: Sequence[float]) -> str:
        token = processor.video_token
        if self.videos == "whole":
            return token
        merged = processor.video_processor.temporal_patch_size
        padded = [*times, *times[-1:] * (-len(times) % merged)]
        parts = [padded[i : i + merged] for i in range(0, len(padded), merged)]
        around = f"{processor.vision_start_token}{token}{processor.vision_end_token}"
        return "".join(f"<{(part[0] + part[-1]) / 2:.1f} seconds>{around}" for part in parts)

    def video_tokens(self, processor: Any, frames: int, size: tuple[int, int]) -> list[int]:
        maker = processor.video_processor
        width, height = size
        options = {"cap_pixels_per_frame": False}
        tokens = maker.get_num_of_video_patches(frames, height, width, options) // maker.merge_size**2
        places = -(-frames // maker.temporal_patch_size)
        return [tokens] if self.videos == "whole" else [tokens // places] * places

    def video_options(self, processor: Any) -> Mapping[str, Any]:
        # Where transformers has such a cap: `data.video_max_pixels` is what bounds a frame here.
        return {"cap_pixels_per_frame": False} if hasattr(processor.video_processor, "cap_pixels_per_frame") else {}

    def positions(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        types: Tensor,
        real: Tensor,
        sizes: Tensor | None,
        video_sizes: Tensor | None = None,
        seconds: Sequence[float] = (),
    ) -> Tensor:
        if video_sizes is None:
            whole: Any = model.model
            return whole.get_rope_index(ids, types, **{self.sizes: sizes}, attention_mask=real)[0]
        vision: Any = model.config.vision_config
        grids = {1: iter(_grids(sizes)), 2: iter(_grids(video_sizes))}
        if self.videos == "in_frames":
            grids[2] = iter([(1, height, width) for time, height, width in _grids(video_sizes) for _ in range(time)])
        paces = iter(each * vision.temporal_patch_size * getattr(vision, "tokens_per_second", 1) for each in seconds)
        found = torch.zeros(3, *ids.shape, dtype=torch.long)
        for row, of_row in enumerate(real.bool().cpu()):
            parts, start = [], 0
            for kind, run in groupby(types[row].cpu()[of_row].tolist()):
                if kind == 0:
                    here = torch.arange(len(list(run))).expand(3, -1)
                else:
                    steps = next(paces) if kind == 2 and self.videos == "whole" else 1.0
                    here = _places(next(grids[kind]), vision.spatial_merge_size, steps)
                parts.append(here + start)
                # transformers lets what follows a video begin as if it had one frame: positions would come twice.
                start = int(parts[-1].max()) + 1
            found[:, row, of_row] = torch.cat(parts, dim=1)
        return found.to(ids.device)

    def seen(self, config: Any) -> Seen:
        return Seen(config.vision_config.spatial_merge_size**2, config.vision_config.patch_size, 1)

    def refusal(self, config: Any) -> str | None:
        text = config.get_text_config()
        if config.model_type != "qwen3_vl_moe":
            return None
        inner = text.moe_intermediate_size
        if text.hidden_size in (inner, 2 * inner):  # nothing tells which of an expert's sides is which
            return f"hidden_size={text.hidden_size} and moe_intermediate_size={inner} make experts' weights square"
        if not getattr(text, "norm_topk_prob", True):
            return "norm_topk_prob=false isn't supported: transformers' experts have weights that sum to 1 all the same"
        return None


@dataclass(frozen=True)
class Padded(Family):
    """LLaVA-OneVision's: `pixel_values` (images, tiles, 3, height, width), of a single image of a prompt several."""

    def image_tokens(self, processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
        if len(sizes) > 1:  # each is one whole square, and a line end
            return [processor.num_image_tokens + 1] * len(sizes)
        return super().image_tokens(processor, sizes)

    def pixel_counts(self, sizes: Tensor) -> None:
        return None

    def tower_inputs(self, sizes: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        return {self.sizes: sizes, "batch_num_images": torch.tensor(counts)}

    def blank(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        vision, device = model.config.vision_config, model.device
        side = vision.image_size
        # Two, because a single one would be cut into tiles.
        sizes = torch.full((2, 2), side, device=device)
        return torch.zeros(2, 1, vision.num_channels, side, side, device=device), sizes

    def seen(self, config: Any) -> Seen:
        return Seen(1, config.vision_config.patch_size, 1)


@dataclass(frozen=True)
class Tiled(Family):
    """InternVL's: `pixel_values` (tiles, 3, height, width) of all images, and as sizes how many are each image's.

    The chat template writes one token for an image; the processor puts others around it.
    """

    def frame(self, processor: Any) -> str | None:
        return f"{processor.start_image_token}{processor.image_token}{processor.end_image_token}"

    def image_tokens(self, processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
        # Not the processor's number of tokens: it counts those around them.
        return [processor.image_seq_length * tiles for tiles in _counted(processor, sizes)["num_image_patches"]]

    def image_options(self, processor: Any) -> Mapping[str, Any]:
        return processor.valid_processor_kwargs._defaults["images_kwargs"]

    def pixel_counts(self, sizes: Tensor) -> Tensor:
        return sizes

    def tower_inputs(self, sizes: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        return {}

    def blank(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        vision, device = model.config.vision_config, model.device
        side = _side(vision.image_size)
        sizes = torch.ones(1, dtype=torch.long, device=device)
        return torch.zeros(1, vision.num_channels, side, side, device=device), sizes

    def seen(self, config: Any) -> Seen:
        merged, side = int(1 / config.downsample_ratio) ** 2, _side(config.vision_config.patch_size)
        return Seen(merged, side, (_side(config.vision_config.image_size) // side) ** 2 // merged)


@dataclass(frozen=True)
class Gemma(Tiled):
    """Gemma 3's: one square an image, whose tokens attend to each other, and layers of sliding windows in turns."""

    masked_layers: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")
    both_ways: ClassVar[bool] = True

    def image_token_id(self, processor: Any) -> int:
        return processor.tokenizer.image_token_id  # the processor's own is the one that the chat template writes

    def frame(self, processor: Any) -> str | None:
        tokenizer = processor.tokenizer
        return f"\n\n{tokenizer.boi_token}{tokenizer.image_token}{tokenizer.eoi_token}\n\n"

    def view_sizes(self, features: Mapping[str, Tensor]) -> Tensor:
        return features[self.sizes] + 1  # crops are counted beside the whole image

    def token_inputs(self, types: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": types}

    def seen(self, config: Any) -> Seen:
        vision, tokens = config.vision_config, config.mm_tokens_per_image
        return Seen(max(1, (vision.image_size // vision.patch_size) ** 2 // tokens), vision.patch_size, tokens)

    def refusal(self, config: Any) -> str | None:
        text = config.get_text_config()
        for name in ("final_logit_softcapping", "use_bidirectional_attention"):
            # transformers' model with images ignores the first, and vLLM heeds it.
            if value := getattr(text, name, None):
                return f"{name}={value} isn't supported: Gemma 3's published models have none"
        return None


QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>")
QWEN2 = Patched(
    processors=("Qwen2VLProcessor",),
    sizes="image_grid_thw",
    engine_sizes="image_grid_thw",
    tower="visual",
    projectors=("visual.merger", "visual.deepstack_merger_list"),
    marks=QWEN_MARKS,
)
QWEN2_5 = replace(QWEN2, processors=("Qwen2_5_VLProcessor",), videos="whole")
QWEN3 = replace(QWEN2, processors=("Qwen3VLProcessor",), videos="in_frames")
GLM = Patched(
    processors=("Glm4vProcessor",),
    sizes="image_grid_thw",
    engine_sizes="image_grid_thw",
    tower="visual",
    projectors=("visual.merger",),
    marks=tuple(f"<|{place}_of_{what}|>" for place in ("begin", "end") for what in ("image", "video")),
    inner="out_hidden_size",
)
LLAVA = Padded(
    processors=("LlavaOnevisionProcessor",),
    sizes="image_sizes",
    engine_sizes="image_sizes",
    tower="vision_tower",
    projectors=("multi_modal_projector",),
    marks=QWEN_MARKS,  # its tokenizer is one of Qwen's
)
INTERNVL = Tiled(
    processors=("InternVLProcessor",),
    sizes="num_patches",
    engine_sizes="image_num_patches",
    tower="vision_tower",
    projectors=("multi_modal_projector",),
    marks=("<img>", "</img>"),
    engine_token="image_token_id",
)
GEMMA = Gemma(
    processors=("Gemma3Processor",),
    sizes="num_crops",
    engine_sizes="num_patches",
    tower="vision_tower",
    projectors=("multi_modal_projector",),
    marks=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2_5,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_5": QWEN3,
    "llava_onevision": LLAVA,
    "internvl": INTERNVL,
    "gemma3": GEMMA,
    "glm4v": GLM,
    "glm4v_moe": GLM,
}


def family_of(model: PreTrainedModel) -> Family:
    """Raises ValueError for a model type that isn't in `FAMILIES`."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"model type {kind} is not known here; these are: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def family_of_processor(processor: ProcessorMixin) -> Family:
    """The family whose prompts `processor` prepares, told by its class; raises ValueError for others."""
    names = {kind.__name__ for kind in type(processor).__mro__}
    for family in FAMILIES.values():
        if names & {*family.processors}:
            return family
    known = ", ".join(dict.fromkeys(name for family in FAMILIES.values() for name in family.processors))
    raise ValueError(f"{type(processor).__name__} is of no family known here; their processors are: {known}")


def _counted(processor: Any, sizes: Sequence[tuple[int, int]]) -> Any:
    """What a processor counts of images of these (width, height), without their pixels."""
    return processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])


def _grids(sizes: Tensor | None) -> list[tuple[int, int, int]]:
    return [] if sizes is None else [tuple(grid) for grid in sizes.tolist()]


def _places(grid: tuple[int, int, int], merge: int, pace: float) -> Tensor:
    """(3, tokens) places in time, height and width of a grid of patches (T, H, W); places in time are `pace` apart."""
    time, height, width = grid
    places = torch.cartesian_prod(torch.arange(time), torch.arange(height // merge), torch.arange(width // merge))
    places = places.view(-1, 3).T.clone()
    places[0] = (places[0].double() * pace).long()
    return places


def _side(lengths: Any) -> int:
    """Pixels of a square's side, which some configurations give twice."""
    return lengths if isinstance(lengths, int) else lengths[0]
