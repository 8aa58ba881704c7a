"""Which tokens either engine may sample, with which log-probabilities, and what ends a completion."""

import json
from dataclasses import replace
from math import inf, log

import pytest
import torch
from ranks import apart, launch
from steps import batches_of, generated, objective_of, with_settings
from transformers import AutoModelForImageTextToText

from vogue.cli import main
from vogue.config import load_config
from vogue.data import Sample
from vogue.inputs import Preprocessor
from vogue.rollout import create_engine
from vogue.rollout.engine import BAN, Request, media_token_ids
from vogue.rollout.sampling import Sampling, StopWatch, of_evaluations, of_rollouts, truncated, until_stop

HOT = 2.0  # a temperature at which the model of the tests doubts, and the highest that vLLM takes


def kept_by(probabilities, sampling):
    """The tokens that may be sampled, from the likeliest on, by the definitions, one at a time."""
    tokens = sorted(range(len(probabilities)), key=lambda v: -probabilities[v])
    tokens = [v for v in tokens if probabilities[v] >= sampling.min_p * probabilities[tokens[0]]]
    tokens = tokens[: sampling.top_k or None]
    all_of_them, kept, total = sum(probabilities[v] for v in tokens), [], 0.0
    for token in tokens:
        if sampling.top_p < 1 and total >= sampling.top_p * all_of_them:
            break
        kept.append(token)
        total += probabilities[token]
    return kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"min_p": 0.25}, [0, 1, 3]),
        ({"min_p": 1.0}, [1]),
        ({"top_p": 0.75}, [1, 3]),
        ({"top_p": 0.85}, [0, 1, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.83}, [0, 1, 3]),
        ({"top_p": 0.83, "min_p": 0.25}, [1, 3]),  # 0.8 of the 0.95 that min_p leaves
        ({"top_p": 0.6, "top_k": 2}, [1]),  # 0.5 of the 0.8 that top_k leaves
    ],
)
def test_tokens_are_left_out_by_hand(given, kept):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    found = truncated(logits, Sampling(1, **given))
    assert found.isfinite().nonzero()[:, 1].tolist() == kept
    assert torch.equal(found[0, kept], logits[0, kept])


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_left_out_as_the_definitions_say(seed):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(4, 300)
    given = {
        "top_p": float(torch.rand(1)),
        "top_k": int(torch.randint(0, 40, (1,))),
        "min_p": 0.1 * float(torch.rand(1)),
    }
    sampling = Sampling(1, **given)
    for row, found in zip(logits.double().softmax(-1).tolist(), truncated(logits, sampling), strict=True):
        assert found.isfinite().nonzero()[:, 0].tolist() == sorted(kept_by(row, sampling))


def test_tokens_that_are_as_likely_as_the_last_of_the_k_stay():
    assert truncated(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), Sampling(1, top_k=2)).tolist() == [[1.0, 2.0, 1.0, -inf]]


def test_a_text_ends_with_the_string_that_it_says_first():
    assert until_stop("a </b> c </d>", ("</d>", "</b>")) == "a </b>"
    assert until_stop("abcd", ("bcd", "bc")) == "abc"
    assert until_stop("abcd", ()) == until_stop("abcd", ("x",)) == "abcd"


def test_a_string_is_found_across_tokens_and_special_ones_have_no_text(processor):
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    first = [*tokenizer("x é")["input_ids"], end, *tokenizer("+y")["input_ids"]]  # é is two bytes, a token each
    second = tokenizer("<|im_end|>")["input_ids"] * len(first)
    watch = StopWatch(("é+", "im_end"), tokenizer, 2)
    found = [watch.stopped(torch.tensor(pair)).tolist() for pair in zip(first, second, strict=True)]
    assert [tokenizer.decode(first[: i + 1], skip_special_tokens=True) for i in range(len(first))][-2:] == [
        "x é+",
        "x é+y",
    ]
    assert [row[0] for row in found[:-1]] == [False] * (len(first) - 2) + [True]
    assert not any(row[1] for row in found)


