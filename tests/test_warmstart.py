"""The small model from nothing, and the examples that use it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vogue.config import ConfigError, load_config
from vogue.data.digits import SYSTEM_PROMPT, digit_pairs
from vogue.inputs import Preprocessor, load_processor
from vogue.tiny import SPECIAL_TOKENS
from vogue.warmstart import Examples, warmstart

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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmstart") / "base"
    warmstart(folder, **BRIEF)
    return folder


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
