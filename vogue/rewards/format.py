r"""Whether a completion has the form  <think> … </think>  …  \boxed{answer}"""

from vogue.answer_extraction import boxed
from vogue.rewards.tidy_answer import is_blank


def boxed_demonstration(state: str, answer: str) -> tuple[str, str]:
    """A completion of this form that thinks the state and answers, cut behind the thought."""
    return f"<think>{state}</think>", f"\n\\boxed{{{answer}}}"


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
