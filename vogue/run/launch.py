"""Which rank of how many this process is, as whoever started it says in the environment.

torchrun, DeepSpeed's launcher and Kubernetes' operators speak torch.distributed's own names, `RANK` and the like. srun
and mpirun have names of their own, which `join` translates, so that `srun vogue train` is one run of many ranks and
not many runs. Who started nothing has a single rank.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil

from vogue.settings import ConfigError

RANK, LOCAL_RANK, RANKS = "RANK", "LOCAL_RANK", "WORLD_SIZE"
LOCAL_RANKS, ADDRESS, PORT = "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
NEEDED = (RANK, LOCAL_RANK, RANKS, ADDRESS, PORT)
NAMES = (*NEEDED, LOCAL_RANKS)  # all that makes a process a rank of a run
TORCHRUN = "TORCHELASTIC_RUN_ID"
LAUNCH = ".launch"  # a file
GPUS = "CUDA_VISIBLE_DEVICES"
DEFAULT_PORT = 29500  # torchrun's and DeepSpeed's
FIRST_PORT, PORTS = 20_000, 10_000  # below those that Linux gives to connections


@dataclass(frozen=True)
class Task:
    """What srun or mpirun says of this process."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    host: str | None  # of rank 0, where that is known
    job: str | None  # what all ranks of the run have in common and no other run on these hosts has


def join() -> None:
    """Let torch.distributed's names say which rank this is, where they don't yet and srun or mpirun started it.

    Raises `ConfigError` where they say half of it, and where this process can't know what it is.
    """
    given = os.environ
    if RANK in given:
        if missing := [name for name in NEEDED if name not in given]:
            raise ConfigError(
                f"{RANK}={given[RANK]} is set, but not {', '.join(missing)}: a launcher sets all of them, torchrun for "
                "one; where there is none, unset it"
            )
        return
    task = _of_open_mpi(given) or _of_mpich(given) or _of_srun(given)
    if task is None:
        _refuse_beside_srun(given)
    elif task.ranks > 1:
        os.environ |= _names(task, given)


def rank() -> int:
    """This process' rank, also before the ranks have met."""
    return int(os.environ.get(RANK, "0"))


def ranks() -> int:
    """Number of ranks of the run."""
    return int(os.environ.get(RANKS, "1"))


def is_first_of_node() -> bool:
    return os.environ.get(LOCAL_RANK, "0") == "0"


def attempt() -> int:
    """How often torchrun, on this node, has started its ranks anew after one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def leave_name(folder: Path) -> None:
    """Write into a run's folder which torchrun has started it, so that the ranks of its next attempt can know it."""
    if TORCHRUN in os.environ:
        (folder / LAUNCH).write_text(_name())


def has_begun(folder: Path) -> bool:
    """Whether it was this same torchrun that has started the folder's run."""
    path = folder / LAUNCH
    return TORCHRUN in os.environ and path.exists() and path.read_text() == _name()


def _name() -> str:
    """A name of the torchrun above this process that no other one has, and that stays through its restarts."""
    named = os.environ[TORCHRUN]
    if named != "none":  # its default, of every run
        return named
    parent = psutil.Process(os.getppid())
    return f"{socket.gethostname()} {parent.pid} {parent.create_time():.2f}"


def _of_open_mpi(given: Mapping[str, str]) -> Task | None:
    if "OMPI_COMM_WORLD_RANK" not in given:
        return None
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    rank, ranks, local_rank, local_ranks = (int(given[name]) for name in names)
    host, job = _first_host(given.get("SLURM_JOB_NODELIST")), given.get("PMIX_NAMESPACE")
    return Task(rank, ranks, local_rank, local_ranks, host, job)


def _of_mpich(given: Mapping[str, str]) -> Task | None:
    """Of MPICH's and Intel's mpirun; srun may set the first two names as well."""
    if "MPI_LOCALRANKID" not in given:
        return None
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    rank, ranks, local_rank, local_ranks = (int(given[name]) for name in names)
    return Task(rank, ranks, local_rank, local_ranks, _first_host(given.get("SLURM_JOB_NODELIST")), job=None)


def _of_srun(given: Mapping[str, str]) -> Task | None:
    if "SLURM_STEP_NUM_TASKS" not in given:
        return None
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
    rank, ranks, local_rank, node = (int(given[name]) for name in names)
    local_ranks = _repeated(given["SLURM_STEP_TASKS_PER_NODE"], node)
    job = f"{given['SLURM_JOB_ID']}.{given['SLURM_STEP_ID']}"
    return Task(rank, ranks, local_rank, local_ranks, _first_host(given["SLURM_STEP_NODELIST"]), job)


def _repeated(counts: str, index: int) -> int:
    """The number at this index of a list as SLURM writes it: 4(x2),3 is 4, 4, 3."""
    found = (int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1)))
    return next(islice(found, index, None))


def _first_host(hosts: str | None) -> str | None:
    """The first name of a list as SLURM writes it: gpu[07-09,12]-ib,login1 begins with gpu07-ib."""
    if not hosts:
        return None
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else None


def _refuse_beside_srun(given: Mapping[str, str]) -> None:
    """Raise `ConfigError` for the one process of a job of many, which srun would have started as often as needed."""
    tasks = int(given.get("SLURM_NTASKS", "1"))
    if tasks > 1:
        raise ConfigError(
            f"SLURM has given this job {tasks} tasks, and this process is none of them: `srun vogue train …` starts a "
            "rank in each, `srun --ntasks 1 vogue train …` a single one"
        )


def _names(task: Task, given: Mapping[str, str]) -> dict[str, str]:
    host = given.get(ADDRESS) or ("127.0.0.1" if task.local_ranks == task.ranks else task.host)
    if host is None:
        raise ConfigError(
            f"mpirun has started {task.ranks} ranks on several machines, and nothing says where the first one is: "
            f"mpirun -x {ADDRESS}=HOST …, the machine of rank 0"
        )
    port = FIRST_PORT + zlib.crc32(task.job.encode()) % PORTS if task.job else DEFAULT_PORT
    # A task that sees one GPU alone, as --gpus-per-task=1 gives it, has that one, whatever its number.
    alone = given.get(GPUS, "") != "" and "," not in given[GPUS]
    return {
        RANK: str(task.rank),
        RANKS: str(task.ranks),
        LOCAL_RANK: "0" if alone else str(task.local_rank),
        LOCAL_RANKS: str(task.local_ranks),
        ADDRESS: host,
        PORT: given.get(PORT) or str(port),
    }
