"""`python -m vogue`, the same as the command `vogue`."""

from vogue.cli import command

if __name__ == "__main__":
    command()
