import pytest
import torch
from vogue_kernels import available_backends


@pytest.fixture(params=list(available_backends()))
def backend(request):
    """Every backend in turn; one that can't run here is skipped with its reason."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty returns NaN, so that an output which a kernel forgets to write fails loudly."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
