"""A small Qwen2.5-VL of the real architecture, made from nothing.

Everything a checkpoint on the hub has is here, only smaller: a byte-level BPE tokenizer with Qwen's special
tokens, a chat template, the image processor, and `Qwen2_5_VLForConditionalGeneration` with a tied head. The
folder loads with `from_pretrained` and in vLLM as it is, so the trainer need not know that it is small.
"""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

TOKEN_PIXELS = 28  # a side: patches of 14 pixels, merged two by two into one token
# Qwen's base and sections give an image's columns the slowest frequencies, in which two tokens side by side hardly
# differ; a small model learns left from right only with faster ones.
ROPE = {"rope_theta": 20.0, "mrope_section": [2, 2, 12]}
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor(
    corpus: Iterable[str],
    vocab_size: int = 512,
    min_tokens: int = 2,
    pixel_mean: float = 0.5,
    pixel_std: float = 0.5,
    more_tokens: Sequence[str] = (),
) -> Qwen2_5_VLProcessor:
    """Tokenizer trained on `corpus` (at most `vocab_size` tokens) beside Qwen's own image processor.

    `min_tokens` is the least number of image tokens: a smaller image is enlarged to it. Pixels in [0, 1] are
    normalised by their mean and standard deviation. `more_tokens` are special ones beside Qwen's.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL_TOKENS, *more_tokens]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size, new_special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    size = {"shortest_edge": min_tokens * TOKEN_PIXELS**2, "longest_edge": 1280 * TOKEN_PIXELS**2}
    pixels = {"size": size, "image_mean": [pixel_mean] * 3, "image_std": [pixel_std] * 3}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: Qwen2_5_VLProcessor, hidden_size: int = 128, layers: int = 4, vision_layers: int = 2
) -> Qwen2_5_VLForConditionalGeneration:
    """Randomly initialised (torch's global generator) float32 model for `processor`'s vocabulary."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    heads, vision_size = hidden_size // 32, hidden_size // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 32) * 32,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(heads // 2, 1),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", **ROPE},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_size,
            "intermediate_size": 2 * vision_size,
            "num_heads": heads // 2,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [vision_layers - 1],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.float32)  # pyright: ignore[reportArgumentType]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model
