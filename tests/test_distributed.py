import subprocess
import sys

import pytest


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_leaves_with_its_exit_code_after_all_that_is_registered_for_the_exit(code):
    script = f"import atexit; atexit.register(print, 'done'); from vogue.distributed import leave; leave({code})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "done\n")
