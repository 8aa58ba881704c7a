"""Samples and where they come from: files in everybody's shapes, the hub, handwritten digits, puzzles."""

from vogue.data.columns import Shape
from vogue.data.dataset import Samples, load_samples
from vogue.data.files import DataError
from vogue.data.samples import Sample, write_parquet

__all__ = ["DataError", "Sample", "Samples", "Shape", "load_samples", "write_parquet"]
