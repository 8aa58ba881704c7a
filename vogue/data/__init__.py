"""Samples and where they come from: files in the EasyR1 schema, the hub, handwritten digits, puzzles."""

from vogue.data.samples import DataError, Sample, check_images, load_samples, write_parquet

__all__ = ["DataError", "Sample", "check_images", "load_samples", "write_parquet"]
