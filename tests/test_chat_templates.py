"""What chat templates write of the model's turn, and which tokens end it: engines and rewards agree on both."""

import json
import shutil

import pytest
from ranks import apart

from vogue.config import load_config
from vogue.inputs import Preprocessor, load_processor
from vogue.rewards import score
from vogue.rewards.scoring import score_groups
from vogue.rollout import create_engine
from vogue.rollout.engine import Request
from vogue.rollout.sampling import Sampling

HEADER = "<|im_start|>assistant\n"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A function: the tests' model, whose template opens the model's turn in this way, with these end tokens."""

    def build(opened="", ends=()):
        path = shutil.copytree(model_folder, tmp_path / f"model_{len(list(tmp_path.iterdir()))}")
        template = path / "chat_template.jinja"
        written = template.read_text()
        assert written.count(HEADER) == 1
        template.write_text(written.replace(HEADER, HEADER + opened))
        tokenizer = load_processor(str(path)).tokenizer
        generation = json.loads((path / "generation_config.json").read_text())
        generation["eos_token_id"] = [tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, ends)]
        (path / "generation_config.json").write_text(json.dumps(generation))
        return path

    return build


def run(engine, *given):
    """`completions` of this engine, vLLM's in a process of its own."""
    return (apart if engine == "vllm" else lambda f, *x: f(*x))(completions, *given, f"rollout.engine={engine}")


def completions(folder, settings, samples, *overrides):
    """Two completions of each sample, and their scores."""
    config = load_config(None, [*settings, f"model.path={folder}", "rollout.kv_cache_gb=0.1", *overrides])
    preprocessor = Preprocessor.of(config)
    engine = create_engine(config, preprocessor.processor)
    requests = []
    for number, sample in enumerate(samples):
        view = preprocessor.view(sample.load_images())
        requests.append(Request(preprocessor.prompt(sample, view), view, number))
    sampling = Sampling(12, 1.0)
    groups = engine.generate(requests, 2, sampling)
    places = [(number,) for number in range(len(samples))]
    return groups, score_groups(engine, preprocessor, config, samples, groups, places, sampling)


@pytest.mark.parametrize("opened", ["", "<think>", "<think>\n", "<think>\n\n</think>\n\n"])
def test_what_the_template_opens_is_found(folder, samples, opened):
    preprocessor = Preprocessor(load_processor(str(folder(opened))), "Think.", 512)
    prompt = preprocessor.prompt(samples[0], preprocessor.view(samples[0].load_images()))
    assert prompt.opened == opened
    assert preprocessor.tokenizer.decode(prompt.token_ids).endswith(HEADER + opened)


def test_a_thought_that_the_template_opened_earns_its_format():
    said = "3 + 5</think>\\boxed{8}"
    assert score(said, "8").format == 0
    assert score("<think>\n" + said, "8").format == 1
    assert score("<think>\n\n</think>\n\n" + "\\boxed{8}", "8").reward == 1.0  # thinking is switched off


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_a_completion_begins_with_what_the_template_opened_and_is_judged_so(folder, settings, samples, engine):
    path = folder("<think>\n\n</think>")
    groups, scores = run(engine, path, settings, samples[:2])
    tokenizer = load_processor(str(path)).tokenizer
    for group, judged in zip(groups, scores, strict=True):
        for completion, found in zip(group, judged, strict=True):
            said = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            assert completion.text == "<think>\n\n</think>" + said
            assert found.format == (said.count("think>") == 0 and "\\boxed{" in said)


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_every_end_token_of_the_checkpoint_ends_a_completion(folder, settings, samples, engine):
    plain, _ = run(engine, folder(), settings, samples[:2])
    cut, _ = run(engine, folder(ends=("{",)), settings, samples[:2])
    pairs = [pair for groups in zip(plain, cut, strict=True) for pair in zip(*groups, strict=True)]
    assert sum("{" in whole.text for whole, _ in pairs) >= 2
    for whole, completion in pairs:  # of the same draws
        before, brace, _ = whole.text.partition("{")
        assert completion.text == before + brace  # it keeps its end token
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
        assert completion.finished or not brace
