r"""From a sample to the chat a Hugging Face processor renders."""

from vogue.data.samples import PLACEHOLDER, Sample

SYSTEM_PROMPT = (
    "Think first: work through the question as an inner monologue inside <think></think>. "
    "Then give the final answer inside \\boxed{}."
)


def chat_messages(sample: Sample, system_prompt: str = SYSTEM_PROMPT) -> list[dict]:
    """The conversation up to the model's turn, in the multimodal chat format of Hugging Face.

    Each `<image>` of the problem becomes an {"type": "image"} part where it stands; with none,
    the images come first. An empty system prompt adds no system message.
    """
    system = [_message("system", [_text(system_prompt)])] if system_prompt else []
    return [*system, _message("user", _parts(sample))]


def _parts(sample: Sample) -> list[dict]:
    problem = sample.problem
    if PLACEHOLDER not in problem:
        problem = PLACEHOLDER * len(sample.images) + problem
    before, *rest = problem.split(PLACEHOLDER)
    parts = [_text(before)]
    for text in rest:
        parts += [{"type": "image"}, _text(text)]
    return [part for part in parts if part.get("text") != ""]


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _message(role: str, content: list[dict]) -> dict:
    return {"role": role, "content": content}
