"""Reinforcement learning of vision-language models from verifiable rewards, exploring where the image is ambiguous."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vogue")  # that of the installation, which vogue_kernels states
except PackageNotFoundError:  # a checkout on the path, without an installation: which version it is, nobody recorded
    __version__ = "0+not-installed"
