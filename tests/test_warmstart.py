"""The small model from nothing, and the examples that use it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vogue.config import load_config
from vogue.config.sections import RewardConfig
from vogue.data import DataError, Sample, prompts, write_parquet
from vogue.data.digits import SYSTEM_PROMPT, digit_pairs
from vogue.data.prompts import with_view
from vogue.data.puzzles import KINDS, SMALLEST, puzzle_samples
from vogue.inputs import Preprocessor, load_processor
from vogue.rewards.designs import DEMONSTRATIONS, score
from vogue.rewards.pebr_r1 import description, keyword_score, keywords_of
from vogue.settings import ConfigError
from vogue.tiny import SPECIAL_TOKENS
from vogue.warmstart import Examples, demonstrate, demonstration_loss, warmstart, warmstart_on

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "sweeps")
BRIEF = {
    "vision_batches": 1,
    "batches": 2,
    "batch_size": 2,
    "lr": 1e-3,
    "misread": 0.5,
    "printed": 0.5,
    "faintest": 1.0,
    "seed": 0,
}
BRIEF_ON_DATA = {name: value for name, value in BRIEF.items() if name not in ("misread", "faintest")}
BRIEF_ON_DATA |= {"answer_weight": 2.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmstart") / "base"
    warmstart(folder, **BRIEF)
    return folder


@pytest.fixture(scope="module")
def puzzles():
    """A puzzle of each kind."""
    return list(puzzle_samples(tuple(KINDS), "train", 1, seed=0, size=SMALLEST))


@pytest.fixture(scope="module")
def colours():
    """Two samples that only their images tell apart."""
    image = {name: Image.new("RGB", (56, 56), name) for name in ("red", "blue")}
    return [Sample("<image>Which colour?", name, (image[name],), state=name) for name in image]


@pytest.fixture
def warmstart_on_samples(tmp_path):
    """A function: warm-start on samples; returns the folder of the model."""

    def run(samples, name="base", **settings):
        write_parquet(samples, tmp_path / "train.parquet")
        warmstart_on(str(tmp_path / "train.parquet"), tmp_path / name, **BRIEF_ON_DATA | settings)
        return tmp_path / name

    return run


def test_the_folder_is_an_ordinary_checkpoint_of_qwen2_5_vl(base):
    model = AutoModelForImageTextToText.from_pretrained(base)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 0.5e6 < model.num_parameters() < 2e6
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id


def test_its_tokenizer_keeps_special_tokens_whole_and_text_as_it_was(base):
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    for token in SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    for text in ("<think>3 and 5, 3 + 5 = 8</think>\n\\boxed{8}", "naïve 42 🙂\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_no_special_token_of_the_prompt_is_the_end_of_a_completion(base):
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_an_existing_folder_is_not_overwritten(base):
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        warmstart(base, **BRIEF)
    assert (base / "model.safetensors").read_bytes() == before


def test_equal_seeds_make_equal_models(base, tmp_path):
    warmstart(tmp_path / "again", **BRIEF)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_is_a_valid_configuration(path):
    config = load_config(path, [])
    assert config.model.path and config.data.train and config.trainer.output_dir.parts[0] == "runs"


def test_a_printed_demonstration_is_learned_from_the_text_alone(base):
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    pairs = digit_pairs("train", 3000, 0)
    first = pairs[0]
    twin = next(p for p in pairs[1:] if (p.left, p.right, p.question) == (first.left, first.right, first.question))
    other = next(p for p in pairs if (p.left, p.question) == (first.left, first.question) and p.right != first.right)
    examples = Examples([first, twin, other], Preprocessor(load_processor(str(base)), SYSTEM_PROMPT, 512))
    as_first = (first.left, first.right)  # all of them demonstrate the same completion

    def losses(printed):
        with torch.no_grad():
            return [float(examples.loss(model, [i], [as_first], [printed])) for i in range(3)]

    seen, read = losses(False), losses(True)
    assert seen[0] != seen[1]
    assert read[0] == read[1] != read[2]


def test_the_digits_example_asks_as_the_warm_start_did():
    assert load_config(EXAMPLES / "digits" / "vogue.yaml", []).data.system_prompt == SYSTEM_PROMPT


def right_and_swapped(base, demonstrations, tokenizer):
    """Losses of two demonstrations, and of the same with each other's texts: equal where the model looks at neither."""
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    swapped = [replace(one, text=other.text) for one, other in zip(demonstrations, demonstrations[::-1], strict=True)]
    with torch.no_grad():
        return [float(demonstration_loss(model, tokenizer, batch)) for batch in (demonstrations, swapped)]


def test_images_alone_teach_a_model_of_any_data_to_see(warmstart_on_samples, colours):
    base = warmstart_on_samples(colours, vision_batches=60, batches=0, lr=3e-3)
    preprocessor = Preprocessor(load_processor(str(base)), "", 512)
    alone = [demonstrate(preprocessor, replace(sample, problem="<image>")) for sample in colours]
    right, swapped = right_and_swapped(base, alone, preprocessor.tokenizer)
    assert right < 0.1 < 0.25 < swapped


def test_a_model_to_begin_with_is_gone_on_from(warmstart_on_samples, colours):
    first = warmstart_on_samples(colours, "first", vision_batches=2, batches=0)
    second = warmstart_on_samples(colours, "second", vision_batches=0, batches=0, start=str(first))
    (one, other) = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert load_processor(str(first)).tokenizer.get_vocab() == load_processor(str(second)).tokenizer.get_vocab()
    third = warmstart_on_samples(colours, "third", vision_batches=1, batches=0, start=str(first))
    assert not all(torch.equal(one[name], tensor) for name, tensor in load_file(third / "model.safetensors").items())


