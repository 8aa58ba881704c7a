"""The machine that a benchmark runs on: its clock, its memory, and the rates that bound it, measured."""

import platform
import re
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from roofline import Rates
from torch.utils._pytree import tree_leaves

from vogue_kernels import available_backends, cpu


def size(results) -> int:
    """Bytes of all tensors in a structure."""
    return sum(x.nbytes for x in tree_leaves(results) if isinstance(x, torch.Tensor))


class Gpu:
    def __init__(self, dtype: torch.dtype, quick: bool = False):
        self.used, nvml = self._nvml()
        properties = torch.cuda.get_device_properties(0)
        self.description = {
            "device": torch.cuda.get_device_name(0),
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            **nvml,
        }
        self.rates = Rates(self.product_rate(dtype, 2048 if quick else 8192), self.copy_rate())

    def _nvml(self) -> tuple[Callable[[], int] | None, dict[str, str]]:
        """What reads the memory that is used on the whole device, if anything does, and what NVML says of it."""
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(0).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            driver = pynvml.nvmlSystemGetDriverVersion()
        except ImportError:
            return None, {"nvml": "nvidia-ml-py isn't installed"}
        except pynvml.NVMLError as error:
            return None, {"nvml": str(error)}
        return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used), {"driver": driver}

    def product_rate(self, dtype: torch.dtype, size: int = 8192) -> float:
        """Operations a second of a square product of random matrices: zeros would draw less power and clock higher."""
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def copy_rate(self) -> float:
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def seconds(self, run, repeats: int = 10) -> float:
        """Of one of several runs that follow each other: the median of six such rows, of which the first warms up."""
        return statistics.median(
            1e-3 * self.milliseconds(lambda: [run() for _ in range(repeats)]) / repeats for _ in range(6)
        )

    def milliseconds(self, run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, run) -> dict:
        """What a run needs at its highest beyond inputs and results."""
        self.free()
        used, allocated = self.used and self.used(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        torch.cuda.synchronize()
        peaks = {"torch_bytes": torch.cuda.max_memory_allocated() - allocated - size(results), "nvml_bytes": None}
        if self.used:  # the allocator keeps what it took from the device, so that this is still NVML's peak
            peaks["nvml_bytes"] = self.used() - used - size(results)
        return peaks

    def free(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Cpu:
    def __init__(self, dtype: torch.dtype, quick: bool = False):
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        kernels = available_backends()["cpu"] or cpu.description()
        self.description = {
            "device": name[1] if name else platform.machine(),
            "threads": torch.get_num_threads(),
            "kernels": kernels,
        }
        # In float32 too: where there is no arithmetic of bfloat16, it is the faster one for that.
        scale = 4 if quick else 1
        product = max(
            self.product_rate(x, (1536 if x == torch.float32 else 384) // scale) for x in (dtype, torch.float32)
        )
        self.rates = Rates(product, self.copy_rate((1 << 26) // scale))

    def product_rate(self, dtype: torch.dtype, size: int) -> float:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        return 2 * size**3 / min(1e-3 * self.milliseconds(lambda: a @ b) for _ in range(5))

    def copy_rate(self, elements: int) -> float:
        source = torch.zeros(elements)
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(1e-3 * self.milliseconds(lambda: target.copy_(source)) for _ in range(5))

    def milliseconds(self, run) -> float:
        """Of the second of two runs: a virtual machine returns memory to its host that nobody has used for a while, and
        waits for each page of it that is written again, up to half a second for a large gradient, by who ran before.
        """
        run()
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def peak_bytes(self, run) -> dict:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = run()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        peak = max(accumulate((event.nbytes() for event in events), initial=0))
        return {"torch_bytes": peak - size(results), "nvml_bytes": None}

    def free(self):
        pass


def machine_of(device: str, dtype: torch.dtype, quick: bool = False) -> Gpu | Cpu:
    """quick: rates of small products and copies, to see that everything runs."""
    return (Gpu if device == "cuda" else Cpu)(dtype, quick)
