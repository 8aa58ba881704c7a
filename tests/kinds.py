"""Every family of models, small: configurations, random images and processors."""

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vConfig,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vogue.families import FAMILIES
from vogue.inputs import View

IMAGE, VIDEO, START, END = 1, 2, 3, 4  # token ids
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 5,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
SHARED_EXPERTS = {
    "use_qk_norm": False,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
TILE = 28  # pixels a side: 2 x 2 patches
SQUARE = 56  # of InternVL and Gemma 3: 4 x 4 patches, 4 tokens
PINPOINTS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]]
SQUARES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOW = 5  # tokens of Gemma 3's layers of sliding windows


def config_of(kind):
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
        return Qwen2VLConfig(text_config=TEXT, vision_config=vision, **QWEN_TOKENS)
    if kind == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"fullatt_block_indexes": [1], "patch_size": 14}
        return Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **QWEN_TOKENS)
    if kind in ("qwen3_vl", "qwen3_vl_moe"):
        vision = QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]}
        if kind == "qwen3_vl_moe":
            return Qwen3VLMoeConfig(text_config=TEXT | EXPERTS, vision_config=vision, **QWEN_TOKENS)
        return Qwen3VLConfig(text_config=TEXT, vision_config=vision, **QWEN_TOKENS)
    if kind == "qwen3_5":
        linear = {f"linear_{name}_head_dim": 16 for name in ("key", "value")}
        linear |= {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
        text = TEXT | linear | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        return Qwen3_5Config(text_config=text, vision_config=QWEN3_VISION, **QWEN_TOKENS)
    if kind in ("glm4v", "glm4v_moe"):
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"image_size": SQUARE, "patch_size": 14}
        text = TEXT | {"rope_parameters": rope, "tie_word_embeddings": False}
        tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START}
        if kind == "glm4v_moe":
            return Glm4vMoeConfig(text_config=text | SHARED_EXPERTS, vision_config=vision, **tokens)
        return Glm4vConfig(text_config=text, vision_config=vision, **tokens)
    if kind == "gemma3":
        rope = {name: {"rope_type": "default"} for name in ("full_attention", "sliding_attention")}
        text = TEXT | {"rope_parameters": rope, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}
        text |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        vision = SQUARES | {"image_size": SQUARE, "patch_size": 14, "vision_use_head": False}
        tokens = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
        return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    text = {name: value for name, value in TEXT.items() if name not in ("head_dim", "rope_parameters")}
    text["model_type"] = "qwen2"
    if kind == "internvl":
        vision = SQUARES | {"image_size": SQUARE, "patch_size": 14}
        return InternVLConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=4, tie_word_embeddings=False
        )
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=SQUARES | {"model_type": "siglip_vision_model", "image_size": TILE, "patch_size": 14},
        image_grid_pinpoints=PINPOINTS,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def view_of(kind, size):
    """A random image, small or large; the large one is cut into two tiles beside the whole, where a family cuts."""
    generator = torch.Generator().manual_seed(size)
    if kind == "llava_onevision":
        pixels = torch.randn(1, 1 + size, 3, TILE, TILE, generator=generator)
        return View((), pixels, torch.tensor([[TILE, size * TILE]]))
    if kind in ("internvl", "gemma3"):
        tiles = {"internvl": 2 * size - 1, "gemma3": 1}[kind]
        return View((), torch.randn(tiles, 3, SQUARE, SQUARE, generator=generator), torch.tensor([tiles]))
    patch = config_of(kind).vision_config.patch_size
    pixels = torch.rand(2 * size * 4, 3 * 2 * patch**2, generator=generator)
    return View((), pixels, torch.tensor([[1, 2 * size, 4]]))


def inputs_of(model, view):
    """What the model's own forward takes of a view."""
    given = FAMILIES[model.config.model_type].tower_inputs(view.sizes, [len(view.sizes)])
    return {"pixel_values": view.pixel_values.to(model.dtype), **given}


