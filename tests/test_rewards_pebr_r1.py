"""PeBR-R1's designs by hand, with a scorer in its process, and the split of a data set that its stages train on."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vogue.cli import main
from vogue.config import load_config
from vogue.config.sections import RewardConfig
from vogue.data import DataError, Sample, load_samples, write_parquet
from vogue.data.puzzles import puzzle_samples
from vogue.difficulty import level
from vogue.rewards import RewardError, check_function, score, score_batch
from vogue.rewards.explain import steps
from vogue.rewards.pebr_r1 import (
    description,
    has_headings,
    headed_answer,
    headed_demonstration,
    keyword_score,
    keywords_of,
    length_score,
    share_of_enough,
)
from vogue.settings import ConfigError

EXAMPLES = Path(__file__).parents[1] / "examples"
COMPLETION = """\
### Image Description:
A circle and a SUM.
### Rationales:
Add the numbers.
### Let's think step by step.
5 + 7 = 12
### The final answer is: {}"""


@pytest.fixture
def sample():
    image = Image.new("RGB", (40, 20), (200, 0, 0))
    return Sample("How many?", "12", (image,), columns={"keywords": ["Sum", "circle", "square"]})


@pytest.fixture
def perception(tmp_path):
    """A function: the design's settings with a scorer that returns the red share of the first image's first pixel."""
    (tmp_path / "scorers.py").write_text(
        "from PIL import Image\n\n"
        "def red(completion, sample, factor=1.0):\n"
        "    if not completion:\n"
        "        return -0.2\n"
        "    assert completion == 'A circle and a SUM.', completion\n"
        "    assert sample['answer'] == '12'\n"
        "    return factor * Image.open(sample['images'][0]).getpixel((0, 0))[0] / 1000\n"
    )

    def build(factor=1.0, **given):
        scorer = {"function": f"{tmp_path}/scorers.py:red", "options": {"factor": factor}}
        return RewardConfig(design="pebr_perception", scorer=scorer, **given)

    return build


# ----------------------------------------------------------------------------------------------------------- by hand


def test_similarity_is_a_share_of_what_is_enough():
    assert [share_of_enough(cosine, 0.4) for cosine in (0.28, 0.4, 0.5, -0.2)] == pytest.approx([0.7, 1, 1, -0.5])


def test_keywords_are_substrings_of_any_case():
    assert keyword_score("the sum is 12", ["Sum", "circle", "12"]) == pytest.approx(2 / 3)
    assert keyword_score("the sum is 12", ["1"]) == 1
    assert keyword_score("the sum is 12", []) == 0


def test_a_longer_completion_than_expected_has_a_share():
    assert [length_score(tokens, 512) for tokens in (1, 512, 1024)] == [1, 1, 0.5]


def test_keywords_are_a_list_or_a_text_with_semicolons(sample):
    assert keywords_of(sample) == ["Sum", "circle", "square"]
    assert keywords_of(replace(sample, columns={"keywords": " red ;blue circle;"})) == ["red", "blue circle"]
    assert keywords_of(replace(sample, columns={})) == []
    with pytest.raises(RewardError, match=r"sample: keywords=3 is neither a list of texts nor a text with semicolons"):
        keywords_of(replace(sample, columns={"keywords": 3}))


def test_a_completion_is_read_by_its_headings():
    text = COMPLETION.format("12")
    assert description(text) == "A circle and a SUM."
    assert description("A circle.") == ""
    assert headed_answer(text) == "12"
    assert headed_answer(COMPLETION.format(r"$\boxed{12}$")) == "12"
    assert headed_answer("It is 12") == "It is 12"
    assert has_headings(text)
    assert has_headings("\n".join(reversed(text.splitlines())))
    assert not has_headings(text.replace("### Rationales:", ""))


@pytest.mark.parametrize(("answer", "reward"), [("12", 1.0), ("13", 0.1)])
def test_reasoning_is_nine_tenths_accuracy(answer, reward):
    found = score(COMPLETION.format(answer), "12", RewardConfig(design="pebr_reasoning"))
    assert (found.reward, found.parsed) == (pytest.approx(reward), answer)


# ------------------------------------------------------------------------------------------------------- perception


