"""The folder kernels/ beside Hugging Face's package `kernels`, which transformers imports where it is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What transformers imports from it; decorators that change nothing.
PACKAGE = """
use_kernel_forward_from_hub = use_kernelized_func = lambda *names: lambda decorated: decorated
replace_kernel_forward_from_hub = register_kernel_mapping = use_kernel_mapping = get_kernel = kernelize = None
CUDAProperties = Device = LayerRepository = LocalLayerRepository = Mode = ROCMProperties = None
"""
SCRIPT = """
import sys
sys.path.append({packages!r})  # after the working directory, as site-packages are
import kernels, vogue_kernels
from transformers.integrations import hub_kernels
print(hub_kernels.is_kernels_available(), kernels.__file__)
"""


@pytest.mark.slow
def test_at_the_root_transformers_finds_the_package_not_the_folder(tmp_path):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package, metadata = tmp_path / "kernels" / "__init__.py", tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.parent.mkdir()
    package.write_text(PACKAGE)
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    command = [sys.executable, "-c", SCRIPT.format(packages=str(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"True {package}"
