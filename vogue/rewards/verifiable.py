r"""Where a completion gives its answer, and whether it has the form  <think> … </think>  …  \boxed{answer}"""

import re

from vogue.rewards.writing import is_blank

BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace opens and closes nothing


def boxed(completion: str) -> str | None:
    r"""The content of the last \boxed{…} whose braces close, or None."""
    found, open_braces = (-1, ""), []
    for brace in BRACE.finditer(completion):
        if brace.group() == "}":
            if open_braces and (opening := open_braces.pop()).group() != "{":
                found = max(found, (opening.start(), completion[opening.end() : brace.start()]))
        elif brace.group().endswith("{") and brace.group() != "\\{":
            open_braces.append(brace)
    return found[1].strip() if found[0] >= 0 else None


def is_formatted(completion: str) -> bool:
    r"""Whether a completion opens with its one <think>…</think> and has an answer in a closed \boxed{} behind it.

    Text around the box is allowed: the papers show the format and don't say how it is checked.
    """
    thought, _, rest = completion.partition("</think>")
    return (
        thought.lstrip().startswith("<think>")
        and completion.count("<think>") == completion.count("</think>") == 1
        and not is_blank(boxed(rest) or "")
    )
