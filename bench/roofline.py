"""The least time an H100 could take for the steps of vogue_kernels, in bfloat16: a bound, not a measurement.

By operations at 798 TFLOP/s and by bytes at 3.0 TB/s: what others measured of it, for bfloat16 products and for copies.
"""

FLOPS, BYTES = 798e12, 3.0e12  # per second
HEADS = {"Qwen2.5-VL-3B": (2048, 151936), "Qwen2.5-VL-7B": (3584, 152064)}  # D, V


def steps(width: int, vocab: int, n: int) -> dict[str, tuple[int, int]]:
    """(operations, bytes moved) of each step for n tokens of each branch."""
    weight, hidden, product = 2 * vocab * width, 2 * n * width, 2 * n * vocab * width
    return {
        # the branches' products; the weight and the hidden states read
        "forward of one branch": (product, weight + hidden),
        "forward, both branches": (2 * product, weight + 2 * hidden),
        # logits again, and the two products; the weight read and its gradient written, the gradient of the logits
        # written once and read twice, hidden states read and their gradient written
        "backward of one branch's logprob": (3 * product, 2 * weight + 3 * 2 * n * vocab + 2 * hidden),
    }


def bound(operations: int, moved: int) -> tuple[float, str]:
    """(milliseconds, what sets them)."""
    seconds = {"operations": operations / FLOPS, "bytes": moved / BYTES}
    limit = max(seconds, key=seconds.get)
    return 1e3 * seconds[limit], limit
