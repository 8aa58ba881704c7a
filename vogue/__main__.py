"""`python -m vogue`, the same as the command `vogue`."""

import sys

from vogue.cli import main

if __name__ == "__main__":
    sys.exit(main())
