"""Microbenchmarks of the head on a few tokens, under pytest-benchmark: for a quick look while working on a kernel.

    make bench                                   # or: pytest bench/test_kernels.py
    pytest bench/test_kernels.py -k "forward and N64"

bench/kernels.py has the contenders, and measures them in turns: the figures to quote.
"""

import pytest
import torch

from kernels import CONTENDERS, WORK, inputs

D, V = 2048, 151_936  # Qwen2.5-VL-3B's head
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name not in ("compile", "liger-ce")])
@pytest.mark.parametrize("tokens", [16, 64], ids="N{}".format)
@pytest.mark.parametrize("work", WORK)
def test_head(benchmark, work, tokens, contender):
    benchmark.group = f"{work}, N={tokens} D={D} V={V} {DTYPE} on {DEVICE}, {torch.get_num_threads()} threads"
    make, _ = WORK[work]
    _, run = make(*inputs(tokens, D, V, DEVICE, DTYPE))[contender]

    def step():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
