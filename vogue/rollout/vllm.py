"""vLLM generates in the trainer's own process: one engine a rank, or one that `rollout.tensor_parallel` ranks share.

The engine is given prompts as the policy reads them: whole token ids, and the image features that the trainer has made
already, so that no image is preprocessed twice and the two can't disagree about one.

Ranks that share an engine each hold a part of every layer and run the same schedule: they pool their prompts, generate
all of them together, and each keeps the completions of its own.

With `rollout.sleep` the engine has memory for the rollout alone:

    generate            weights and KV cache
    sleep               neither, while the policy trains
    load_weights        the weights, which all come anew; the KV cache from the next `generate` on
"""

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion

from vogue import distributed
from vogue.config import Config
from vogue.data.videos import Clip
from vogue.families import family_of_processor
from vogue.inputs import Prompt, Spans, View
from vogue.rollout.engine import BAN, Completion, Request, media_token_ids
from vogue.rollout.sampling import Sampling, until_stop
from vogue.run.memory import check_images, longest_sequence
from vogue.settings import ConfigError

# Read by vLLM when it is imported: run in this process, and leave OpenMP's threads to the trainer, which shares them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("vllm").addHandler(logging.NullHandler())  # it warns before it has read that level

try:
    import vllm
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.inputs import EngineInput, mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
except ImportError as error:
    raise ImportError(
        f"rollout.engine=vllm needs vLLM ({error}): install vogue[cpu] or vogue[gpu], or set rollout.engine=hf"
    ) from error

CPU_BATCHED_TOKENS = 4096  # of prompts that vLLM takes in at once
LARGE = 1e9  # bytes of weights, whose pages cost less to fault in again than to keep beside them
SETTINGS = {  # of vogue, for what vLLM would be told otherwise
    "model": "model.path",
    "dtype": "model.dtype",
    "max_model_len": "data.max_prompt_tokens and rollout.max_tokens",
    "seed": "seed",
    "gpu_memory_utilization": "rollout.memory",
    "kv_cache_memory_bytes": "rollout.kv_cache_gb",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "enable_sleep_mode": "rollout.sleep",
}
WEIGHTS, KV_CACHE = "weights", "kv_cache"  # vLLM's names of what it wakes


