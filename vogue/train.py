"""What the launcher starts on every rank: `deepspeed --num_gpus 2 --module vogue.train FILE [key=value ...]`."""

import sys

from vogue.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
