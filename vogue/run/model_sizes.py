"""What a plan of memory reckons with: a model's sizes, from its config.json alone, and a run's layout over its ranks.

`sizes_of` reads a model, `vogue.run.plan.layout_of` a run's settings; `vogue.run.phase_memory` is arithmetic on both.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vogue.config import Config
from vogue.families import family_of
from vogue.model.files import configured_model
from vogue.model.lora import whole_parameters
from vogue.model.optimizer import SUB_GROUP
from vogue.model.reference import reference_path
from vogue.run.memory import (
    adapter_count,
    attending_layers,
    cache_bytes,
    checkpoint_bytes,
    weight_count,
    weights_on_disk,
)

# DeepSpeed's own where `trainer.deepspeed` has none: weights of a bucket of gradients, and gathered at a time.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Blocks:
    """Equal layers of a transformer, in elements: the text model's or the vision tower's."""

    layers: int
    attending: int  # of these, layers whose keys and values the engine's cache holds
    hidden: int
    query: int  # heads x their size
    key: int  # heads of keys x their size
    key_heads: int
    inner: int  # width of the MLP; of experts, the widths of all that a token goes through
    gated: bool  # the MLP has a gate beside what it gates
    rms: bool  # norms are RMSNorm, which transformers computes in float32 by parts; else LayerNorm, in one operator
    head_norms: bool  # queries and keys have norms of their own
    norms: int = 2  # of a layer, beside those
    routed: int = 0  # experts that a token goes through, each with a copy of it; 0: one MLP


@dataclass(frozen=True)
class Sizes:
    """A model's weights, counted, and the shapes of its parts."""

    weights: int  # of the whole model without adapters, tied ones once
    trained: int  # of those and the adapters
    vision_trained: bool
    adapters: int
    largest: int  # weights of its largest parameter
    vocabulary: int
    text: Blocks
    tower: Blocks
    patches: int  # of an image, that become one token
    patch: int  # values of a patch's pixels
    token_pixels: int  # of an image, that become one token
    token_cache: int  # bytes of a token's keys and values
    checkpoint: int  # bytes
    saved: int  # bytes of its weights as transformers or PEFT reads them, which rank 0 copies to its memory first
    reference: int = 0  # weights of a frozen model beside it
    least_image: int = 1  # tokens of the smallest image
    shares_prompt: bool = True  # completions can share a row with their prompt


@dataclass(frozen=True)
class Layout:
    """How a run lays a model and its tokens over `ranks`. Sizes in bytes, lengths in tokens."""

    ranks: int
    nodes: int
    on_gpu: bool
    memory: float  # of one GPU; without GPUs a rank's share of its machine's memory
    item: int  # a weight
    grad_item: int  # an accumulated gradient
    stage: int  # of ZeRO
    offload_optimizer: bool
    offload_params: bool
    adapters: bool
    save_merged: bool
    checkpointing: bool
    repeats_keys: bool  # attention holds keys and values once for every head of the queries
    liger: bool
    kept_logits: float
    engine: str
    engine_share: float  # of a GPU's memory, for vLLM
    kv_cache: float  # of vLLM without a GPU
    tensor_parallel: int
    sleep: bool
    prompts: int  # of a rank in a step
    updates: int
    n: int
    replayed: int  # stored completions that are trained on with a group's n
    compares: bool  # a second forward of another view, without gradient
    prompt: int  # the longest
    image: int  # of the prompt, tokens of images
    completion: int  # the longest
    budget: int  # trainer.micro_batch_tokens
    shared_prefix: bool
    steps: int
    keep: int
    refers: bool = False  # one more forward, by a reference
    moving: int = 0  # further views in a forward with gradient
    bucket: int = BUCKET  # weights
    sub_group: int = SUB_GROUP
    live: int = LIVE

    @property
    def longest(self) -> int:
        """Tokens of a longest prompt and its completion."""
        return self.prompt + self.completion

    @property
    def shards(self) -> int:
        """Ranks that a weight is divided over."""
        return self.ranks if self.stage == 3 else 1

    @property
    def trained(self) -> int:
        """Completions of a prompt that are trained on."""
        return self.n + self.replayed

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of the largest micro-batch, and completions of each, where all are as long as they may be."""
        fitting = max(1, (self.budget - self.prompt) // self.completion) if self.shared_prefix else 1
        completions = min(self.trained, fitting)
        made = -(-self.prompts // self.updates) * -(-self.trained // completions)
        return max(1, min(made, self.budget // (self.prompt + completions * self.completion))), completions

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        rows, completions = self.rows
        return rows * (self.prompt + completions * self.completion)

    @property
    def predicted(self) -> int:
        """Those of its tokens that reach the head."""
        rows, completions = self.rows
        return rows * completions * self.completion


def sizes_of(model: PreTrainedModel, config: Config) -> Sizes:
    """The sizes of a model, on the meta device say, with its adapters where `lora` has some."""
    whole: Any = model.model
    outer: Any = model.config
    family = family_of(model)
    tower, seen = getattr(whole, family.tower), family.seen(outer)
    text, vision = outer.get_text_config(), outer.vision_config
    counts = [weight.parameter.numel() for weight in whole_parameters(model)]
    adapters = adapter_count(model)
    frozen = weight_count(tower) if config.model.freeze_vision else 0
    return Sizes(
        weights=sum(counts),
        trained=adapters or sum(counts) - frozen,
        vision_trained=config.lora.vision if config.lora.on else not config.model.freeze_vision,
        adapters=adapters,
        largest=max(counts),
        vocabulary=text.vocab_size,
        text=_text_blocks(text, whole.language_model),
        tower=_tower_blocks(vision, tower, family.inner),
        patches=seen.patches,
        patch=getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * seen.side**2,
        token_pixels=seen.patches * seen.side**2,
        least_image=seen.least,
        shares_prompt=not family.unmasked_layers(text),
        token_cache=cache_bytes(text, config),
        checkpoint=checkpoint_bytes(model, config),
        reference=weight_count(configured_model(path)) if (path := reference_path(config)) else 0,
        saved=weights_on_disk(model, config),
    )


def _text_blocks(text: Any, module: Any) -> Blocks:
    layer: nn.Module = module.layers[0]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None) or 0  # that a token goes through
    expert = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return Blocks(
        layers=text.num_hidden_layers,
        attending=attending_layers(text),
        hidden=text.hidden_size,
        query=text.num_attention_heads * head,
        key=text.num_key_value_heads * head,
        key_heads=text.num_key_value_heads,
        inner=(experts + getattr(text, "n_shared_experts", 0)) * expert if experts else text.intermediate_size,
        **_kinds(module),
        norms=sum(type(part).__name__.endswith("Norm") for part in layer.children()),
        routed=experts,
    )


def _tower_blocks(vision: Any, module: nn.Module, width: str) -> Blocks:
    """Of a vision tower, whose configurations have several names for the same."""
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL's hidden_size is the text model's
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    inner = getattr(vision, width, None) or int(hidden * vision.mlp_ratio)
    return Blocks(layers, layers, hidden, hidden, hidden, 1, inner, **_kinds(module))


def _kinds(module: nn.Module) -> dict[str, bool]:
    names = {name.rpartition(".")[2] for name, _ in module.named_modules()}
    rms = any(type(part).__name__.endswith("RMSNorm") for part in module.modules())
    gated = bool(names & {"gate_proj", "gate_up_proj", "experts"})
    return {"gated": gated, "rms": rms, "head_norms": "q_norm" in names}