def check_engine_args(config: Config) -> None:
    """Raise `ConfigError` for one of `rollout.engine_args` that vLLM doesn't know, or that vogue decides."""
    known, fixed = {field.name for field in dataclasses.fields(vllm.EngineArgs)}, _fixed(config)
    for name, value in config.rollout.engine_args.items():
        if name in SETTINGS or name in fixed or "parallel" in name:  # a rank is one worker
            instead = SETTINGS.get(name, "none: the training relies on it")
            raise ConfigError(f"rollout.engine_args.{name}={value}: vogue sets this; the setting is {instead}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"rollout.engine_args.{name}={value}: vLLM has no such argument{meant}")


def check_sleep(config: Config) -> None:
    """Raise `ConfigError` where `rollout.sleep` is asked of a platform that vLLM can't free memory on."""
    if config.rollout.sleep and not current_platform.is_sleep_mode_available():
        raise ConfigError(
            f"rollout.sleep=true: vLLM can't put its memory to sleep on this platform, {current_platform.device_type}; "
            "leave it unset"
        )


def _fixed(config: Config) -> dict[str, Any]:
    """What vLLM is started with in any case."""
    return {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "max_model_len": longest_sequence(config),
        # Of the distribution that is sampled from: after temperature, banned tokens, and min_p, top_k and top_p.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # not the checkpoint's own top-k and top-p
        "limit_mm_per_prompt": {"video": 0},
        # As vLLM does it by itself, every rank would take the first GPU.
        "distributed_executor_backend": "external_launcher" if "LOCAL_RANK" in os.environ else None,
        "mm_device_do_normalize": False,  # pixels come normalised, not as bytes
        "tensor_parallel_size": config.rollout.tensor_parallel,
        "enable_sleep_mode": config.rollout.sleep,
        "seed": config.seed,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Prefill in chunks would rewind a seeded request's generator, which a CPU's can't do.
        **({} if torch.cuda.is_available() else {"enable_chunked_prefill": False}),
    }


def _talk_by_gloo() -> None:
    """Let ranks that share an engine on a CPU talk through torch.distributed.

    vLLM's own channel is shared memory under one name for all runs on a machine, which outlives the run that made it:
    the next run would find it there and fail.
    """
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def _forget_experts(model: torch.nn.Module) -> None:
    """Let vLLM's kernels of experts be made anew with the next weights.

    Those of a CPU hold weights in an order of their own, into which vLLM brings them where it makes the kernel alone:
    later weights it would take as they come, and compute with the wrong ones, without a word.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # pyright: ignore[reportOptionalMemberAccess]


class VllmEngine:
    """A `vogue.rollout.engine.Engine` on vLLM.

    `model` is the one whose weights the engine is to follow; None where it keeps the checkpoint's.
    """

    def __init__(self, config: Config, processor: ProcessorMixin, model: PreTrainedModel | None):
        check_sleep(config)
        check_images(family_of_processor(processor))
        on_gpu = torch.cuda.is_available()
        platform: dict[str, Any] = {"gpu_memory_utilization": config.rollout.memory}
        if not on_gpu:
            platform = {
                "kv_cache_memory_bytes": int(config.rollout.kv_cache_gb * 1e9),
                "enforce_eager": True,
                "max_num_batched_tokens": max(longest_sequence(config), CPU_BATCHED_TOKENS),
            }
            _talk_by_gloo()
        arguments = _fixed(config) | {"enable_prefix_caching": True, **platform, **config.rollout.engine_args}
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        self.llm = vllm.LLM(**arguments)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a stub in its place, and serves with fewer
        torch.set_num_threads(threads)
        distributed.give_back_freed_memory()  # its copies of the weights, of which loading makes two
        # A few of vLLM's sampling helpers are torch.compile'd; on a CPU compiling them takes longer than a short run.
        self._stance = contextlib.nullcontext if on_gpu else lambda: torch.compiler.set_stance("force_eager")
        self._banned = {token: BAN for token in media_token_ids(processor)}
        self._tokenizer = processor.tokenizer
        self._family = family_of_processor(processor)
        self._image_token = torch.tensor(self._family.image_token_id(processor))
        if self._family.videos:
            self._merged_frames: int = processor.video_processor.temporal_patch_size  # pyright: ignore
        self._request_ids = map(str, itertools.count())  # vLLM hands results out in their order
        self._model: Any = model
        self._sleeps = config.rollout.sleep
        self._asleep: set[str] = set()  # WEIGHTS, KV_CACHE: what has no memory at present
        shared = config.rollout.tensor_parallel
        self._group = distributed.neighbours(shared, config.trainer.timeout) if shared > 1 else None
        self._received = 0  # bytes of weights, in the last sync
        self.version = 0

    def generate(self, requests: list[Request], n: int, sampling: Sampling) -> list[list[Completion]]:
        if WEIGHTS in self._asleep:
            raise RuntimeError("vLLM sleeps, and its weights are gone: load_weights must come before generate")
        self._wake(KV_CACHE)
        prompts = [(self._input(request), request.seed) for request in requests]
        pools = [prompts] if self._group is None else distributed.gather(prompts, self._group)
        with self._stance():
            for prompt, seed in itertools.chain(*pools):
                parameters = vllm.SamplingParams(
                    n=n,
                    seed=seed,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    min_p=sampling.min_p,
                    max_tokens=sampling.max_tokens,
                    stop=list(sampling.stop),
                    include_stop_str_in_output=True,
                    logprobs=0,
                    flat_logprobs=True,
                    # It decodes token by token, and each log-probability's token again: where strings are looked for.
                    detokenize=bool(sampling.stop),
                    logit_bias=self._banned,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                self.llm.llm_engine.add_request(next(self._request_ids), prompt, parameters)
            outputs: list[Any] = self.llm.wait_for_completion(use_tqdm=False)  # vLLM's RequestOutput
        if self._group is not None:
            outputs = self._own(outputs, pools)
        return [
            [self._completion(item, request.prompt.opened, sampling) for item in output.outputs]
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _own(self, outputs: list[Any], pools: list[list]) -> list[Any]:
        """This rank's part of what the ranks of its group have generated together."""
        # Each rank samples for itself what all of them continue: had one drawn other tokens, all would be wrong.
        sampled = hash(tuple(tuple(item.token_ids) for output in outputs for item in output.outputs))
        if len(set(distributed.gather(sampled, self._group))) > 1:
            raise RuntimeError("the ranks that share an engine of vLLM have sampled different tokens")
        place = dist.get_rank(self._group)
        start = sum(map(len, pools[:place]))
        return outputs[start : start + len(pools[place])]

    def _input(self, request: Request) -> EngineInput:
        """Make vLLM's input: the prompt with its images' features, as vLLM's own preprocessing would give them.

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
        given: Any = {"pixel_values": view.pixel_values, sizes: view.sizes}
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
        given: Any = {"pixel_values_videos": view.video_pixel_values, "video_grid_thw": view.video_sizes}
        whole = self._family.videos == "whole"
        if whole:  # places in time, which of the others their times in text tell
            seconds = [clip.interval * self._merged_frames for clip in view.clips]
            given["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float64)
            fields["second_per_grid_ts"] = one_by_one
        digests = [_digest(clip) for clip in view.clips]
        spans = [PlaceholderRange(*runs[0]) if whole else _placeholder(runs) for runs in prompt.video_spans]
        return fields, given, {"video": digests}, {"video": spans}

    def _completion(self, output: Any, opened: str, sampling: Sampling) -> Completion:
        # vLLM's CompletionOutput. Flat: of each position the sampled token's alone, since no other was asked for.
        token_ids, logprobs = tuple(output.token_ids), output.logprobs
        if logprobs.token_ids != list(token_ids):
            raise RuntimeError("vLLM's log-probabilities are of other tokens than it sampled")
        text = opened + until_stop(self._tokenizer.decode(token_ids, skip_special_tokens=True), sampling.stop)
        return Completion(token_ids, tuple(logprobs.logprobs), text, output.finish_reason == "stop")

    def sleep(self) -> None:
        """With `rollout.sleep`, give the memory of weights and KV cache away until the next `load_weights`."""
        if self._sleeps:
            self.llm.sleep(level=2)  # which drops the weights: all of them come anew
            self._asleep = {WEIGHTS, KV_CACHE}

    def _wake(self, part: str) -> None:
        """Take the memory of WEIGHTS or KV_CACHE back, if it was given away."""
        if part in self._asleep:
            torch.cuda.empty_cache()  # what the trainer has freed, and its allocator would keep from vLLM
            self.llm.wake_up([part])
            self._asleep.remove(part)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the trainer's weights, streamed, and mark them as those of update `version`."""
        self._wake(WEIGHTS)
        if not torch.cuda.is_available():
            self.llm.apply_model(_forget_experts)
        self._received = 0
        with self._stance():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._as_in_checkpoint(weights)})
        if self._received > LARGE:  # vLLM held a copy of them meanwhile
            distributed.give_back_freed_memory()
        # What was computed with the old weights: keys and values, and image embeddings. The worker has dropped its
        # own part of the image caches; the scheduler's must go too, or it counts on entries that are gone.
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.update_weight_version(str(version))
        self.version = int(self.llm.get_weight_version())

    def _as_in_checkpoint(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Rename weights as the checkpoint does, which vLLM can read; transformers' names may differ."""
        tied = self._model.config.tie_word_embeddings
        for name, tensor in weights:
            self._received += tensor.nbytes
            yield from revert_weight_conversion(self._model, {name: tensor}).items()
            # vLLM packs a tied head's weight apart from the embedding; unless it is sent too, it silently stays old.
            if tied and name.endswith("embed_tokens.weight"):
                yield from revert_weight_conversion(self._model, {"lm_head.weight": tensor}).items()


def _placeholder(runs: Spans) -> PlaceholderRange:
    """vLLM's place of a video whose tokens lie in these runs, with text between them.

    vLLM looks for the mark before each run from the place's beginning on, so that the first one's is part of it.
    """
    start, end = runs[0][0] - 1, sum(runs[-1])
    embedded = torch.zeros(end - start, dtype=torch.bool)
    for first, count in runs:
        embedded[first - start : first - start + count] = True
    return PlaceholderRange(start, end - start, embedded)


def _digest(clip: Clip) -> str:
    """What tells a video's features from others': its pixels, size and pace."""
    found = hashlib.blake2b(f"{clip.frames[0].size} {clip.interval}".encode())
    for frame in clip.frames:
        found.update(frame.tobytes())
    return found.hexdigest()
