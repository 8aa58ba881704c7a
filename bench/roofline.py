"""The least time for the steps of vogue_kernels, by operations and by bytes: a bound, not a measurement."""

from typing import NamedTuple


class Rates(NamedTuple):
    operations: float  # of matrix products, per second
    bytes: float  # of copies, read and written, per second


H100 = Rates(798e12, 3.0e12)  # what others measured of it, for products of bfloat16
HEADS = {"Qwen2.5-VL-3B": (2048, 151936), "Qwen2.5-VL-7B": (3584, 152064)}  # D, V


def steps(width: int, vocab: int, n: int, size: int = 2) -> dict[str, tuple[int, int]]:
    """(operations, bytes moved) of each step for n tokens of each branch, with `size` bytes an element."""
    weight, hidden, product = size * vocab * width, size * n * width, 2 * n * vocab * width
    return {
        # the branches' products; the weight and the hidden states read
        "forward of one branch": (product, weight + hidden),
        "forward, both branches": (2 * product, weight + 2 * hidden),
        # logits again, and the two products; the weight read and its gradient written, the gradient of the logits
        # written once and read twice, hidden states read and their gradient written
        "backward of one branch's logprob": (3 * product, 2 * weight + 3 * size * n * vocab + 2 * hidden),
        # the same of both branches
        "backward of both branches' KL": (6 * product, 2 * weight + 6 * size * n * vocab + 4 * hidden),
    }


def of_work(names: tuple[str, ...], width: int, vocab: int, n: int, size: int, rates: Rates) -> tuple[float, int]:
    """(milliseconds of the steps with these names at least, their operations)."""
    found = [steps(width, vocab, n, size)[name] for name in names]
    return sum(bound(*step, rates)[0] for step in found), sum(operations for operations, _ in found)


def bound(operations: int, moved: int, rates: Rates = H100) -> tuple[float, str]:
    """(milliseconds, what sets them)."""
    seconds = {"operations": operations / rates.operations, "bytes": moved / rates.bytes}
    limit = max(seconds, key=seconds.get)
    return 1e3 * seconds[limit], limit
