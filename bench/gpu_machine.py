"""Sections of bench/gpu.py: the machine and its ceilings, and whether the operators are right on it."""

import importlib.metadata
import platform

import torch
from gpu import Report, Settings
from kernel_contenders import inputs
from machines import machine_of

from vogue_kernels import available_backends, linear_branch_stats, linear_logprob

PACKAGES = (
    *("torch", "triton", "transformers", "pytest", "pytest-xdist", "liger-kernel", "cut-cross-entropy"),
    *("deepspeed", "pydantic", "omegaconf", "datasets", "math-verify", "vllm"),
)
RESULTS = ("entropy", "symmetric_kl", "grad_p", "grad_q", "grad_weight")
RULE = 2.0  # an error may be so many times that of plain PyTorch in the same dtype


def machine(report: Report, settings: Settings) -> None:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "isn't installed"
    report.add(what="versions", **found)
    report.add(what="backends", **{name: reason or "can run" for name, reason in available_backends().items()})
    for dtype in (torch.bfloat16, torch.float32):
        with report.trying(f"ceilings, {dtype}"):
            here = machine_of(settings.device, dtype, settings.quick)
            rates = {"tflops": here.rates.operations / 1e12, "copy_tb_per_s": here.rates.bytes / 1e12}
            report.add(what="ceilings", dtype=str(dtype).removeprefix("torch."), **rates, **here.description)
    # The gradient of the hidden states is added up in float32 by products of bfloat16.
    if settings.device == "cpu":
        report.add(what="addmm with out_dtype", skipped="needs a GPU")
        return
    with report.trying("addmm with out_dtype"):
        a, b = (torch.randn(64, 64, device="cuda").bfloat16() for _ in range(2))
        total = torch.ones(64, 64, device="cuda")
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        error = float((total - 1 - (a.double() @ b.double())).abs().max())
        report.add(what="addmm with out_dtype", largest_error=error)


def correct(report: Report, settings: Settings) -> None:
    """Each backend's values and gradients against float64, in multiples of plain PyTorch's error in the same dtype."""
    sizes = [(5, 16, 97)] if settings.quick else [(1, 256, 4096), (300, 2048, 32_000), (130, 96, 3001)]
    for backend, reason in available_backends().items():
        of_device = backend == {"cuda": "triton", "cpu": "cpu"}[settings.device]
        if reason or not (of_device or backend == "torch"):
            report.add(what=backend, skipped=reason or f"doesn't take tensors on {settings.device}")
            continue
        for n, width, vocab in sizes:
            for dtype in (torch.bfloat16, torch.float32):
                with report.trying(f"{backend}, N {n}, D {width}, V {vocab}, {dtype}"):
                    row = {"backend": backend, "N": n, "D": width, "V": vocab, "dtype": str(dtype)}
                    ratios = _errors(backend, n, width, vocab, settings.device, dtype)
                    report.add(**row, **ratios)
                    above = [name for name, ratio in ratios.items() if ratio > RULE]
                    if above:
                        raise ArithmeticError(f"more than {RULE} × plain PyTorch's error in {', '.join(above)}")


def _errors(backend: str, n: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Name: error of the whole tensor over plain PyTorch's, and over what the dtype's rounding alone would be."""
    given = inputs(n, width, vocab, device, dtype)

    def results(p, q, weight, function):
        tensors = [x.detach().clone().requires_grad_() for x in (p, q, weight)]
        entropy, symmetric = function(*tensors)
        gradients = torch.autograd.grad(entropy.sum() + symmetric.sum(), tensors)
        return {name: x.detach() for name, x in zip(RESULTS, (entropy, symmetric, *gradients), strict=True)}

    def ours(p, q, weight):
        stats = linear_branch_stats(p, q, weight, given.targets, backend=backend)
        return linear_logprob(p, weight, given.targets, backend=backend).entropy, stats.symmetric_kl

    def plain(p, q, weight):
        logits = [x @ weight.T for x in (p, q)]
        logp, logq = (x if x.dtype == torch.float64 else x.float() for x in logits)
        logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1), ((logp.exp() - logq.exp()) * (logp - logq)).sum(-1) / 2

    truth = results(*(x.double() for x in given[:3]), plain)
    found, naive = (results(*given[:3], function) for function in (ours, plain))
    ratios = {}
    for name, exact in truth.items():
        rounding = torch.finfo(found[name].dtype).eps / 2 * exact.norm()
        errors = [float((x[name].double() - exact).norm()) for x in (found, naive)]
        ratios[name] = round(errors[0] / max(errors[1], float(rounding)), 3)
    return ratios
