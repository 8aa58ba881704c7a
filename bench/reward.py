"""What both trainers are paid by in a whole step: random, but the same for the same text.

Random weights earn nothing on the questions; and without rewards that differ vogue would skip its forward passes.
"""

import zlib


def varied(completions: list[str], samples: list[dict[str, str]] | None = None) -> list[float]:
    return [zlib.crc32(text.encode()) % 101 / 100 for text in completions]