def test_perception_pays_for_what_is_seen_and_not_for_the_answer(perception, sample):
    settings = perception(factor=1.4)  # 0.28 of a cosine
    texts = [COMPLETION.format("12"), COMPLETION.format("13"), "the sum"]
    found = score_batch(texts, [sample] * 3, settings, tokens=[512, 1024, 100])
    assert [one.components for one in found] == [
        {"similarity": pytest.approx(0.7), "keywords": pytest.approx(2 / 3), "length": 1},
        {"similarity": pytest.approx(0.7), "keywords": pytest.approx(2 / 3), "length": 0.5},
        {"similarity": pytest.approx(-0.5), "keywords": pytest.approx(1 / 3), "length": 1},
    ]
    # 0.4 · 0.7 + 0.4 · 2/3 + 0.1 + 0.1 · 1/2 = 0.6967 of the second
    assert [one.reward for one in found] == pytest.approx([0.746667, 0.696667, -0.2 + 0.133333 + 0.1], abs=1e-6)
    assert [one.accuracy for one in found] == [1, 0, 0]
    assert [one.format for one in found] == [1, 1, 0]


def test_the_scorer_of_the_checkers_is_1_for_a_right_description_alone():
    (made,) = puzzle_samples(["checker_move"], "train", 1, seed=0, size=112)
    assert made.state == "Start: RGGG_RR\nEnd: R_GGGRR"
    wrong = ["Start: RGG_GRR\nEnd: R_GGGRR", "Start: RGGG_R\nEnd: R_GGGRR", "Start: R_GGGRR\nEnd: RGGG_RR"]
    nothing = ["", "Start: RGGG_RR", f"{made.state}\nEnd: R_GGGRR", "Start: RGGG_RR\nEnd: 3"]
    scorer = {"function": f"{EXAMPLES}/puzzles/redrawn.py:likeness"}
    settings = RewardConfig(design="pebr_perception", scorer=scorer, similar_enough=1)
    texts = ["".join(headed_demonstration(state, "3")) for state in (made.state, *wrong, *nothing)]
    found = [one.components["similarity"] for one in score_batch(texts, [made] * 8, settings, tokens=[1] * 8)]
    assert found[0] == pytest.approx(1)
    assert all(0.5 < cosine < 0.98 for cosine in found[1:4])
    assert found[4:] == [0] * 4


def test_a_weight_of_0_calls_no_scorer(sample):
    settings = RewardConfig(design="pebr_perception", weights={"similarity": 0})
    (found,) = score_batch([COMPLETION.format("12")], [sample], settings, tokens=[1])
    assert found.reward == pytest.approx(0.4 * 2 / 3 + 0.1 + 0.1)


def test_a_scorer_is_asked_for_before_the_run_and_must_import(perception, sample):
    with pytest.raises(
        ConfigError, match=r"^reward\.scorer is not set: what measures .* reward\.weights\.similarity=0\.4"
    ):
        load_config(None, ["model.path=some/model", "reward.design=pebr_perception"])
    with pytest.raises(ConfigError, match=r"^reward\.scorer=own\.py:score: only reward\.design=pebr_perc"):
        load_config(None, ["model.path=some/model", "reward.scorer.function=own.py:score"])
    lost = perception().model_copy(update={"scorer": perception().scorer.model_copy(update={"function": "no.py:red"})})
    with pytest.raises(RewardError, match=r"reward\.scorer=no\.py:red: there is no file"):
        check_function(lost)


def test_a_function_of_ones_own_may_have_the_name_of_a_score_in_other_designs_alone(perception):
    own = {"length": {"function": "own.py:length"}}
    assert RewardConfig(functions=own).weights["length"] == 1
    with pytest.raises(ValueError, match=r"reward\.functions\.length: this is the name of a score of the designs"):
        perception(functions=own)


def test_what_takes_the_sample_is_not_scored_without_it(perception):
    with pytest.raises(ValueError, match="the scores similarity, keywords, length take the completion's sample"):
        score(COMPLETION.format("12"), "12", perception())
    told = dict(steps(COMPLETION.format("12"), "12", perception()))
    assert told["given"] == "'12', behind '### The final answer is:'"
    assert told["reward"].startswith("not told")


