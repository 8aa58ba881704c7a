"""A language model behind an OpenAI-compatible endpoint is asked which answer a completion gives.

VOGUE (arXiv 2510.01444) had Qwen2.5-72B-Instruct extract the answers; vLLM serves it with such an endpoint. Ours: the
wording of the question; that the reply is read by the rules of the answer's form, as if it stood in \\boxed{}.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from vogue.benchmarks.extract import NUMERIC, Form
from vogue.endpoint import PARALLEL, Endpoint

QUESTION = """\
Below are a question and a response to it. Which answer does the response give? Don't solve the question yourself.
Reply with the answer alone, as {wanted}, or with none where the response gives no answer.

Question:
{question}

Response:
{response}"""


class Extractor(Endpoint):
    """An endpoint that is asked for the answers of completions."""

    def check(self) -> None:
        """Ask a small question, whose answer doesn't matter; raises EndpointError where that fails."""
        self.extract("What is 1 + 1?", "It is 2.", NUMERIC)

    def extract_all(self, asked: Iterable[tuple[str, str, Form]]) -> Iterator[str | None]:
        """Extract the answers of triples (question, completion, form), in their order, several at a time."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            yield from pool.map(lambda each: self.extract(*each), asked)

    def extract(self, question: str, completion: str, form: Form) -> str | None:
        """The answer that `completion` gives to `question`; None where the model finds none.

        Raises EndpointError where the endpoint refuses, or fails again and again.
        """
        text = QUESTION.format(wanted=form.wanted, question=question, response=completion)
        reply = self.reply(text).strip()
        return None if not reply or reply.strip(".").casefold() == "none" else form.read(reply)
