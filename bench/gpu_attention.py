"""Section of bench/gpu.py: attention of shared prompts, each way that `vogue.model.attention` has of it.

Right: outputs and gradients against float64 and a mask, in multiples of the error of plain SDPA with that mask in the
same dtype. Fast: the layout or mask with the forward, and the forward with the backward pass, of rows as a 7B's.
"""

import statistics
import time

import torch
from gpu import Report, Settings
from machines import machine_of
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.flex_attention import flex_attention_forward

from vogue.model.attention import FLEX, PARTS, VARLEN, attention_inputs, boolean_mask, shared_prefix_attention

SMALL = ([(300, [40, 1, 90]), (1, [7]), (120, [64, 64])], 8, 2, 64)  # (prompt, completions) of each row, heads, of keys
LARGE = {  # 28 heads on 4 of 128, as Qwen2.5-VL-7B
    "2k + 5 × 1k": ([(2048, [1024] * 5)], 28, 4, 128),
    "2 rows, 1k + 8 × 512": ([(1024, [512] * 8)] * 2, 28, 4, 128),
    "6k + 8 × 2k": ([(6144, [2048] * 8)], 28, 4, 128),
}


def attention(report: Report, settings: Settings) -> None:
    cpu = settings.device == "cpu"
    machine = machine_of(settings.device, torch.bfloat16, quick=True)
    # FlexAttention has no backward pass on a CPU; on a GPU it comes last, since compiling it may take all the time.
    for way in (PARTS, VARLEN, "sdpa") if cpu else (VARLEN, "sdpa", FLEX):
        with report.trying(f"{way}, errors"):
            ratios = _errors(way, settings.device)
            report.add(what="errors", attention=way, **ratios)
            if way != "sdpa" and max(ratios.values()) > 2:
                raise ArithmeticError(f"{way}: more than 2 × the error of one masked softmax: {ratios}")
        for name, case in {"small": SMALL}.items() if settings.quick else LARGE.items():
            if settings.ends - time.monotonic() < (15 if way == FLEX else 4):
                report.add(what=name, attention=way, skipped="no time was left")
                continue
            with report.trying(f"{way}, {name}"):
                report.add(what=name, attention=way, **_times(way, case, settings, machine))
                machine.free()


def _segments(rows, device: str) -> torch.Tensor:
    parts = [[0] * prompt + [i for i, n in enumerate(lengths, 1) for _ in range(n)] for prompt, lengths in rows]
    longest = max(map(len, parts))
    return torch.tensor([part + [-1] * (longest - len(part)) for part in parts], device=device)


def _inputs(case, device: str, dtype: torch.dtype):
    rows, heads, of_keys, size = case
    segments = _segments(rows, device)
    torch.manual_seed(0)
    shape = len(rows), segments.shape[1]
    # As a layer's projections give them: by token, then transposed.
    made = [torch.randn(*shape, n, size, device=device).to(dtype).transpose(1, 2) for n in (heads, of_keys, of_keys)]
    weights = torch.randn(*shape, heads, size, device=device).to(dtype)
    return segments, [x.requires_grad_() for x in made], weights * (segments >= 0)[..., None, None]


def _run(way: str, query, key, value, given: dict):
    """(B, L, H, D), as transformers would call it."""
    if way in (PARTS, VARLEN):
        return shared_prefix_attention(None, query, key, value, None, **given)[0]
    if way == FLEX:
        return flex_attention_forward(torch.nn.Module(), query, key, value, **given)[0]
    return _masked(query, key, value, given["attention_mask"])


def _masked(query, key, value, mask):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _errors(way: str, device: str) -> dict[str, float]:
    segments, made, weights = _inputs(SMALL, device, torch.bfloat16)
    mask = boolean_mask(segments)

    def results(function, tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        output = function(*tensors)
        gradients = torch.autograd.grad((output * weights.to(output.dtype)).sum(), tensors)
        real = output * (segments >= 0)[..., None, None]
        return dict(zip(("output", "grad_query", "grad_key", "grad_value"), (real, *gradients), strict=True))

    given = attention_inputs(way, segments, torch.bfloat16)
    truth = results(lambda *x: _masked(*x, mask), [x.double() for x in made])
    naive = results(lambda *x: _masked(*x, mask), made)
    found = results(lambda *x: _run(way, *x, given), made)
    return {
        name: round(float((found[name].detach() - exact).norm() / (naive[name].detach() - exact).norm()), 3)
        for name, exact in truth.items()
    }


def _times(way: str, case, settings: Settings, machine) -> dict[str, float]:
    segments, made, weights = _inputs(case, settings.device, torch.bfloat16)

    def layout():
        return attention_inputs(way, segments, torch.bfloat16)

    def forward():
        with torch.no_grad():
            return _run(way, *made, given)

    def both():
        return torch.autograd.grad((_run(way, *made, given) * weights).sum(), made)

    given, row = layout(), {"tokens": segments.numel()}
    start = time.monotonic()
    both()
    machine.free()
    row["first_seconds"] = round(time.monotonic() - start, 2)  # where something is compiled, it is in here
    for name, step in {"layout_ms": layout, "forward_ms": forward, "forward_backward_ms": both}.items():
        step()
        row[name] = statistics.median(machine.milliseconds(step) for _ in range(2 if settings.quick else 7))
    return row | machine.peak_bytes(both)
