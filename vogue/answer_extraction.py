r"""Where a text says what its answer is:  \boxed{answer}  or  <answer> answer </answer>"""

import re

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


def tagged_answer(completion: str) -> str | None:
    r"""The content of the last <answer>…</answer>, or of the last \boxed{} in it; None without an <answer>."""
    found = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    if not found:
        return None
    inner = boxed(found[-1])
    return found[-1].strip() if inner is None else inner