def test_evaluations_have_a_sampling_of_their_own(config):
    given = ("rollout.temperature=0.7", "rollout.top_p=0.9", "rollout.top_k=20", "rollout.min_p=0.01")
    chosen = config(*given, "rollout.stop=[</answer>]", "trainer.eval_top_k=0", "trainer.eval_min_p=0")
    assert of_rollouts(chosen) == Sampling(12, 0.7, 0.9, 20, 0.01, ("</answer>",))
    assert of_evaluations(chosen) == Sampling(12, 0.7, 0.9, 0, 0.0, ("</answer>",))


# ------------------------------------------------------------------------------------------------------ the engines


TRUNCATED = [
    Sampling(1, HOT),
    Sampling(1, HOT, top_p=0.7),
    Sampling(1, HOT, top_k=3),
    Sampling(1, HOT, min_p=0.03),
    Sampling(1, HOT, top_p=0.9, top_k=60, min_p=0.01),
]
FREE = Sampling(12)
STOPPED = [replace(FREE, stop=("</th",)), replace(FREE, stop=("ed{", "think")), replace(FREE, stop=("7}", "1}", "4}"))]


def sampled(settings, engine):
    """What an engine samples for a question without an image: with TRUNCATED, FREE, STOPPED, and of another length."""
    config = load_config(None, [*settings, f"rollout.engine={engine}", "rollout.kv_cache_gb=0.1"])
    preprocessor = Preprocessor.of(config)
    started = create_engine(config, preprocessor.processor)
    request = asked(preprocessor)
    truncated_ones = [started.generate([request], 200, sampling)[0] for sampling in TRUNCATED]
    stopped_ones = [started.generate([request], 16, sampling)[0] for sampling in (FREE, *STOPPED)]
    length = len(stopped_ones[1][0].token_ids)
    cut = started.generate([request], 1, replace(STOPPED[0], max_tokens=length))[0]
    return truncated_ones, stopped_ones, cut


def asked(preprocessor):
    view = preprocessor.view(())
    return Request(preprocessor.prompt(Sample("What is 2 + 2?", "4", ()), view), view, 3)


@pytest.fixture(scope="module")
def from_engine(model_folder):
    """A function: what an engine samples, once for all tests."""
    settings = [
        f"model.path={model_folder}",
        "model.dtype=float32",
        "data.system_prompt=Think.",
        "rollout.max_tokens=12",
    ]
    settings += ["data.max_prompt_tokens=128"]
    known = {}

    def get(engine):
        if engine not in known:
            known[engine] = apart(sampled, settings, engine) if engine == "vllm" else sampled(settings, engine)
        return known[engine]

    return get


ENGINES = [pytest.param("vllm", marks=pytest.mark.slow), "hf"]


@pytest.mark.parametrize("engine", ENGINES)
def test_either_engine_samples_the_same_tokens_with_the_logprobs_of_what_is_left(
    engine, from_engine, model_folder, preprocessor
):
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=asked(preprocessor).prompt.token_ids[None]).logits[0, -1].double()
    logits[media_token_ids(preprocessor.processor)] += BAN
    probabilities = (logits / HOT).softmax(-1).tolist()
    sizes = []
    for sampling, completions in zip(TRUNCATED, from_engine(engine)[0], strict=True):
        kept = kept_by(probabilities, sampling)
        share = sum(probabilities[token] for token in kept)
        found = {completion.token_ids[0]: completion.logprobs[0] for completion in completions}
        assert found.keys() <= set(kept)
        assert found.keys() >= {token for token in kept if probabilities[token] / share > 0.05}
        assert found == pytest.approx({token: log(probabilities[token] / share) for token in found}, abs=1e-4)
        sizes.append(len(kept))
    assert len(set(sizes)) == len(sizes) and min(sizes) > 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_string_ends_a_completion_with_the_token_that_completes_it(engine, from_engine, processor):
    _, (free, *stopped), _ = from_engine(engine)

    def text_of(token_ids):
        return processor.tokenizer.decode(token_ids, skip_special_tokens=True)

    for sampling, completions in zip(STOPPED, stopped, strict=True):
        ends = 0
        for one, other in zip(completions, free, strict=True):
            lengths = range(1, len(other.token_ids) + 1)
            said = [n for n in lengths if any(stop in text_of(other.token_ids[:n]) for stop in sampling.stop)]
            length = said[0] if said else len(other.token_ids)
            assert one.token_ids == other.token_ids[:length]
            assert one.logprobs == pytest.approx(other.logprobs[:length], abs=1e-4)
            assert one.finished == (bool(said) or other.finished)
            assert one.text == until_stop(text_of(one.token_ids), sampling.stop)
            ends += bool(said) and one.text.endswith(sampling.stop)
        assert ends > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_string_that_the_last_token_completes_finishes_the_completion(engine, from_engine):
    _, (_, stopped, *_), (cut,) = from_engine(engine)
    assert stopped[0].finished and replace(cut, logprobs=()) == replace(stopped[0], logprobs=())


