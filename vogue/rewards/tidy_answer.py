r"""Different ways to write the same answer become one: full-width characters, LaTeX's markup, "the answer is", quotes.

`tidy` changes no meaning; what an answer says is read from what it returns (`vogue.rewards.answer_types`).
"""

import re
import unicodedata

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\u2066-\u2069\ufeff]")
LETTER_MARK = re.compile(r"^\s*([A-J])、")  # of an option; elsewhere the mark is a comma
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
VULGAR = re.compile("[¼½¾⅐-⅞]")
SIGNS = {
    **dict.fromkeys("−–—‐‑‒―", "-"),
    **dict.fromkeys("。｡", "."),
    "∶": ":",
    **dict.fromkeys("‘’′´`", "'"),
    **dict.fromkeys("“”„«»", '"'),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    "、": ",",
    "×": r"\times ",
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "∠": r"\angle ",
    "°": r"^\circ ",
}
GREEK = {
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu"},
    **{"π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega"},
}
SIGNS_TABLE = str.maketrans(SIGNS | {letter: rf"\{name} " for letter, name in GREEK.items()})
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname\*?)\s*\{([^{}]*)\}")
LATEX = [  # in this order
    (re.compile(r"\\left\s*\.|\\right\s*\."), ""),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|boldsymbol)(?![A-Za-z])"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"^([+-]?)\s*\$(?=[0-9.,]+$)|\\\$\s*(?=[0-9.])"), r"\1USD "),
    (re.compile(r"\\\$|\$|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\leq(?:slant)?(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\geq(?:slant)?(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\(?:text)?degrees?(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt(?=\s*[({])"), r"\\sqrt"),
    (re.compile(r"\\sqrt\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"_\s*([0-9]+|[A-Za-z])"), r"_{\1}"),
    (re.compile(r"(?<![\w})\]])\+\s*(?=\\infty)"), ""),
    (re.compile(r"\^\s*([+-]?[0-9]+(?:\.[0-9]+)?)"), r"^{\1}"),
]
EMPHASIS = re.compile(r"(?<![*\w])(\*\*|__|\*)(?=\S)([^*]+?)(?<=\S)\1(?![*\w])")
ROOT = re.compile(r"\\sqrt\s*\(")
ANNOUNCED = re.compile(
    r"(?:(?:so|thus|hence|therefore)[\s,]+)?(?:the\s+|my\s+)?(?:(?:final|correct|right)\s+)?answer\s*(?:is\b\s*:?|:|=)\s*"
    r"|(?:最终|正确|所以|因此|故)*答案?\s*(?:[是为]\s*:?|:)\s*|(?:故|所以)选\s*|\\approx\s+|=\s*(?=\S)",
    re.IGNORECASE,
)
SHOWN = 500  # characters in which an answer would show
NOTHING = re.compile(r"(?:[\s?.\-_*!,;:'\"~{}()]|\\(?:[lc]?dots|square|text|phantom|underline|boxed)(?![A-Za-z]))*")


def tidy(text: str) -> str:
    """`text` in one way of writing, on one line."""
    text = LETTER_MARK.sub(r"\1. ", INVISIBLE.sub("", text))
    text = VULGAR.sub(lambda found: _fraction(found.group()), text)
    text = RAISED_RUN.sub(lambda run: "^{" + run.group().translate(RAISED) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(SIGNS_TABLE)).translate(SIGNS_TABLE)
    while text != (text := TEXT.sub(r" \1 ", text)):
        pass
    text = EMPHASIS.sub(r"\2", text)
    for pattern, written in LATEX:
        text = pattern.sub(written, text)
    text = _trimmed(_roots(" ".join(text.split())))
    return _trimmed(ANNOUNCED.sub("", text, count=1)) if ANNOUNCED.match(text) else text


def is_blank(text: str) -> bool:
    r"""Whether `text` gives no answer at all: nothing, or nothing but marks such as "?", "..." and \ldots."""
    return NOTHING.fullmatch(tidy(text[:SHOWN])) is not None


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes, whatever its kind; -1 where it doesn't."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place
    return -1


def _trimmed(text: str) -> str:
    """Without quotes, grouping braces and \\boxed{} around it, and without a mark at its end."""
    while True:
        before = text
        text = text.strip().rstrip(".,;:").strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1]
        opening = re.match(r"(?:\\boxed\s*)?\{", text)
        if opening and closing(text, opening.end() - 1) == len(text) - 1 and _is_group(text, opening.end()):
            text = text[opening.end() : -1]
        if text == before:
            return text


def _is_group(text: str, start: int) -> bool:
    """Whether braces that open before `start` hold one thing: with a comma in them, people mean a set."""
    return text.startswith("\\") or not re.search("[,;]", text[start:])


def _roots(text: str) -> str:
    r"""Write \sqrt(…) as \sqrt{…}, which LaTeX's readers take for \sqrt{(} and more."""
    while found := ROOT.search(text):
        end = closing(text, found.end() - 1)
        if end < 0:
            return text
        text = f"{text[: found.start()]}\\sqrt{{{text[found.end() : end]}}}{text[end + 1 :]}"
    return text


def _fraction(character: str) -> str:
    above, below = unicodedata.normalize("NFKC", character).split("⁄")
    return rf"\frac{{{above}}}{{{below or 10}}}"
