"""The ranks of a run: start, what all of them agree on, and the few sums that the trainer takes over them."""

import atexit
import ctypes
import io
import os
import re
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits
from torch.distributed import distributed_c10d

from vogue.run import errors, launch
from vogue.run.stacks import LostRank

LOOPBACK = "lo"  # Linux' name of the interface
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
LOST = re.compile(rf"gloo|NCCL|Connection (closed|reset) by peer|Broken pipe|{TIMED_OUT.pattern}", re.IGNORECASE)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
GROUPS_PATIENCE = ("default_pg_timeout", "default_pg_nccl_timeout")
PATIENCE = 60.0  # seconds in which a rank that has failed must be gone


def start(seconds: float = 1800.0) -> tuple[int, int, torch.device]:
    """Join the run that the launcher set up, or be the only rank; returns rank, number of ranks and device.

    A rank waits for the others for at most so many seconds, whoever makes the group in which it does. Raises `LostRank`
    where they don't come together.
    """
    import deepspeed

    if launch.RANK not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ |= {launch.RANK: "0", launch.LOCAL_RANK: "0", launch.RANKS: "1"}
        os.environ |= {launch.ADDRESS: "127.0.0.1", launch.PORT: port}
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ[launch.LOCAL_RANK])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        if "OMP_NUM_THREADS" not in os.environ:  # ranks on one machine share its cores
            local_ranks = int(os.environ.get(launch.LOCAL_RANKS, os.environ[launch.RANKS]))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        _keep_freed_memory()
        # An all-reduce for inference that nothing here uses; DeepSpeed would compile it for minutes first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    is_first, backend, patience = not dist.is_initialized(), "nccl" if on_gpu else "gloo", timedelta(seconds=seconds)
    # DeepSpeed and vLLM make groups of their own and set no time: a rank that hangs in ZeRO's would be waited for in
    # vain for 30 minutes, one that is slow for 10 on GPUs.
    for name in GROUPS_PATIENCE:
        setattr(distributed_c10d, name, patience)
    if is_first and rank_count() == 1:
        # Nobody is to be met: without a store of torch's, which would listen to everybody who reaches this machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)  # pyright: ignore
    try:
        deepspeed.init_distributed(backend, verbose=False, timeout=patience)
    except dist.DistError as error:
        where = f"{os.environ[launch.ADDRESS]}, port {os.environ[launch.PORT]}"
        why = str(error).splitlines()[0]
        raise LostRank(f"the {launch.ranks()} ranks haven't come together at {where}: {why}") from error
    if is_first and not on_gpu:
        # Else gloo's threads may let go of a tensor when the interpreter is already gone, which aborts the process.
        # Finalizers run at exit, the last made first: after vLLM's, which ends groups of its own.
        weakref.finalize(dist, _end)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def rank_count() -> int:
    """Number of ranks, which the launcher has said before they meet."""
    return dist.get_world_size() if dist.is_initialized() else launch.ranks()


def _keep_freed_memory() -> None:
    """Let glibc, where that is the C library, keep what is freed: every step needs as much memory as the one before.

    It would give activations back to the system and fault all their pages in again: 7% of a small model's update.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        allocator.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if not allocator.mallopt(M_MMAP_THRESHOLD, 2**30):
            allocator.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most before glibc 2.35


def give_back_freed_memory() -> None:
    """Give the system what was freed and is kept, where glibc keeps it: after what no step needs as much memory as."""
    allocator = ctypes.CDLL(None)
    if not torch.cuda.is_available() and hasattr(allocator, "malloc_trim"):
        allocator.malloc_trim(0)


def one_openmp_thread() -> None:
    """Give the calling thread one OpenMP thread: a second pool makes both sleep at every end of a parallel loop.

    With as many threads as cores in one pool alone, they wait actively; a rollout then takes half the time.
    """
    torch.get_num_threads()  # torch sets the number when a thread first asks for it
    threadpool_limits(1, "openmp")


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a launched rank with this exit code: all that is registered for the exit runs, the interpreter's end doesn't.

    While an engine lives, its process groups do, and threads of gloo may still want the interpreter when it is gone.
    Where the run has failed, the others may be what an exit function waits for: it gets PATIENCE.
    """
    if code:
        end = threading.Timer(PATIENCE, os._exit, [code])
        end.daemon = True
        end.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def heeding_losses() -> Iterator[None]:
    """What the back ends of torch.distributed raise in the block for want of another rank becomes a `LostRank`."""
    try:
        yield
    except RuntimeError as error:
        theirs = type(error) is RuntimeError or isinstance(error, dist.DistError)  # not an engine's, or a reward's
        if launch.ranks() == 1 or not theirs or not LOST.search(str(error)):
            raise
        waited = TIMED_OUT.search(str(error)) is not None
        why = "has hung for trainer.timeout: see stacks_rank*.txt of trainer.output_dir" if waited else "has ended"
        raise LostRank(f"another rank {why} ({str(error).splitlines()[0]})") from error


def total(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum of each value over the ranks; every rank gives the same keys."""
    names = sorted(values)
    summed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return dict(zip(names, summed.tolist(), strict=True))


def largest(values: list[int], device: torch.device) -> list[int]:
    """The largest of each over the ranks."""
    found = torch.tensor(values, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def gather(value, *kinds: type, group: dist.ProcessGroup | None = None) -> list:
    """`value` of every rank, or of those of a group, in order of rank.

    kinds  the classes that `value` has instances of, beside tensors, numbers, text, bytes, containers of Python's

    What comes is read as these alone: nothing that another rank sends can run here, as it can from a pickle. A rank by
    itself sends to itself, so that what can't be sent is noticed everywhere.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    mine = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device), group=group)
    longest = int(torch.stack(sizes).max())
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=group)
    with torch.serialization.safe_globals(list(kinds)):
        return [_read(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _read(sent: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(sent.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def neighbours(count: int, seconds: float) -> dist.ProcessGroup:
    """This rank's group of `count` consecutive ranks, which waits for its members for at most so many seconds.

    All ranks call. What the group gathers goes through the hosts' memory, not the GPUs'.
    """
    group: Any
    group, _ = dist.new_subgroups(group_size=count, backend="gloo", timeout=timedelta(seconds=seconds))
    return group


@contextmanager
def together(*kinds: type[Exception], meeting: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[None]:
    """Where the block raises one of `kinds` on some ranks, all ranks raise it: the first such rank's.

    meeting  what the wait for the others lies in: a clock's phase

    Every rank calls, and waits for the others at the end of the block, which may have no collective of its own before
    what can fail. The errors are of one text each.
    """
    mine = None
    try:
        yield
    except kinds as error:
        mine = error
    with meeting():
        kind = next((i for i, one in enumerate(kinds) if isinstance(mine, one)), None)
        found = gather(None if kind is None else (kind, str(mine)))
    failed = {rank: told for rank, told in enumerate(found) if told is not None}
    if failed:
        rank, (kind, text) = next(iter(failed.items()))
        alike = len(failed) == len(found) and len({text for _, text in found}) == 1
        raise errors.agreed(kinds[kind](text), None if alike else rank) from mine