# ---------------------------------------------------------------------------------------------------- what is trained


def test_the_policy_has_the_whole_distribution_and_the_ratio_to_the_engine_is_the_share_that_was_kept(
    new_trainer, config
):
    trainer = new_trainer("rollout.top_k=2", "rollout.temperature=4", "branch.probability=0")
    groups = [replace(group, advantages=(1.0, -0.5)) for group in generated(trainer)]
    (batch,) = batches_of(trainer, groups)
    with torch.no_grad():
        hidden, head = trainer.policy._hidden(batch, trainer.policy.model).double(), trainer.policy.model.lm_head
        whole = ((hidden @ head.weight.double().T + head.bias) / 4).softmax(-1)
        stats = trainer.policy(batch)
    share = whole.topk(2).values.sum(-1)
    assert share.max() < 0.99
    assert stats.logprob.double() == pytest.approx(whole.gather(1, batch.targets[:, None])[:, 0].log(), abs=1e-4)
    assert stats.entropy.double() == pytest.approx(-(whole * whole.log().clamp(min=-1e9)).sum(-1), abs=1e-4)
    assert (stats.logprob - batch.engine_logprob).double() == pytest.approx(share.log(), abs=1e-4)
    metrics = objective_of(trainer, batch).metrics
    assert metrics["mismatch/logprob"].count == len(share)
    assert metrics["mismatch/logprob"].total == pytest.approx(float(-share.log().sum()), rel=1e-3)
    capped = with_settings(trainer, config("rollout.top_k=2", "branch.probability=0", "loss.importance_cap=1", *PLAIN))
    plain = with_settings(trainer, config("rollout.top_k=2", "branch.probability=0", *PLAIN))
    losses = [float(objective_of(one, batch).loss) for one in (plain, capped)]
    token_losses = -batch.weights.double() * batch.advantages  # at a ratio of 1 to the policy before
    assert losses == pytest.approx([float(token_losses.sum()), float((token_losses * share).sum())], rel=1e-3)


PLAIN = ("guidance.alpha_out=0", "guidance.alpha_per=0")


def test_a_run_that_samples_from_a_part_of_the_distribution_says_so(settings, capsys):
    given = ["train", "--check", *settings, "rollout.max_tokens=13"]
    assert main([*given, "rollout.top_p=0.9", "rollout.min_p=0.1"]) == 0
    told = "warning: rollout.top_p=0.9 and rollout.min_p=0.1: completions are sampled from a part of the distribution"
    assert told in capsys.readouterr().out
    assert main(given) == 0
    assert "sampled from a part" not in capsys.readouterr().out


def test_an_unbiased_estimate_needs_tokens_of_the_whole_distribution(config):
    with pytest.raises(ValueError, match=r"estimator=k3 is without bias .* but rollout\.top_k=5 samples from a part"):
        config("rollout.top_k=5", "uncertainty.estimator=k3")


@pytest.mark.long
def test_two_ranks_that_sample_from_what_is_left_train_as_one_does_and_go_on(settings, mixed_data, tmp_path):
    chosen = [*settings, "rollout.top_k=5", "rollout.top_p=0.95", "rollout.min_p=0.01", "rollout.temperature=1.5"]
    chosen += ['rollout.stop=["}"]', f"data.train={mixed_data}", "rollout.n=4", "branch.probability=0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *chosen, f"trainer.output_dir={one}", "trainer.steps=3"]) == 0
    for more in (("trainer.steps=1",), ("trainer.steps=3", "--resume")):
        launch(2, "--module", "vogue.train", *chosen, f"trainer.output_dir={two}", *more)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows, strict=True):
        for name in ("reward", "loss", "entropy", "grad_norm", "tokens", "mismatch/logprob"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-6), name
    assert rows[0][0]["mismatch/logprob"] > 1e-3  # the engine's are of what is left
