"""Published benchmarks with their own schemas, prompts, scoring and tables: `vogue eval --benchmark NAME`."""

from vogue.benchmarks.algopuzzlevqa import ALGOPUZZLEVQA
from vogue.benchmarks.benchmark import Average, Benchmark, Line, Problem, Share
from vogue.benchmarks.chartqa import CHARTQA
from vogue.benchmarks.endpoint import Extractor, ExtractorError
from vogue.benchmarks.hallusionbench import HALLUSIONBENCH
from vogue.benchmarks.logicvista import LOGICVISTA
from vogue.benchmarks.mathverse import MATHVERSE
from vogue.benchmarks.mathvista import MATHVISTA
from vogue.benchmarks.wemath import WEMATH

BENCHMARKS = {
    "mathverse": MATHVERSE,
    "mathvista": MATHVISTA,
    "wemath": WEMATH,
    "hallusionbench": HALLUSIONBENCH,
    "chartqa": CHARTQA,
    "logicvista": LOGICVISTA,
    "algopuzzlevqa": ALGOPUZZLEVQA,
}

__all__ = ["BENCHMARKS", "Average", "Benchmark", "Extractor", "ExtractorError", "Line", "Problem", "Share"]
