"""Qwen2.5-VL's real shapes, with random weights and the tokens of a tiny model."""

from pathlib import Path

import torch

LAYERS_3B = (36, 32)  # of the text model and of the vision tower


def qwen_config(wide: bool, layers: int = 2, vision_layers: int = 2):
    """Qwen2.5-VL-3B's widths, with as many layers as are asked for, or a tiny model's."""
    from transformers import Qwen2_5_VLConfig

    size, heads, of_keys, inner, vocab = (2048, 16, 2, 11008, 151_936) if wide else (128, 4, 2, 256, 512)
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16} if wide else {}
    half = size // heads // 2
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": size,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": of_keys,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8],
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": vision_layers,
            **(vision or {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2}),
            "out_hidden_size": size,
            # Of 32 layers the 3B's own: 7, 15, 23 and 31 look at the whole image, the others at windows.
            "fullatt_block_indexes": list(range(7, vision_layers, 8)) or [vision_layers - 1],
        },
        tie_word_embeddings=True,
    )


def widen(folder: Path, layers: int = 2, vision_layers: int = 2) -> None:
    """Put a model of a 3B's widths, in bfloat16, in the place of the tiny one in a folder; its tokens stay."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config, tiny = qwen_config(True, layers, vision_layers), Qwen2_5_VLConfig.from_pretrained(folder)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(tiny, name))
    for name in ("eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tiny.text_config, name))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # made in it: in float32 first, a 3B would be 15 GB
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = tiny.text_config.eos_token_id
    model.save_pretrained(folder)
