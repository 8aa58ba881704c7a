"""What a launcher starts on every rank: `torchrun --nproc-per-node 2 --module vogue.train FILE [key=value ...]`.

DeepSpeed's does alike: `deepspeed --num_gpus 2 --module vogue.train FILE`. It is the command `vogue train`.
"""

import sys

from vogue.cli import command

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    command()
