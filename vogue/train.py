"""What the launcher starts on every rank: `deepspeed --num_gpus 2 --module vogue.train FILE [key=value ...]`."""

import sys

from vogue.cli import main

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])

    from vogue.distributed import leave  # imports torch, which a wrong setting needn't wait for

    leave(code)
