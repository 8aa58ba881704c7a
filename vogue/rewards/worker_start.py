"""How a worker's process starts on Linux: it asks the kernel to be killed with its parent, then becomes the worker.

    python worker_start.py PARENT SCRIPT ARGUMENTS…

Its input closes when the parent ends, which a worker that hangs in the middle of C code doesn't see.
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h

if __name__ == "__main__":
    parent, script = sys.argv[1:3]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it has ended before that
        sys.exit(1)
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")
