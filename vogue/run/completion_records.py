"""What completions.jsonl says of a completion, token by token, and the images beside it in completions/."""

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vogue.data.videos import strip
from vogue.inputs import NOISY, RAW, View
from vogue.run.folder import IMAGES
from vogue.step.groups import Group

SIDE = 448  # pixels of an image's longer side at most
LONGEST = 4  # bytes, and so tokens, of a character


def records(step: int, groups: list[Group], count: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[dict]:
    """Records of `count` completions of `groups`, drawn at random; their images are written to `folder`/completions."""
    places = [(group, i) for group in groups for i in range(len(group.completions))]
    chosen = random.Random(step).sample(places, min(count, len(places)))
    return [completion_record(step, group, i, tokenizer, folder) for group, i in chosen]


def completion_record(step: int, group: Group, i: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict:
    """One completion: `entropy` and `u_per` in nats a token, null where they weren't computed."""
    item, sample, score = group.item, group.item.prompt.sample, group.scores[i]
    trace = group.traces[i] if group.traces else None
    name = f"step_{step:06d}_prompt_{item.number}"
    return {
        "step": step,
        "problem": sample.problem,
        "answer": sample.answer,
        "category": sample.category,
        "completion": group.completions[i].text,
        "branch": group.sources[i],
        "paid": group.paid[i],
        "reward": score.reward,
        "accuracy": score.accuracy,
        "parsed": score.parsed,
        "components": score.components,
        "advantage": group.advantages[i],
        "tokens": pieces(group.completions[i].token_ids, tokenizer),
        "entropy": _rounded(trace.entropy) if trace else None,
        "u_per": _rounded(trace.u_per) if trace and trace.u_per is not None else None,
        "image": _written(_pictures(item.views[RAW]), folder, f"{name}_raw"),
        "perturbed": _written(_pictures(item.views[NOISY]), folder, f"{name}_noisy") if NOISY in item.views else None,
    }


def pieces(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, so that together they are the completion's.

    Of a character that several tokens make the last has all, the others ""; so have special tokens. A tokenizer that
    marks words by spaces (SentencePiece's) loses those before a token.
    """
    texts, start = [], 0
    for end in range(1, len(token_ids) + 1):
        text = str(tokenizer.decode(list(token_ids[start:end]), skip_special_tokens=True))
        if text.endswith("\ufffd") and end - start < LONGEST and end < len(token_ids):
            texts.append("")
        else:
            texts.append(text)
            start = end
    return texts


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _pictures(view: View) -> list[Image.Image]:
    """The images of a view, and of each video its first frames side by side."""
    return [*view.images, *map(strip, view.clips)]


def _written(images: Sequence[Image.Image], folder: Path, name: str) -> list[str]:
    """Where the images are, relative to `folder`."""
    (folder / IMAGES).mkdir(exist_ok=True)
    paths = [f"{IMAGES}/{name}_{number}.webp" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        small = max(image.size) <= SIDE
        if not small:
            image = image.copy()
            image.thumbnail((SIDE, SIDE))
        image.save(folder / path, "WEBP", lossless=small)
    return paths
