"""A scorer of descriptions of two rows of checkers, for `reward.scorer`: the image is compared with what is described.

    reward: {scorer: {function: "examples/puzzles/redrawn.py:likeness"}, similar_enough: 1}

No model of CLIP's kind knows these drawings. The two rows that a description names are drawn as the data is, and the
cosine is that of both pictures' ink: 1 for a right description alone, 0.77 in the mean for another puzzle's.
"""

import re

import numpy as np
from PIL import Image

from vogue.data.puzzles.checker_move import paint
from vogue.data.puzzles.drawing import Canvas

ROWS = re.compile(r"Start: ([GR_]{2,12})\nEnd: ([GR_]{2,12})")


def likeness(completion: str, sample: dict) -> float:
    """The cosine of the image and the described rows, from 0 to 1; 0 where nothing else, or no rows, is described."""
    found = ROWS.fullmatch(completion)
    if found is None:
        return 0.0
    image = Image.open(sample["images"][0]).convert("RGB")
    canvas = Canvas(image.width)
    paint(found[1], found[2], canvas)
    seen, described = _ink(image), _ink(canvas.image())
    return float(seen @ described / np.linalg.norm(seen) / np.linalg.norm(described))


def _ink(image: Image.Image) -> np.ndarray:
    """What isn't white, as one vector: paper, of which both pictures have much, is alike in all."""
    return 255.0 - np.asarray(image, dtype=np.float64).ravel()