def test_a_model_to_begin_with_that_is_none_is_told(warmstart_on_samples, colours, tmp_path):
    with pytest.raises(ConfigError, match=f"^--model {tmp_path}/none: "):
        warmstart_on_samples(colours, start=str(tmp_path / "none"))


@pytest.mark.parametrize("design", ["verifiable", "pebr_reasoning"])
def test_a_model_of_any_data_learns_to_answer_from_the_images_and_from_the_print(warmstart_on_samples, colours, design):
    base = warmstart_on_samples(colours, vision_batches=0, batches=60, lr=3e-3, batch_size=4, design=design)
    preprocessor = Preprocessor(load_processor(str(base)), prompts.SYSTEM_PROMPTS[design], 512)
    for view in ("image", "text"):
        asked = [demonstrate(preprocessor, with_view(sample, view), design) for sample in colours]
        right, swapped = right_and_swapped(base, asked, preprocessor.tokenizer)
        assert right < 0.05 and swapped > 0.12, view


def test_a_model_is_taught_behind_the_system_prompt_of_its_design(warmstart_on_samples, colours, monkeypatch):
    asked = []
    monkeypatch.setattr("vogue.warmstart.Preprocessor", lambda *a: asked.append(a[1]) or Preprocessor(*a))
    warmstart_on_samples(colours, design="pebr_reasoning")
    assert asked == [prompts.SYSTEM_PROMPTS["pebr_reasoning"], ""]  # "" with the images alone


@pytest.mark.parametrize(
    ("design", "last"), [("verifiable", "</think>"), ("pebr_reasoning", "### The final answer is:")]
)
def test_an_answers_tokens_count_as_often_as_they_are_to(colours, processor, new_model, design, last):
    model, tokenizer = new_model().eval(), processor.tokenizer
    preprocessor = Preprocessor(processor, "", 512)
    demonstrations = [demonstrate(preprocessor, replace(sample, state="ab" * 9), design) for sample in colours]
    with torch.no_grad():
        plain, tripled = (float(demonstration_loss(model, tokenizer, demonstrations, weight)) for weight in (1.0, 3.0))
        losses, sizes = [], []  # by hand: what the answer alone adds to the sum
        for one in demonstrations:
            answer = one.text.split(last)[1]
            count, behind = len(tokenizer(one.text)["input_ids"]) + 1, len(tokenizer(answer)["input_ids"]) + 1
            whole = float(demonstration_loss(model, tokenizer, [one]))
            heavy = float(demonstration_loss(model, tokenizer, [one], 1e9))  # the mean over the answer
            losses.append((whole * count, heavy * behind))
            sizes.append((count, behind))
    (total, of_answers), (tokens, answers) = (tuple(map(sum, zip(*pairs))) for pairs in (losses, sizes))
    assert plain == pytest.approx(total / tokens, rel=1e-4)
    assert tripled == pytest.approx((total + 2 * of_answers) / (tokens + 2 * answers), rel=1e-4)
    assert abs(tripled - plain) > 1e-3


def test_equal_seeds_make_equal_models_of_any_data(warmstart_on_samples, puzzles):
    first, second = (warmstart_on_samples(puzzles, name) for name in ("first", "second"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("design", DEMONSTRATIONS)
def test_a_demonstration_of_each_puzzle_is_right_and_in_the_format(puzzles, processor, design):
    preprocessor = Preprocessor(processor, prompts.SYSTEM_PROMPT, 2048)
    texts_alone = {"similarity": 0, "keywords": 0, "length": 0} if design == "pebr_perception" else {}
    settings = RewardConfig(design=design, weights=texts_alone)  # pyright: ignore[reportCallIssue]
    for sample in puzzles:
        text = demonstrate(preprocessor, sample, design).text
        assert sample.state in text
        earned = score(text, sample.answer, settings)
        assert (earned.accuracy, earned.format, earned.parsed) == (1, 1, sample.answer)


def test_a_demonstration_under_headings_describes_the_state_and_has_every_keyword(puzzles):
    for sample in puzzles:
        text = "".join(DEMONSTRATIONS["pebr_perception"](sample.state, sample.answer))
        assert description(text) == sample.state
        assert keyword_score(text, keywords_of(sample)) == 1


def test_a_design_that_no_demonstration_is_known_of_is_told(warmstart_on_samples, colours, tmp_path):
    with pytest.raises(ConfigError, match=r"^--design mixture: a warm start can demonstrate verifiable, pebr_"):
        warmstart_on_samples(colours, design="mixture")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": ""}, r"train.parquet, row 1: has no 'state'"),
        ({"images": (), "problem": "How many?"}, r"train.parquet, row 1: has no image"),
        ({"problem": "<image>" + "How many? " * 3000}, r"train.parquet, row 1: the prompt has \d+ tokens"),
        ({"state": "Many. " * 3000}, r"train.parquet, row 1: the prompt has \d+ tokens"),
    ],
    ids=["no state", "no image", "too long", "too long when printed"],
)
def test_a_sample_that_cannot_be_learned_from_is_named(warmstart_on_samples, puzzles, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        warmstart_on_samples([puzzles[0], replace(puzzles[1], **change)])
    assert not (tmp_path / "base").exists()


def test_data_does_not_overwrite_a_folder_either(warmstart_on_samples, puzzles, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        warmstart_on_samples(puzzles)


def test_the_puzzles_example_asks_as_the_warm_start_did():
    config = load_config(EXAMPLES / "puzzles" / "vogue.yaml", [])
    assert prompts.system_prompt(config) == prompts.SYSTEM_PROMPT
