"""A scorer of descriptions for `reward.scorer`: the cosine of image and text by a model of CLIP's kind.

    reward: {scorer: {function: "vogue.rewards.similarity:clip", options: {model: FOLDER}}}

It runs in a process of its own, on the CPU unless `device` says otherwise, and loads the model at its first call.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

BATCH = 32  # texts at a time
PADDED: dict[str, Any] = {"return_tensors": "pt", "padding": True, "truncation": True}


def clip(completions: Sequence[str], samples: Sequence[dict], model: str, device: str = "cpu") -> list[float]:
    """The cosine of each text and the first image of its sample, from -1 to 1; a longer text is cut to what fits.

    model  folder or hub name of a model with image and text features, as transformers' AutoModel loads it

    Raises ValueError for a sample without an image.
    """
    network, processor = _loaded(model, device)
    found: list[float] = []
    for start in range(0, len(completions), BATCH):
        texts, chosen = completions[start : start + BATCH], samples[start : start + BATCH]
        with torch.inference_mode():
            inputs = processor(text=list(texts), images=[_image(sample) for sample in chosen], **PADDED).to(device)
            output = network(**inputs)
        found += cosine_similarity(output.image_embeds, output.text_embeds).tolist()
    return found


@functools.cache
def _loaded(model: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    return AutoModel.from_pretrained(model).eval().to(device), AutoProcessor.from_pretrained(model)


def _image(sample: dict) -> Image.Image:
    if not sample["images"]:
        raise ValueError(f"the sample with the answer {sample['answer']!r} has no image to compare with")
    return Image.open(sample["images"][0]).convert("RGB")
