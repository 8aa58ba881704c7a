"""What vLLM's weight transfer needs of GPUs, for a trainer and servers on a machine without one.

Tensors go through the store by which NCCL's ranks would meet. All else is vLLM's own: who is asked what, in which
order, and what a server does with the weights.
"""

import os
from types import SimpleNamespace

import torch
from vllm.distributed.device_communicators import pynccl


class Communicator:
    """Takes the place of `PyNcclCommunicator`."""

    def __init__(self, group, device):
        self._group = group

    def broadcast(self, tensor, src, stream):
        tensor.copy_(self._group.broadcast_obj(tensor if self._group.rank == src else None, src))

    def destroy(self):
        self._group = None


class Extension:
    """Adds nothing to vLLM's worker, which imports this module to find it (`worker_extension_cls`)."""


def take_place(replace):
    """Put in place what there isn't; `replace` is `setattr`, or pytest's."""
    replace(pynccl, "PyNcclCommunicator", Communicator)
    replace(torch.accelerator, "current_device_index", lambda: 0)
    replace(torch.accelerator, "synchronize", lambda: None)
    replace(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))


if "VLLM_SERVER_DEV_MODE" in os.environ:  # in a server
    take_place(setattr)
