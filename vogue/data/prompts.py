r"""A sample becomes the chat that a Hugging Face processor renders."""

import re
from dataclasses import replace

from vogue.config import Config
from vogue.data.files import DataError
from vogue.data.samples import PLACEHOLDER, VIDEO, Sample

KINDS = {PLACEHOLDER: "image", VIDEO: "video"}
MARK = re.compile(f"({'|'.join(KINDS)})")
VIEWS = ("image", "noisy", "text", "both")
ANSWER = "Then give the final answer, and nothing else, inside <answer></answer>."
THINK = "work through the question as an inner monologue inside <think></think>"
BOXED = "Then give the final answer inside \\boxed{}."
FOUR_TAGS = (
    "First describe what the image shows, as far as the question needs it, inside <description></description>. "
    f"Then {THINK}. Then look at the image again, check the description and the monologue against it, and correct "
    f"them where they are wrong, inside <rethink></rethink>. {ANSWER}"
)
FOUR_HEADINGS = (
    "Answer in four parts, each under its own heading. Under '### Image Description:' describe what the image shows. "
    "Under '### Rationales:' say how the question can be solved and what of the image it takes. Under '### Let's think "
    "step by step.' solve it step by step. Behind '### The final answer is:' give the final answer, and nothing else."
)
SYSTEM_PROMPTS = {  # what each reward design asks for
    "verifiable": f"Think first: {THINK}. {BOXED}",
    "vanilla": f"Think first: {THINK}. {ANSWER}",
    "only_accuracy": f"Think first: {THINK}. {ANSWER}",
    "mixture": FOUR_TAGS,
    "continuous": FOUR_TAGS,
    "visual_fusion": f"Think first: {THINK}. Within it, each time you look at the image, write down what you see there "
    f"inside <visual></visual>. {ANSWER}",
    "no_accuracy": FOUR_TAGS,
    "vision_sr1": "First describe the image inside <description></description>, in such detail that someone who cannot "
    f"see it can answer the question from the description. Then {THINK}. {BOXED}",
    "pebr_perception": FOUR_HEADINGS,
    "pebr_reasoning": FOUR_HEADINGS,
}
SYSTEM_PROMPT = SYSTEM_PROMPTS["verifiable"]


def system_prompt(config: Config) -> str:
    """The system prompt: `data.system_prompt` where it is set, even to nothing, and the reward design's otherwise.

    With `data.format_prompt`, which says in the question itself what is asked for, it is none unless it is set.
    """
    asked = config.data.system_prompt
    if asked is None and config.data.format_prompt is not None:
        return ""
    return SYSTEM_PROMPTS[config.reward.design] if asked is None else asked


def chat_messages(sample: Sample, system_prompt: str = SYSTEM_PROMPT) -> list[dict]:
    """The conversation up to the model's turn, in the multimodal chat format of Hugging Face.

    Each `<image>` of the problem becomes an {"type": "image"} part where it stands, each `<video>` a video; with
    neither, the images and then the videos come first. An empty system prompt adds no system message.
    """
    system = [_message("system", [_text(system_prompt)])] if system_prompt else []
    return [*system, _message("user", _parts(sample))]


def with_view(sample: Sample, view: str) -> Sample:
    """`sample` with its images and videos ("image"), with its printed state instead ("text"), or with both ("both").

    The state stands where the last of them stood, or behind it. "noisy" is as "image": the images that it asks for are
    T(x), which takes settings and a seed (`vogue.evaluate`).

    A model that answers from the text what it doesn't from the image fails at seeing, not at thinking: the
    perception diagnosis of arXiv 2601.00215.

    Raises DataError for an unknown view, and where a sample has no state to print.
    """
    if view not in VIEWS:
        raise DataError(f"view is {view!r}; it must be one of {', '.join(VIEWS)}.")
    if view in ("image", "noisy"):
        return sample
    if not sample.state:
        raise DataError(
            f"{sample.place}: view {view!r} needs a 'state', all that the images show as text; it is empty."
        )
    problem = sample.problem
    behind = max((match.end() for match in MARK.finditer(problem)), default=0)
    problem = f"{problem[:behind]}{sample.state}\n\n{problem[behind:]}"
    if view == "both" and sample.images + sample.videos:
        return replace(sample, problem=problem)
    return replace(sample, problem=MARK.sub("", problem), images=(), videos=())


def _parts(sample: Sample) -> list[dict]:
    problem = sample.problem
    if PLACEHOLDER not in problem and VIDEO not in problem:
        problem = PLACEHOLDER * len(sample.images) + VIDEO * len(sample.videos) + problem
    parts = [{"type": KINDS[piece]} if piece in KINDS else _text(piece) for piece in MARK.split(problem)]
    return [part for part in parts if part.get("text") != ""]


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _message(role: str, content: list[dict]) -> dict:
    return {"role": role, "content": content}
