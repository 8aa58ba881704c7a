"""vLLM generates in the trainer's own process: one engine a rank, or one that `rollout.tensor_parallel` ranks share.

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
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vogue import distributed
from vogue.config import Config
from vogue.families import family_of_processor
from vogue.rollout.engine import BAN, Completion, Request, media_token_ids
from vogue.rollout.sampling import Sampling, until_stop
from vogue.rollout.vllm_input import (
    EngineInput,
    PlaceholderRange,
    PromptInputs,
    as_in_checkpoint,
    decoded,
    encoded,
    engine_arguments,
    fixed_arguments,
    sampling_arguments,
)
from vogue.run.memory import check_images
from vogue.settings import ConfigError

import vllm  # isort: skip  # behind vllm_input, which sets what vLLM reads when it is imported
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator  # isort: skip
from vllm.platforms import current_platform  # isort: skip
from vllm.sampling_params import RequestOutputKind  # isort: skip

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
Seeded = tuple[EngineInput, int]  # a prompt, and its seed
WEIGHTS, KV_CACHE = "weights", "kv_cache"  # vLLM's names of what it wakes


def check_engine_args(config: Config) -> None:
    """Raise `ConfigError` for one of `rollout.engine_args` that vLLM doesn't know, or that vogue decides."""
    known, fixed = {field.name for field in dataclasses.fields(vllm.EngineArgs)}, fixed_arguments(config) | _launch()
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


def _launch() -> dict[str, Any]:
    """How vLLM takes its place among the ranks: as it does it by itself, every rank would take the first GPU."""
    return {"distributed_executor_backend": "external_launcher" if "LOCAL_RANK" in os.environ else None}


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
        if not on_gpu:
            _talk_by_gloo()
        arguments = engine_arguments(config) | _launch()
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        self.llm = vllm.LLM(**arguments)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a stub in its place, and serves with fewer
        torch.set_num_threads(threads)
        distributed.give_back_freed_memory()  # its copies of the weights, of which loading makes two
        # A few of vLLM's sampling helpers are torch.compile'd; on a CPU compiling them takes longer than a short run.
        self._stance = contextlib.nullcontext if on_gpu else lambda: torch.compiler.set_stance("force_eager")
        self._banned = {token: BAN for token in media_token_ids(processor)}
        self._tokenizer = processor.tokenizer
        self._inputs = PromptInputs(processor)
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
        pools = self._pools([(self._inputs.of(request), request.seed) for request in requests])
        with self._stance():
            for prompt, seed in itertools.chain(*pools):
                given = sampling_arguments(sampling, n, seed, self._banned)
                parameters = vllm.SamplingParams(**given, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)
                self.llm.llm_engine.add_request(next(self._request_ids), prompt, parameters)
            outputs: list[Any] = self.llm.wait_for_completion(use_tqdm=False)  # vLLM's RequestOutput
        if self._group is not None:
            outputs = self._own(outputs, pools)
        return [
            [self._completion(item, request.prompt.opened, sampling) for item in output.outputs]
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _pools(self, own: list[Seeded]) -> list[list[Seeded]]:
        """The prompts and seeds of every rank of this one's group, in order of rank."""
        if self._group is None:
            return [own]
        sent = [(encoded(prompt), seed) for prompt, seed in own]
        parts = distributed.gather(sent, PlaceholderRange, group=self._group)
        return [[(decoded(prompt), seed) for prompt, seed in part] for part in parts]

    def _own(self, outputs: list[Any], pools: list[list[Seeded]]) -> list[Any]:
        """This rank's part of what the ranks of its group have generated together."""
        # Each rank samples for itself what all of them continue: had one drawn other tokens, all would be wrong.
        sampled = hash(tuple(tuple(item.token_ids) for output in outputs for item in output.outputs))
        if len(set(distributed.gather(sampled, group=self._group))) > 1:
            raise RuntimeError("the ranks that share an engine of vLLM have sampled different tokens")
        place = dist.get_rank(self._group)
        start = sum(map(len, pools[:place]))
        return outputs[start : start + len(pools[place])]

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

    def up_to_date(self) -> bool:
        """Always: nobody else gives this engine weights."""
        return True

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the trainer's weights, streamed, and mark them as those of update `version`."""
        self._wake(WEIGHTS)
        if not torch.cuda.is_available():
            self.llm.apply_model(_forget_experts)
        self._received = 0
        with self._stance():
            sent = as_in_checkpoint(self._model, self._counted(weights))
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": sent})
        if self._received > LARGE:  # vLLM held a copy of them meanwhile
            distributed.give_back_freed_memory()
        # What was computed with the old weights: keys and values, and image embeddings. The worker has dropped its
        # own part of the image caches; the scheduler's must go too, or it counts on entries that are gone.
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.update_weight_version(str(version))
        self.version = int(self.llm.get_weight_version())

    def _counted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self._received += tensor.nbytes
            yield name, tensor
