import os
import platform
import subprocess
import sys

import pytest
import torch

FAULTS = """
import resource, torch
from vogue import distributed

distributed.start()
pages = 20_000

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(pages * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert min(faults() for _ in range(5)) < pages / 100
distributed.leave(0)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc, on CPUs")
def test_freed_memory_is_kept_for_the_next_step():
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of this process
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_leaves_with_its_exit_code_after_all_that_is_registered_for_the_exit(code):
    script = f"import atexit; atexit.register(print, 'done'); from vogue.distributed import leave; leave({code})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "done\n")
