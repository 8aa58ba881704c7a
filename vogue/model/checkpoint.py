"""Checkpoints: a Hugging Face folder to use, and DeepSpeed's shards to go on from.

    output_dir/checkpoints/step_000020/hf          config, tokenizer, image processor, model.safetensors
    output_dir/checkpoints/step_000020/deepspeed   optimizer and master weights of every rank
    output_dir/checkpoints/step_000020/run/0.pt    the run's state of rank 0, of each rank one
    output_dir/checkpoints/step_000020/state.json  step and number of ranks

A checkpoint is written beside its place and renamed when it is whole, so that a stop in the middle leaves the one
before it. Everything random in a run (order of data, perturbation, branch draws, sampling) is a function of the seed
and the step, so no generator's state needs saving; `vogue.state` holds what isn't.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from vogue.settings import ConfigError
from vogue.state import RunState

STATE = "state.json"
RUN = "run"


def gathered_weights(model: torch.nn.Module, byte_budget: int = 256 << 20) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `model` whole, gathered by at most `byte_budget` bytes at a time on every rank.

    All ranks must exhaust the iterator. A tied parameter comes once, under its first name.
    """
    chunk: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in model.named_parameters():
        bytes_needed = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if chunk and size + bytes_needed > byte_budget:
            yield from _gather(chunk)
            chunk, size = [], 0
        chunk.append((name, parameter))
        size += bytes_needed
    yield from _gather(chunk)


def _gather(chunk: list[tuple[str, torch.nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    with deepspeed.zero.GatheredParameters([parameter for _, parameter in chunk]):
        for name, parameter in chunk:
            yield name, parameter.detach()


def save_hf(model: PreTrainedModel, processor, folder: Path) -> None:
    """Write a folder that `from_pretrained` and vLLM load; every rank calls, rank 0 writes."""
    state = {}
    for name, tensor in gathered_weights(model):
        if dist.get_rank() == 0:
            state[name] = tensor.to("cpu", copy=True)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)
    dist.barrier()


def save(engine, model, processor, state: RunState, root: Path, step: int, keep: int) -> Path:
    """Save everything after `step` steps under `root`, and delete all but the newest `keep` checkpoints."""
    final = root / f"step_{step:06d}"
    partial = root / f".{final.name}.partial"
    if dist.get_rank() == 0:
        for unfinished in root.glob(".step_*.partial"):
            shutil.rmtree(unfinished)
        (partial / RUN).mkdir(parents=True)
    dist.barrier()
    state.save(partial / RUN / f"{dist.get_rank()}.pt")
    save_hf(model, processor, partial / "hf")
    engine.save_checkpoint(str(partial / "deepspeed"), tag="state")
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / STATE).write_text(json.dumps({"step": step, "ranks": dist.get_world_size()}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def complete(root: Path) -> list[Path]:
    """Whole checkpoints under `root`, oldest first."""
    return sorted(path.parent for path in root.glob(f"step_*/{STATE}"))


def latest(root: Path, ranks: int) -> tuple[Path, int]:
    """The newest checkpoint and its step; raises `ConfigError` where there is none for so many ranks."""
    found = complete(root)
    if not found:
        raise ConfigError(f"--resume: there is no checkpoint in {root}")
    state = json.loads((found[-1] / STATE).read_text())
    if state["ranks"] != ranks:
        raise ConfigError(
            f"--resume: {found[-1]} was written by {state['ranks']} ranks, this run has {ranks}; ZeRO-3's shards fit "
            "the number of ranks they were written by"
        )
    return found[-1], state["step"]


def load(engine, state: RunState, checkpoint: Path) -> None:
    """Put weights, optimizer, its schedule and the run's state back."""
    state.load(checkpoint / RUN / f"{dist.get_rank()}.pt")
    path, _ = engine.load_checkpoint(str(checkpoint / "deepspeed"), tag="state")
    if path is None:
        raise ConfigError(f"--resume: DeepSpeed found nothing to load in {checkpoint}")
