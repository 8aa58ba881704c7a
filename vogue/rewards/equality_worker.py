r"""The process of `vogue.rewards.equality`: answers [given, right answer] with whether they are equal.

A script that imports nothing of vogue, so that it starts soon. What is asked is answered in a child of this process:
a question that takes too long ends the child, inside C code too, and another one is there at once.

Two expressions are equal where their values are: exactly, or to 30 digits, at numbers in place of their variables. An
equation, or an inequality, is another one where both are the same multiple of their difference of sides. Sets and
inequalities are compared by math-verify.
"""

import functools
import gc
import json
import logging
import os
import random
import re
import resource
import signal
import sys
import time

MEMORY_BYTES = 4 << 30  # of address space: 10^(10^10) alone would take 4 GB
DIGITS, AGREEING = 40, 30  # that values are computed to, and that must agree
SIGNS = ((1, 1), (-1, 1), (1, -1), (1, 1), (-1, -1))  # of variables in turn, at each point of comparison
FEWEST = 2  # of those, at which both must have a value
DECIMAL = re.compile(r"[+-]?\s*([0-9]*)\.([0-9]+)")
ROUNDED = 6  # significant digits of a decimal that may stand for a value that rounds to it


def work(cpu_seconds: float) -> None:
    """Answer questions from stdin until it closes, in children that `cpu_seconds` a question may end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, for the trainer, which ends this process itself
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is not a reply
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    equal("x^{2} + \\frac{1}{2}", "\\sqrt{2}")  # imports everything and fills the parser's tables
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        child = os.fork()
        if child == 0:
            answer(cpu_seconds, replies)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:  # nothing is left to answer
            return
        print(json.dumps({"failed": os.waitstatus_to_exitcode(status)}), file=replies, flush=True)


def answer(cpu_seconds: float, replies) -> None:
    """Answer questions until there are no more, or one ends this process."""
    gc.disable()  # what is made for an expression is let go with it, or kept in `parsed`
    for line in sys.stdin:
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF, unhandled, ends the process
        found = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        spent = time.process_time() - began
        print(json.dumps({"equal": bool(found), "seconds": spent}), file=replies, flush=True)


def equal(given: str, right: str) -> bool:
    """Whether two expressions in LaTeX are equal; False for what can't be read."""
    try:
        return same(parsed(given), parsed(right), tolerance(given, right))
    except Exception:  # of the reader's and SymPy's many, on what a model wrote
        return False


@functools.lru_cache(maxsize=4096)
def parsed(text: str):
    from sympy import Basic, Float, I, Rational, Symbol

    found = reader()(text)
    if isinstance(found, Basic):
        found = found.xreplace({decimal: Rational(str(decimal)) for decimal in found.atoms(Float)})
        found = found.subs(Symbol("i"), I) if Symbol("i") in found.free_symbols else found
    return found


@functools.cache
def reader():
    """math-verify's reader of LaTeX, in a third less time.

    ANTLR's quick prediction, SLL, reads what it can read as the full one does; what it can't goes to the full one.
    SymPy would send each whole number through its own parser, which compiles it as Python.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
    from sympy import Integer

    class Reader(_Latex2Sympy):
        prediction = PredictionMode.SLL

        def create_parser(self, latex_str):
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = self.prediction
            return parser

        def parse_number(self, text):
            return Integer(int(text)) if text.isascii() and text.isdigit() else super().parse_number(text)

    class Whole(Reader):
        prediction = PredictionMode.LL

    config = ConversionConfig(lowercase_symbols=False)

    def read(text: str):
        try:
            return Reader(config=config).parse(text)
        except Exception:  # a mistake in the text, or one that only the full prediction sees through
            return Whole(config=config).parse(text)

    return read


def tolerance(given: str, right: str):
    """Half a unit of the last place, where one side alone is a decimal, of at least six significant digits; or None."""
    from sympy import Rational

    decimals = [found for found in map(DECIMAL.fullmatch, (given, right)) if found]
    if len(decimals) != 1 or len("".join(decimals[0].groups()).lstrip("0")) < ROUNDED:
        return None
    return Rational(1, 2 * 10 ** len(decimals[0][2]))


def same(given, right, near) -> bool:
    """Whether two parsed expressions are equal; `near`: how far apart constants may be, None for not at all."""
    import sympy
    from math_verify import verify
    from sympy.core.relational import Relational

    if isinstance(given, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return given.shape == right.shape and all(
            same(a, b, near) for a, b in zip(given.flat(), right.flat(), strict=True)
        )
    if isinstance(given, sympy.Expr) and isinstance(right, sympy.Expr):
        return same_value(given.doit(), right.doit(), near)
    if isinstance(given, Relational) and isinstance(right, Relational):
        return same_relation(given, right)
    if isinstance(given, sympy.Expr) or isinstance(right, sympy.Expr):
        return False
    return verify(right, given, allow_set_relation_comp=True, timeout_seconds=None)


def same_value(given, right, near) -> bool:
    if given.is_Rational and right.is_Rational:
        return given == right
    variables = sorted(given.free_symbols | right.free_symbols, key=str)
    if not variables:
        value, expected = number(given), number(right)
        return value is not None and expected is not None and agree(value, expected, near)
    agreed = 0
    for point in points(variables):
        value, expected = number(given.subs(point)), number(right.subs(point))
        if value is None or expected is None:
            continue
        if min(point.values()) < 0 and not (value.is_real or expected.is_real):
            continue  # where neither is real, roots of negative numbers have branches
        if not agree(value, expected, None):
            return False
        agreed += 1
    return agreed >= FEWEST


def same_relation(given, right) -> bool:
    """Whether one difference of sides is a constant multiple of the other, a positive one of an inequality."""
    if type(given) is not type(right):
        right = right.reversed
    if type(given) is not type(right):
        return False
    sides = [(relation.lhs - relation.rhs).doit() for relation in (given, right)]
    variables = sorted(sides[0].free_symbols | sides[1].free_symbols, key=str)
    ratios = []
    for point in points(variables) if variables else ():
        above, below = (number(side.subs(point)) for side in sides)
        if above is not None and below:
            ratios.append(above / below)
    directed = not type(given).__name__.startswith(("Equality", "Unequality"))
    return (
        len(ratios) >= FEWEST
        and ratios[0] != 0
        and all(agree(ratios[0], ratio, None) for ratio in ratios)
        and (not directed or (ratios[0].is_real and ratios[0] > 0))
    )


def points(variables) -> list[dict]:
    """Numbers in place of the variables, the same each time: half of them all positive, the others of both signs."""
    from sympy import Rational

    draw = random.Random(0)
    return [
        {v: signs[k % 2] * Rational(draw.randint(1, 4000), 1009) for k, v in enumerate(variables)} for signs in SIGNS
    ]


def number(expression):
    """The value of an expression, None where it has none."""
    value = expression.evalf(DIGITS, maxn=DIGITS * 10)
    return value if value.is_number and value.is_finite else None


def agree(given, right, near) -> bool:
    from sympy import Float

    distance = abs(given - right).evalf(DIGITS)
    if near is not None:
        return bool(distance <= near)
    return bool(distance <= abs(right).evalf(DIGITS) * Float(f"1e-{AGREEING}"))


if __name__ == "__main__":
    work(float(sys.argv[1]))
