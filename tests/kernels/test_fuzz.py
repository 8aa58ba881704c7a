"""Any shape, dtype, temperature, scale, memory layout and choice of gradients, against float64."""

import math
import os

import oracle
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vogue_kernels import IGNORE, linear_branch_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(
    max_examples=15 if os.environ.get("TRITON_INTERPRET") == "1" else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 90),
    v=st.integers(1, 1100),
    dtype=st.sampled_from(DTYPES),
    temperature=st.floats(0.3, 3),
    scale=st.sampled_from([0, 1e-4, 1, 8]),
    with_bias=st.booleans(),
    strided=st.booleans(),
    skip=st.booleans(),
    scored=st.sets(st.integers(0, 6), min_size=1),
    wanted=st.sets(st.integers(0, 2), min_size=1),
)
def test_random_inputs_agree_with_float64(
    n, d, v, dtype, temperature, scale, with_bias, strided, skip, scored, wanted, backend
):
    generator = torch.Generator(torch.get_default_device()).manual_seed(n * d * v)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def laid_out(matrix):
        matrix = matrix.to(dtype)
        return matrix.t().contiguous().t() if strided else matrix

    raw = scale * normal(n, d)
    noisy = raw + 0.3 * scale * normal(n, d)
    weight, bias = normal(v, d) / d**0.5, normal(v).to(dtype) if with_bias else None
    targets = torch.randint(v, (n,), generator=generator)
    if skip:
        targets[::3] = IGNORE
    inputs = [laid_out(raw), laid_out(noisy), laid_out(weight), *([] if bias is None else [bias])]
    upstream = [normal(n) for _ in scored]

    def run(operator, dtype):
        """(results, gradients of what is wanted)."""
        leaves = [x.to(dtype).detach().requires_grad_(i in wanted or i == 3) for i, x in enumerate(inputs)]
        stats = operator(*leaves[:3], targets, *leaves[3:], temperature=temperature)
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        total = sum((stats[i] * g.to(stats[i].dtype)).sum() for i, g in zip(sorted(scored), upstream))
        total = total + 0 * sum(leaf.sum() for leaf in chosen)  # nothing may depend on some
        gradients = torch.autograd.grad(total, chosen)
        return [x.detach().double() for x in stats], [x.double() for x in gradients]

    actual = run(lambda *args, **kwargs: linear_branch_stats(*args, **kwargs, backend=backend), dtype)
    plain, truth = run(oracle.linear_branch_stats, dtype), run(oracle.linear_branch_stats, torch.float64)
    # Beyond the factor 2 of the other tests, so that no luck of the plain version's counts, a rounding of what rounding
    # acts on: float32's, of the terms of a logit, and a gradient's own.
    terms = max(float((x.double().abs() @ inputs[2].double().abs().t()).max()) for x in inputs[:2])
    terms = 1 + (terms + (0 if bias is None else float(bias.abs().max()))) / temperature + math.log(v)
    slack = 4 * torch.finfo(torch.float32).eps * terms
    for which, rounding in enumerate((slack, max(slack, torch.finfo(dtype).eps))):
        for ours, theirs, true in zip(actual[which], plain[which], truth[which]):
            allowed = 2 * (theirs - true).abs().max() + rounding * max(1, true.abs().max())
            assert (ours - true).abs().max() <= allowed
