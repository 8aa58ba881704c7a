import platform
import resource

import pytest
import torch

from vogue import distributed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc, on CPUs")
def test_freed_memory_is_kept_for_the_next_step():
    distributed.start()
    pages = 20_000

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(pages * 1024)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(5)) < pages / 100