def fill(model, scale):
    """Larger weights, so that entropies and log-probabilities are worth comparing, and none that are all zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                if not parameter.any():  # Gemma 3's projection, InternVL's positions
                    parameter.normal_(std=0.02)
                parameter.mul_(scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of GLM-4.5V's routers
                buffer.uniform_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


# --------------------------------------------------------------------------------------------------------- processors

TOKENS = {  # of the families whose tokenizer has other ones than Qwen's: their names in it, and what they read
    "internvl": {
        **{"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
        "video_token": "<video>",
    },
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "glm4v": {"image_token": "<|image|>", "video_token": "<|video|>"},
}
WRITTEN = {"internvl": "<IMG_CONTEXT>\n", "gemma3": "<start_of_image>"}  # by the chat template, for an image
WRITTEN["glm4v"] = "<|begin_of_image|><|image|><|end_of_image|>"
TOKENS["glm4v_moe"], WRITTEN["glm4v_moe"] = TOKENS["glm4v"], WRITTEN["glm4v"]


def processor_of(kind, tokenizer, chat_template):
    """A family's own processor, with the tokenizer of another one, which gets the tokens that the family has."""
    if kind in TOKENS:
        chat_template = chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", WRITTEN[kind])
        tokens = list(dict.fromkeys([*FAMILIES[kind].marks, *TOKENS[kind].values()]))
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
        tokenizer.add_tokens(
            ["\n" * n for n in range(1, 5)] if kind == "gemma3" else []
        )  # Gemma's are tokens of their own
        tokenizer._set_model_specific_special_tokens(TOKENS[kind])  # as a published tokenizer_config.json names them
    square = {"height": SQUARE, "width": SQUARE}
    if kind == "internvl":
        images = GotOcr2ImageProcessor(size=square, max_patches=3)
        video = InternVLVideoProcessor(size=square)
        return InternVLProcessor(images, tokenizer, video, image_seq_length=4, chat_template=chat_template)
    if kind == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessor(size=square), tokenizer, chat_template, image_seq_length=4)
    if kind == "llava_onevision":
        pixels = {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": PINPOINTS}
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(**pixels),
            tokenizer,
            LlavaOnevisionVideoProcessor(),
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            chat_template=chat_template,
        )
    third = kind in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")
    patch = 16 if third else 14
    pixels = {"size": {"shortest_edge": 2 * (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}}
    pixels["patch_size"] = patch
    if kind.startswith("glm4v"):
        video = Glm4vVideoProcessor(**pixels)
        return Glm4vProcessor(Glm4vImageProcessor(**pixels), tokenizer, video, chat_template=chat_template)
    whole, video = Qwen2VLProcessor, Qwen2VLVideoProcessor
    if third:
        whole, video = Qwen3VLProcessor, Qwen3VLVideoProcessor
    return whole(Qwen2VLImageProcessor(**pixels), tokenizer, video(**pixels), chat_template=chat_template)


def model_of(kind, processor):
    """A random float32 model for the vocabulary of a family's own processor."""
    config, tokenizer = config_of(kind), processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    config.text_config.vocab_size = len(tokenizer)
    if kind.startswith("qwen3_vl"):  # as in the published configurations; transformers does so whatever they say
        config.text_config.rope_parameters["mrope_interleaved"] = True
    config.text_config.eos_token_id, config.text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.image_token_id = FAMILIES[kind].image_token_id(processor)
    if kind == "llava_onevision":
        config.image_token_index = config.image_token_id
        config.video_token_id = config.video_token_index = token_id("<|video_pad|>")
    elif kind.startswith("glm4v"):
        config.video_token_id = processor.video_token_id
        for name in ("image_start", "image_end", "video_start", "video_end"):
            what, _, place = name.partition("_")
            mark = f"<|{'begin' if place == 'start' else place}_of_{what}|>"
            setattr(config, f"{name}_token_id", token_id(mark))
    elif kind not in TOKENS:
        config.video_token_id = token_id("<|video_pad|>")
        config.vision_start_token_id = token_id("<|vision_start|>")
        config.vision_end_token_id = token_id("<|vision_end|>")
    torch.manual_seed(0)
    return fill(AutoModelForImageTextToText.from_config(config), 4)


def save_as_published(kind, model, folder):
    """Under the names of the checkpoints on the hub, a part of which transformers drops, and in their layout."""
    model.save_pretrained(folder)
    if kind not in ("llava_onevision", "gemma3", "qwen3_vl_moe"):
        return
    file = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    if kind == "qwen3_vl_moe":
        weights = {k: v.transpose(1, 2).contiguous() if ".mlp.experts." in k else v for k, v in weights.items()}
    else:
        weights = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
