"""Installs vogue_kernels by itself beside several versions of torch and runs its fast tests there: `make matrix`.

    python tools/matrix.py [oldest] [middle] [newest] [--keep FOLDER]

Each row of ROWS is an environment of its own, made by pip in a temporary folder and deleted after, and shows

  without   the installation where there is no compiler: it succeeds, the `torch` backend computes and says why
  with      the installation with one: the `cpu` backend computes
  tests     the tests of tests/kernels that take less than ten seconds each, against what was installed
  triton    the same for the Triton backend, in Triton's interpreter
  compiled  bench/gpu_static.py for one architecture: every kernel compiles, whatever GPU there is

It prints a line of a table for each. torch from the package index is a CUDA build, of about 5 GB. Ends with 1 if
anything failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    python: str  # the version, if this machine has it; else the one that runs this
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()  # tests of what these versions haven't got, and the kernels don't need


# Triton's interpreter of 3.6 and before takes an array of one element for an index, which numpy 2.4 no longer is.
# test_launch plays products on the meta device with a result of another dtype, which torch has since 2.13.
ROWS = {
    "oldest": Row("3.10", ("torch==2.8.0", "triton==3.4.0", "numpy<2.4"), without=("test_launch",)),
    "middle": Row("3.12", ("torch==2.11.0", "triton==3.6.0", "numpy<2.4"), without=("test_launch",)),
    "newest": Row("3.13", ("torch", "triton", "numpy")),
}
TOOLS = ("setuptools>=77", "cmake>=3.25", "ninja", "pytest", "pytest-timeout", "hypothesis")

VERSIONS = "import platform, torch, triton; print(platform.python_version(), torch.__version__, triton.__version__)"
BACKEND = """
import warnings
import torch, vogue_kernels
with warnings.catch_warnings(record=True) as told:
    stats = vogue_kernels.linear_logprob(torch.zeros(1, 4), torch.zeros(8, 4), torch.tensor([3]))
assert abs(stats.entropy.exp().item() - 8) < 1e-5
why = any("its library wasn't compiled: it needs a C++ compiler" in str(warning.message) for warning in told)
compiled = vogue_kernels.available_backends()["cpu"] is None
print("cpu" if compiled else "torch, and says why" if why else "torch, in silence")
"""


class Environment:
    """An environment of its own, and a copy of what the tests read, in which no `vogue` is to be found."""

    def __init__(self, folder: Path, row: Row):
        self.folder = folder
        self.without = "".join(f" and not {name}" for name in row.without)
        self.python = folder / "venv" / "bin" / "python"
        if not self.python.exists():
            subprocess.run([find_python(row.python), "-m", "venv", folder / "venv"], check=True)
        self.pip(*row.packages, *TOOLS)
        built = shutil.ignore_patterns("*.so", "build", "*.egg-info", "__pycache__")
        for name in ("kernels", "tests/kernels", "bench", "examples", "tools"):
            shutil.rmtree(folder / name, ignore_errors=True)  # what an earlier run built would be installed again
            shutil.copytree(ROOT / name, folder / name, ignore=built)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def run(self, *command, **environment) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = os.pathsep.join([str(self.python.parent), os.environ["PATH"]])
        return subprocess.run(
            [self.python, *map(str, command)],
            cwd=self.folder,
            env=clean | {"PATH": path} | environment,
            capture_output=True,
            text=True,
        )

    def pip(self, *arguments, **environment):
        done = self.run("-m", "pip", "install", "-q", "--no-compile", *arguments, **environment)
        if done.returncode:
            raise RuntimeError(f"pip install {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")

    def install(self, **environment) -> str:
        """Install the kernels; returns the backend that then computes."""
        self.pip("--no-build-isolation", "--force-reinstall", "--no-deps", "./kernels", **environment)
        done = self.run("-c", BACKEND)
        return done.stdout.strip() or failed(done)

    def pytest(self, selected: str, **environment) -> str:
        arguments = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "--confcutdir", "tests/kernels")
        return summary(
            self.run("-m", "pytest", *arguments, "-k", selected + self.without, "tests/kernels", **environment)
        )


def find_python(version: str) -> str:
    """The interpreter of this version, or the one that runs this."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    candidates = [*map(str, reversed(pyenv)), f"python{version}"]
    for python in filter(shutil.which, candidates):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:  # a shim may stand for nothing
            return python
    return sys.executable


def summary(done: subprocess.CompletedProcess) -> str:
    """pytest's own last line, without its time."""
    if done.returncode:
        return failed(done)
    return re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1]).strip("= ")


def failed(done: subprocess.CompletedProcess) -> str:
    print(done.stdout[-6000:], done.stderr[-3000:], file=sys.stderr)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return f"FAILED: {lines[-1] if lines else done.returncode}"


def check(environment: Environment) -> list[str]:
    """The cells of one row."""
    versions = environment.run("-c", VERSIONS).stdout.split()
    without = environment.install(CXX="/no/compiler")
    with_compiler = environment.install()
    tests = environment.pytest("not triton")
    small = "(triton or test_gpu) and not (V32003 or V151936 or V152) and not spills"
    interpreted = environment.pytest(small, TRITON_INTERPRET="1")
    static = environment.run("bench/gpu_static.py", "--arch", "sm_90", "--dtype", "bf16")
    compiled = f"{static.stdout.count(' bf16 ')} kernels" if static.returncode == 0 else failed(static)
    return [*versions, without, with_compiler, tests, interpreted, compiled]


COLUMNS = ("", "Python", "torch", "triton", "without a compiler", "with one", "tests", "in the interpreter", "compiled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"which of {', '.join(ROWS)}; all by default")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the environments there and leave them")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"unknown row {', '.join(sorted(unknown))}: choose of {', '.join(ROWS)}")

    print("| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), sep="\n", flush=True)
    cells = []
    for name in arguments.rows or ROWS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.keep or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            row = [name, *check(Environment(folder, ROWS[name]))]
        cells += row
        print("| " + " | ".join(row) + " |", flush=True)
    return int(any(cell.startswith("FAILED") for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
