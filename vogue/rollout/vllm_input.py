"""What vLLM is given, whether it runs in the trainer's process or as a server: arguments, prompts, sampling, weights.

A prompt is given as the policy reads it: whole token ids, and the image features that the trainer has made already, so
that no image is preprocessed twice and the two can't disagree about one.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion

from vogue.config import Config
from vogue.data.videos import Clip
from vogue.families import family_of_processor
from vogue.inputs import Prompt, Spans, View
from vogue.rollout.engine import Request
from vogue.rollout.sampling import Sampling
from vogue.run.memory import longest_sequence

# Read by vLLM when it is imported: run in this process, and leave OpenMP's threads to the trainer, which shares them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("vllm").addHandler(logging.NullHandler())  # it warns before it has read that level

try:
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item, encode_mm_kwargs_item
    from vllm.inputs import EngineInput, mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
except ImportError as error:
    raise ImportError(
        f"rollout.engine=vllm and rollout.engine=server need vLLM ({error}): install vogue's extra cpu or gpu, or set "
        "rollout.engine=hf"
    ) from error

FEATURES = "mm_kwargs"  # vLLM's name of what it computes an image from
CPU_BATCHED_TOKENS = 4096  # of prompts that vLLM takes in at once


def fixed_arguments(config: Config) -> dict[str, Any]:
    """What vLLM is started with in any case, by the names of its engine's arguments."""
    return {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "max_model_len": longest_sequence(config),
        # Of the distribution that is sampled from: after temperature, banned tokens, and min_p, top_k and top_p.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # not the checkpoint's own top-k and top-p
        "limit_mm_per_prompt": {"video": 0},
        "mm_device_do_normalize": False,  # pixels come normalised, not as bytes
        "tensor_parallel_size": config.rollout.tensor_parallel,
        "enable_sleep_mode": config.rollout.sleep,
        "seed": config.seed,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Prefill in chunks would rewind a seeded request's generator, which a CPU's can't do.
        **({} if torch.cuda.is_available() else {"enable_chunked_prefill": False}),
    }


def engine_arguments(config: Config) -> dict[str, Any]:
    """All that vLLM is started with: what is fixed, what the machine asks for, and `rollout.engine_args`."""
    platform: dict[str, Any] = {"gpu_memory_utilization": config.rollout.memory}
    if not torch.cuda.is_available():
        platform = {
            "kv_cache_memory_bytes": int(config.rollout.kv_cache_gb * 1e9),
            "enforce_eager": True,
            "max_num_batched_tokens": max(longest_sequence(config), CPU_BATCHED_TOKENS),
        }
    return fixed_arguments(config) | {"enable_prefix_caching": True, **platform, **config.rollout.engine_args}


def sampling_arguments(sampling: Sampling, n: int, seed: int, banned: dict[int, float]) -> dict[str, Any]:
    """vLLM's sampling parameters for `n` completions of a request, by their names; `banned` is added to logits."""
    return {
        "n": n,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "logprobs": 0,
        # It decodes token by token, and each log-probability's token again: where strings are looked for.
        "detokenize": bool(sampling.stop),
        "logit_bias": banned,
    }


