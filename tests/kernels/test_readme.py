"""The worked example of kernels/README.md, run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "kernels" / "README.md"


@pytest.mark.slow
def test_the_worked_example_learns():
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "VogueLoss()" in block
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, *_, last = (float(reward) for reward in re.findall(r"reward ([0-9.]+)", printed))
    assert first < 0.65
    assert last > 0.8
