"""What runs have shown: `vogue report`, one HTML page that needs no network with PNGs beside it, and `curves.png`."""

from vogue.report.figures import plot_curves
from vogue.report.page import write_report

__all__ = ["plot_curves", "write_report"]