class PromptInputs:
    """Makes vLLM's input of a request; its pixels in `dtype`, the one of the weights, which vLLM gives them anyway."""

    def __init__(self, processor: ProcessorMixin, dtype: torch.dtype = torch.float32):
        self._family = family_of_processor(processor)
        self._image_token = torch.tensor(self._family.image_token_id(processor))
        self._dtype = dtype
        if self._family.videos:
            self._merged_frames: int = processor.video_processor.temporal_patch_size  # pyright: ignore

    def of(self, request: Request) -> EngineInput:
        """The prompt with its images' and videos' features, as vLLM's own preprocessing would give them.

        vLLM keeps what it computes of an image and of a prompt's beginning under a digest of the pixels.
        """
        prompt, view = request.prompt, request.view
        token_ids = prompt.token_ids.tolist()
        if not view.shown:
            return tokens_input(token_ids)
        parts: tuple[Any, ...] = self._of_images(prompt, view)
        fields, given, digests, spans = parts
        for mine, more in zip((fields, given, digests, spans), self._of_videos(prompt, view), strict=True):
            mine |= more
        return mm_input(token_ids, MultiModalKwargsItems.from_hf_inputs(given, fields), digests, spans)

    def _of_images(self, prompt: Prompt, view: View) -> tuple[dict, dict, dict, dict]:
        """vLLM's fields, tensors, digests and places of the images."""
        if view.pixel_values is None or view.sizes is None:
            return {}, {}, {}, {}
        sizes, one_by_one = self._family.engine_sizes, MultiModalFieldConfig.batched
        counts = self._family.pixel_counts(view.sizes)
        pixels = one_by_one("image") if counts is None else MultiModalFieldConfig.flat_from_sizes("image", counts)
        fields = {"pixel_values": pixels, sizes: one_by_one("image", keep_on_cpu=True)}
        given: Any = {"pixel_values": view.pixel_values.to(self._dtype), sizes: view.sizes}
        if token := self._family.engine_token:
            fields[token] = MultiModalFieldConfig.shared("image", len(view.sizes), keep_on_cpu=True)
            given[token] = self._image_token
        several = len(view.images) > 1  # LLaVA-OneVision cuts the same image into tiles where it is the only one
        heads = [f"{image.size} {several}".encode() for image in view.images]
        digests = [hashlib.blake2b(h + x.tobytes()).hexdigest() for h, x in zip(heads, view.images, strict=True)]
        spans = [PlaceholderRange(*span) for span in prompt.image_spans]
        return fields, given, {"image": digests}, {"image": spans}

    def _of_videos(self, prompt: Prompt, view: View) -> tuple[dict, dict, dict, dict]:
        """The same of the videos."""
        if view.video_pixel_values is None or view.video_sizes is None:
            return {}, {}, {}, {}
        one_by_one = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        patches = MultiModalFieldConfig.flat_from_sizes("video", view.video_sizes.prod(-1))
        fields = {"pixel_values_videos": patches, "video_grid_thw": one_by_one}
        pixels = view.video_pixel_values.to(self._dtype)
        given: Any = {"pixel_values_videos": pixels, "video_grid_thw": view.video_sizes}
        whole = self._family.videos == "whole"
        if whole:  # places in time, which of the others their times in text tell
            seconds = [clip.interval * self._merged_frames for clip in view.clips]
            given["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float64)
            fields["second_per_grid_ts"] = one_by_one
        digests = [_digest(clip) for clip in view.clips]
        spans = [PlaceholderRange(*runs[0]) if whole else _placeholder(runs) for runs in prompt.video_spans]
        return fields, given, {"video": digests}, {"video": spans}


def _placeholder(runs: Spans) -> PlaceholderRange:
    """vLLM's place of a video whose tokens lie in these runs, with text between them.

    vLLM looks for the mark before each run from the place's beginning on, so that the first one's is part of it.
    """
    start, end = runs[0][0] - 1, sum(runs[-1])
    embedded = torch.zeros(end - start, dtype=torch.bool)
    for first, count in runs:
        embedded[first - start : first - start + count] = True
    return PlaceholderRange(start, end - start, embedded)


def encoded(given: EngineInput) -> dict[str, Any]:
    """An input as text, numbers and places: vLLM writes the features of images and videos as it does for servers."""
    plain: dict[str, Any] = dict(given)
    if features := plain.get(FEATURES):
        plain[FEATURES] = {kind: list(map(encode_mm_kwargs_item, items)) for kind, items in features.items()}
    return plain


def decoded(plain: dict[str, Any]) -> EngineInput:
    """The input that `encoded` was given."""
    given: Any = dict(plain)
    if features := plain.get(FEATURES):
        items = {kind: list(map(decode_mm_kwargs_item, texts)) for kind, texts in features.items()}
        given[FEATURES] = MultiModalKwargsItems(items)
    return given


def _digest(clip: Clip) -> str:
    """What tells a video's features from others': its pixels, size and pace."""
    found = hashlib.blake2b(f"{clip.frames[0].size} {clip.interval}".encode())
    for frame in clip.frames:
        found.update(frame.tobytes())
    return found.hexdigest()


def as_in_checkpoint(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Rename weights as the model's checkpoint does, which vLLM can read; transformers' names may differ."""
    tied = model.config.tie_word_embeddings
    for name, tensor in weights:
        yield from revert_weight_conversion(model, {name: tensor}).items()
        # vLLM packs a tied head's weight apart from the embedding; unless it is sent too, it silently stays old.
        if tied and name.endswith("embed_tokens.weight"):
            yield from revert_weight_conversion(model, {"lm_head.weight": tensor}).items()
