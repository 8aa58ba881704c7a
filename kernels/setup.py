"""Builds the C++ kernels, where that is possible; everything else is declared in pyproject.toml.

Two distributions have them: vogue-kernels, built from this folder, and vogue, whose setup.py takes its build from here.

The kernels are one plain shared library (`vogue_kernels/cpu/_C.so`, no Python API inside) whose
operators register themselves with torch when `torch.ops.load_library` opens it. It has to be
compiled against the torch it will run beside, so install with `--no-build-isolation`. Without
torch or a compiler the installation still succeeds, says so in one line, and vogue_kernels
computes with its `torch` backend.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        build_dir = ROOT / "build" / "library"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        torch = importlib.util.find_spec("torch")  # found, not imported: that takes seconds
        if torch is None:
            return skip("torch isn't visible to the build (pip install torch, then pip install --no-build-isolation)")
        torch_dir = Path(torch.origin).parent

        # `python -m pip` of an environment that isn't activated doesn't see that environment's cmake.
        env = os.environ | {"PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
        configure = [
            "cmake", "-S", ROOT, "-B", build_dir, "--fresh", "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH_DIR={torch_dir}", f"-DOUTPUT_DIR={target.parent}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, env=env, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            return skip("cmake isn't installed (pip install cmake ninja)")
        except subprocess.CalledProcessError as error:
            return skip("cmake can't configure it: " + reason(error.stderr))
        # From here on a failure is a mistake in the sources, and an error.
        subprocess.run(["cmake", "--build", build_dir], env=env, check=True)


def skip(why):
    print(f"vogue_kernels: installing without the C++ kernels, because {why}.", file=sys.stderr)


def reason(cmake_output):
    """The first sentence under cmake's first `CMake Error`."""
    lines = [line.strip() for line in cmake_output.splitlines()]
    errors = [i for i, line in enumerate(lines) if line.startswith("CMake Error")]
    told = [line for line in lines[errors[0] :] if line] if errors else lines
    return " ".join(told[:3])[:300]


# optional: an editable installation doesn't insist on a library that wasn't built.
LIBRARY = Extension("vogue_kernels.cpu._C", sources=[], optional=True)

if __name__ == "__main__":
    setup(ext_modules=[LIBRARY], cmdclass={"build_ext": CMakeBuild})
