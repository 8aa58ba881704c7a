"""Which backends can run here, and which one computes for tensors like these: triton, cpu or torch (branches.py)."""

import importlib
import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_BACKENDS = {"triton": ".gpu", "cpu": ".cpu", "torch": ".reference"}  # the fastest first; imported when first used


def available_backends() -> dict[str, str | None]:
    """Every backend, the fastest first: None if it can run here, else the reason why it can't."""
    return {
        "triton": _why_not_triton(),
        "cpu": _why_not_cpu(),
        "torch": None,
    }


def _why_not_triton() -> str | None:
    if reason := _fault_of_triton():
        return reason
    if not torch.cuda.is_available() and not _interpreting():
        return "no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU, for tests)"
    return None


@cache
def _fault_of_triton() -> str | None:
    """Why the installed triton can't be used. It isn't imported for that: TRITON_INTERPRET counts at its import."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "triton isn't installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "tools" / "tensor_descriptor.py").exists() for folder in folders):
        return "the installed triton has no tensor descriptors: it needs triton 3.4 or later"
    return None


def _why_not_cpu() -> str | None:
    return importlib.import_module(".cpu", __package__).why_not()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal(name: str, weight: Tensor) -> str | None:
    """Why a backend can't take tensors like this one."""
    if name != "torch" and weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32; use torch for {weight.dtype}"
    if name == "cpu" and weight.device.type != "cpu":
        return f"the tensors are on {weight.device}"
    if name == "triton" and not weight.is_cuda and not _interpreting():
        return f"the tensors are on {weight.device}"
    return None


@cache
def _warn_of_reference(reason: str) -> None:
    warnings.warn(f"vogue_kernels runs with PyTorch operators, not with compiled kernels: {reason}", stacklevel=2)


def implementation(backend: str, weight: Tensor):
    reasons = {name: reason or _refusal(name, weight) for name, reason in available_backends().items()}
    if backend == "auto":  # the interpreter is for those who ask for it
        backend = next(name for name, reason in reasons.items() if not reason and (weight.is_cuda or name != "triton"))
        if backend == "torch" and weight.device.type == "cpu" and (reason := available_backends()["cpu"]):
            _warn_of_reference(reason)
    elif backend not in reasons:
        raise ValueError(f"unknown backend {backend!r}: choose one of auto, {', '.join(reasons)}")
    elif reasons[backend] is not None:
        raise ValueError(f"backend {backend!r} can't run: {reasons[backend]}")
    return importlib.import_module(_BACKENDS[backend], __package__)