@given(st.text(alphabet="#: ImageDscriptonRl'thk.\n12\\boxed{}", max_size=60))
def test_nothing_a_model_writes_raises(text):
    for completion in (text, COMPLETION.format(text), COMPLETION.format(text)[20:]):
        assert -1 <= score(completion, "12", RewardConfig(design="pebr_reasoning")).reward <= 1


@pytest.mark.slow
def test_a_model_of_clips_kind_scores_as_its_own_similarity_does(tmp_path, sample, processor):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    known = ("<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>")
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(known)}, [], model_max_length=16)
    text = small | {"vocab_size": 8, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=small | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    ).eval()
    own = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8), tokenizer)
    model.save_pretrained(tmp_path / "clip")
    own.save_pretrained(tmp_path / "clip")

    scorer = {"function": "vogue.rewards.similarity:clip", "options": {"model": str(tmp_path / "clip")}}
    weights = {"keywords": 0, "format": 0, "length": 0}
    settings = RewardConfig(design="pebr_perception", scorer=scorer, weights=weights, similar_enough=1.0)
    texts = ["a b", "b a a"]
    completions = [f"### Image Description: {text} ### Rationales:" for text in texts]
    found = [one.components["similarity"] for one in score_batch(completions, [sample] * 2, settings)]
    with torch.inference_mode():
        image = model.get_image_features(**own(images=sample.load_images(), return_tensors="pt"))
        embedded = model.get_text_features(**own(text=texts, return_tensors="pt", padding=True))
    image, embedded = (getattr(part, "pooler_output", part) for part in (image, embedded))
    expected = torch.nn.functional.normalize(embedded) @ torch.nn.functional.normalize(image).T
    assert found == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    assert found[0] != found[1]


# -------------------------------------------------------------------------------------------------------- the split


def test_levels_by_hand():
    assert [level(right, 8) for right in (8, 7, 1, 0)] == ["easy", "medium", "medium", "hard"]


def test_a_data_set_is_split_by_how_often_a_model_is_right(model_folder, digits_folder, tmp_path, capsys):
    samples = [
        replace(sample, columns={"keywords": [str(number)], "number": number})
        for number, sample in enumerate(load_samples(digits_folder / "train.parquet"))
    ]
    write_parquet(samples, tmp_path / "all.parquet")
    given = [f"model.path={model_folder}", "model.dtype=float32", "rollout.engine=hf", "rollout.max_tokens=12"]
    given += ["data.system_prompt=Think.", "reward.design=verifiable"]
    out = tmp_path / "split"
    assert main(["data", "split", str(tmp_path / "all.parquet"), *given, "--samples", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    told = re.search(r"^(\S+) tokens generated$", printed, re.MULTILINE)
    assert told and 24 * 4 <= int(told[1].replace(",", "")) <= 24 * 4 * 12
    found = {path.stem: list(load_samples(path)) for path in out.glob("*.parquet")}
    assert sorted(sample.columns["number"] for part in found.values() for sample in part) == list(range(24))
    for name, part in found.items():
        assert f"{name} " in printed
        assert f" {len(part)} " in printed
        assert all(sample.columns["keywords"] == [str(sample.columns["number"])] for sample in part)
    assert len(found) > 1


def test_a_level_has_the_questions_as_they_stood_before_the_format_prompt(model_folder, digits_folder, tmp_path):
    """Who trains on it sets `data.format_prompt` again, as before the split."""
    given = [f"model.path={model_folder}", "model.dtype=float32", "rollout.engine=hf", "rollout.max_tokens=4"]
    given += ["data.format_prompt='{{ content }} Be brief.'", "data.limit=3"]
    data, out = digits_folder / "train.parquet", tmp_path / "split"
    assert main(["data", "split", str(data), *given, "--samples", "1", "--out", str(out)]) == 0
    found = [sample.problem for path in out.glob("*.parquet") for sample in load_samples(path)]
    assert sorted(found) == sorted(sample.problem for sample in load_samples(data, 3))


def test_what_a_file_of_samples_cannot_hold_is_told(sample, tmp_path):
    with pytest.raises(DataError, match="has no place for its own system message: 'Be brief"):
        write_parquet([replace(sample, system="Be brief.")], tmp_path / "a.parquet")
    both = [replace(sample, columns={"level": value}) for value in ("one", 2)]
    with pytest.raises(DataError, match="column 'level' holds values of several kinds"):
        write_parquet(both, tmp_path / "a.parquet")
