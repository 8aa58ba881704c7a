"""Microbenchmarks of the head on a few tokens, under pytest-benchmark: for a quick look while working on a kernel.

    pytest bench/test_kernels.py --benchmark-columns=median,min,max --benchmark-group-by=group
    pytest bench/test_kernels.py -k "forward and N64" --benchmark-compare        # with the run before it

`make bench` and bench/kernels.py measure the same contenders in turns: those are the figures to quote.
"""

import pytest
import torch
from kernel_contenders import CONTENDERS, WORK, inputs

D, V = 2048, 151_936  # Qwen2.5-VL-3B's head
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "compile"])
@pytest.mark.parametrize("tokens", [16, 64], ids="N{}".format)
@pytest.mark.parametrize("work", WORK)
def test_head(benchmark, work, tokens, contender):
    benchmark.group = f"{work}, N={tokens} D={D} V={V} {DTYPE} on {DEVICE}, {torch.get_num_threads()} threads"
    found = WORK[work].make(inputs(tokens, D, V, DEVICE, DTYPE))
    if contender not in found:
        pytest.skip("doesn't do this")

    def step():
        found[contender].run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    try:
        step()
    except Exception as error:  # a peer that isn't installed, or needs a GPU
        pytest.skip(f"{type(error).__name__}: {error}")
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
