"""Samples and where they come from: files in everybody's shapes, the hub, handwritten digits, puzzles."""

from vogue.data.dataset import Samples, load_samples
from vogue.data.files import DataError
from vogue.data.samples import Sample, write_parquet
from vogue.data.shapes import Shape

__all__ = ["DataError", "Sample", "Samples", "Shape", "load_samples", "write_parquet"]
