"""Builds the C++ kernels into vogue, as kernels/setup.py says and does; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

kernels = runpy.run_path(str(Path(__file__).parent / "kernels" / "setup.py"))
setup(ext_modules=[kernels["LIBRARY"]], cmdclass={"build_ext": kernels["CMakeBuild"]})
