"""The record of a completion: its keys, its tokens' texts and values, and the images beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from steps import group_of

from vogue.data import Sample
from vogue.inputs import Prompt, View
from vogue.rewards import Score
from vogue.rollout.engine import Completion
from vogue.run.completion_records import pieces, records
from vogue.step.groups import Trace
from vogue.step.loader import Item

PIXELS = np.random.default_rng(0)
KEYS = (
    *(
        "step",
        "problem",
        "answer",
        "category",
        "completion",
        "branch",
        "paid",
        "reward",
        "accuracy",
        "parsed",
        "components",
        "advantage",
    ),
    *("tokens", "entropy", "u_per", "image", "perturbed"),
)


def image(width, height):
    return Image.fromarray(PIXELS.integers(0, 256, (height, width, 3), dtype=np.uint8))


def group(tokenizer, raw, noisy=None, texts=("4<|im_end|>", "né"), number=12):
    completions = []
    for text in texts:
        ids = tuple(tokenizer(text)["input_ids"])
        completions.append(Completion(ids, (0.0,) * len(ids), tokenizer.decode(ids, skip_special_tokens=True), True))
    prompt = Prompt(Sample("2 + 2?", "4", (), category="sums"), (), None, None)
    views = {name: View(tuple(images), None, None) for name, images in {"raw": raw, "noisy": noisy}.items() if images}
    item = Item(number, prompt, {"raw": View((), None, None)} | views, (False,) * len(texts))
    scores = tuple(Score(0.1 + i, float(i == 0), 1.0, None, {"think": 0.5}) for i in range(len(texts)))
    advantages = tuple(float(1 - 2 * i) for i in range(len(texts)))
    return group_of(item, tuple(completions), scores=scores, advantages=advantages)


def traced(group, with_u_per):
    values = [torch.arange(1, 1 + len(c.token_ids)) / 3 for c in group.completions]
    return replace(group, traces=tuple(Trace(v, v / 1000 if with_u_per else None, -v) for v in values))


@pytest.mark.parametrize("text", ["<think>Left.</think>\\boxed{4}<|im_end|>", "né 日本 ½🙂!", "", "  two  spaces\n"])
def test_the_texts_of_the_tokens_are_together_the_completions_text(processor, text):
    tokenizer = processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(found)


def test_bytes_that_are_no_character_go_with_the_token_after_them(processor):
    _, second, mark = processor.tokenizer("é!")["input_ids"]  # a byte a token
    assert pieces([second, mark], processor.tokenizer) == ["", "\ufffd!"]
    assert pieces([mark, second], processor.tokenizer) == ["!", "\ufffd"]


def test_a_record_has_its_keys_and_the_values_of_its_tokens(processor, tmp_path):
    made = traced(group(processor.tokenizer, [image(8, 4)], [image(8, 4)]), with_u_per=True)
    first, second = sorted(records(3, [made], 8, processor.tokenizer, tmp_path), key=lambda row: -row["advantage"])
    assert tuple(first) == KEYS
    assert first["step"] == 3
    assert (first["problem"], first["answer"], first["category"], first["completion"]) == ("2 + 2?", "4", "sums", "4")
    assert (first["branch"], first["reward"], first["accuracy"], first["advantage"]) == ("raw", 0.1, 1.0, 1.0)
    assert first["components"] == {"think": 0.5}
    assert first["tokens"] == ["4", ""]
    assert first["entropy"] == [0.33333, 0.66667]
    assert first["u_per"] == [0.00033333, 0.00066667]
    assert first["image"] == ["completions/step_000003_prompt_12_raw_0.webp"]
    assert first["perturbed"] == ["completions/step_000003_prompt_12_noisy_0.webp"]
    assert "".join(second["tokens"]) == "né"


def test_what_was_not_computed_is_null(processor, tmp_path):
    plain = group(processor.tokenizer, [image(8, 4)])
    half = replace(plain, traces=(None, Trace(torch.ones(3), None, -torch.ones(3))))
    for made, expected in ((plain, [None, None]), (half, [None, [1.0] * 3])):
        rows = records(0, [made], 8, processor.tokenizer, tmp_path)
        assert sorted((row["entropy"] for row in rows), key=bool) == expected
        assert {(row["u_per"], row["perturbed"]) for row in rows} == {(None, None)}


def test_the_branch_of_a_completion_is_the_image_it_was_generated_from(processor, tmp_path):
    made = replace(group(processor.tokenizer, []), sources=("raw", "noisy"))
    rows = records(0, [made], 8, processor.tokenizer, tmp_path)
    assert {row["advantage"]: row["branch"] for row in rows} == {1.0: "raw", -1.0: "noisy"}


def test_small_images_are_written_as_they_are_and_large_ones_smaller(processor, tmp_path):
    small, large = image(448, 20), image(900, 600)
    made = group(processor.tokenizer, [small, large])
    row, _ = records(1, [made], 8, processor.tokenizer, tmp_path)
    assert row["image"] == [f"completions/step_000001_prompt_12_raw_{i}.webp" for i in (0, 1)]
    written = [Image.open(tmp_path / path) for path in row["image"]]
    assert {file.format for file in written} == {"WEBP"}
    assert np.array_equal(np.asarray(written[0].convert("RGB")), np.asarray(small))
    assert written[1].size == (448, 299)
    assert large.size == (900, 600)


def test_a_sample_without_images_has_none(processor, tmp_path):
    row, _ = records(1, [group(processor.tokenizer, [])], 8, processor.tokenizer, tmp_path)
    assert row["image"] == []


def test_equal_steps_choose_equal_completions(processor, tmp_path):
    groups = [group(processor.tokenizer, [], number=number, texts=("a", "b", "c")) for number in range(9)]
    names = [
        [row["completion"] for row in records(step, groups, 5, processor.tokenizer, tmp_path)] for step in (0, 0, 1)
    ]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 5
    assert records(0, groups, 0, processor.tokenizer, tmp_path) == []
