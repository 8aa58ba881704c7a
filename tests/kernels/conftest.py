import contextlib
import os
import types
from collections import Counter

import pytest
import torch

from vogue_kernels import available_backends

if os.environ.get("TRITON_INTERPRET") == "1":
    # The interpreter patches triton.language anew at every call of a device function, which takes most of its time.
    # Here nothing else uses triton, so that once for each module is enough.
    from triton.runtime import interpreter

    _patch, _patched = interpreter._patch_lang, set()

    def _patch_once(function):
        if id(function.__globals__) not in _patched:
            _patched.add(id(function.__globals__))
            _patch(function)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = _patch_once


def pytest_collection_modifyitems(config, items):
    """Of each test's cases on a backend the first, and every n-th after it, where a suite is run a second time."""
    n, seen = int(os.environ.get("VOGUE_EVERY_NTH_CASE", "1")), Counter()
    kept, left_out = [], []
    for item in items:
        case = getattr(item, "callspec", None)
        of = item.path, item.originalname, case.params.get("backend") if case else None
        (left_out if seen[of] % n else kept).append(item)
        seen[of] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=list(available_backends()))
def backend(request):
    """Every backend in turn; one that can't run here is skipped with its reason. Tensors are made where it runs."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    on_gpu = request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1"
    with torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty returns NaN, so that an output which a kernel forgets to write fails loudly."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # as it is, cuBLAS would refuse
    yield
    torch.use_deterministic_algorithms(False)
