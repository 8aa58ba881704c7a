"""Several reward functions of the user's own: what they may return, how they add up, and a run that lives by them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vogue.answer_extraction import boxed
from vogue.cli import main
from vogue.config import load_config
from vogue.config.sections import RewardConfig
from vogue.data import Sample
from vogue.rewards import RewardError, Score, score_batch
from vogue.rewards.format import is_formatted
from vogue.rewards.library import box, choice, iou, judge, point, text
from vogue.settings import ConfigError

LIBRARY = "vogue.rewards.library"


def rewards(tmp_path, body="", **given):
    """Settings with functions of a file with this body, each given by its name and its weight, None for unset."""
    (tmp_path / "own.py").write_text(body)
    functions = {name: {"function": f"{tmp_path}/own.py:{name}"} for name in given}
    return RewardConfig(functions=functions, weights=given, timeout=30)


def scores(chosen, *completions, answer="3"):
    return score_batch(completions, [Sample("Which?", answer, ())] * len(completions), chosen)


# ------------------------------------------------------------------------------------------------ what adds up, and how


def test_weighted_values_are_added_to_the_designs_sum_and_are_components(tmp_path):
    chosen = rewards(
        tmp_path,
        "def length(completions, samples):\n    return [len(text) for text in completions]\n"
        "def one(completion, sample):\n    return 1",
        length=-0.01,
        one=0.5,
    )
    found = scores(chosen, "\\boxed{3}", "3")
    assert found[0] == Score(pytest.approx(0.9 + 0.5 - 0.09), 1.0, 0.0, "3", {"length": 9.0, "one": 1.0})
    assert found[1] == Score(pytest.approx(0.5 - 0.01), 0.0, 0.0, None, {"length": 1.0, "one": 1.0})


def test_a_function_may_judge_and_give_components(tmp_path):
    chosen = rewards(
        tmp_path,
        "def own(completion, sample):\n"
        "    return {'reward': 2, 'accuracy': 0.25, 'parsed': completion[:1], 'shape': 7}",
        own=None,
    )
    assert scores(chosen, "\\boxed{3}") == [Score(pytest.approx(2.9), 0.25, 0.0, "\\", {"own": 2.0, "own/shape": 7.0})]
    alone = RewardConfig(function=f"{tmp_path}/own.py:own")
    assert scores(alone, "\\boxed{3}") == [Score(2.0, 0.25, 0.0, "\\", {"shape": 7.0})]


@pytest.mark.parametrize(
    "body",
    [
        "async def own(completions, samples):\n    await asyncio.sleep(0.1)\n    return [len(completions)] * 20",
        "async def own(completion, sample):\n    await asyncio.sleep(1)\n    return 20",
        "def own(completion, sample):\n    return 20",
    ],
)
def test_a_function_takes_one_or_all_and_may_be_async(tmp_path, body):
    chosen = rewards(tmp_path, f"import asyncio\n{body}", own=None).model_copy(update={"timeout": 10.0})
    # One after the other, the second one would take 20 s.
    assert [found.reward for found in scores(chosen, *["no"] * 20)] == [20.0] * 20


def test_options_are_further_arguments_and_a_module_will_do(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def own(completion, sample, factor):\n    return factor")
    own = {"function": f"{tmp_path}/own.py:own", "options": {"factor": 3}}
    chosen = RewardConfig(functions={"own": own})
    assert scores(chosen, "no")[0].reward == 3.0
    (tmp_path / "importable.py").write_text("def two(completion, sample):\n    return 2")
    monkeypatch.syspath_prepend(tmp_path)
    assert scores(RewardConfig(function="importable:two"), "no")[0].reward == 2.0
    imported = RewardConfig(functions={"iou": {"function": f"{LIBRARY}:box", "options": {"threshold": 0.9}}})
    found = scores(imported, "\\boxed{[0, 0, 1, 2]}", answer="[0, 0, 2, 2]")
    assert found == [Score(0.5, 0.0, 0.0, "[0, 0, 1, 2]", {"iou": 0.5})]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("{'accuracy': 1}", "returned {'accuracy': 1}, without a 'reward', on completion 1 of 1"),
        ("{'reward': None}", "returned 'reward': None, not a finite number, on completion 1 of 1"),
        ("{'reward': 1, 'accuracy': 2}", "returned 'accuracy': 2, not between 0 and 1, on completion 1 of 1"),
        ("{'reward': 1, 'parsed': 3}", "returned 'parsed': 3, neither a text nor None, on completion 1 of 1"),
        ("{'reward': 1, 'shape': 'round'}", "returned 'shape': 'round', not a finite number, on completion 1 of 1"),
        ("sample['image']", "raised KeyError: 'image' (line 2) on completion 1 of 1"),
    ],
)
def test_what_cannot_be_used_is_told_with_the_functions_name(tmp_path, value, told):
    chosen = rewards(tmp_path, f"def own(completion, sample):\n    return {value}", own=None)
    with pytest.raises(RewardError) as error:
        scores(chosen, "no")
    assert f"reward.functions.own={tmp_path}/own.py:own {told}" in str(error.value)


def test_two_functions_may_not_both_judge(tmp_path):
    body = "def {}(completion, sample):\n    return {{'reward': 1, 'accuracy': 1}}\n"
    chosen = rewards(tmp_path, body.format("a") + body.format("b"), a=None, b=None)
    with pytest.raises(RewardError, match="both a and b give accuracy or parsed"):
        scores(chosen, "no")


def test_wrong_settings_are_told(tmp_path):
    def told(*overrides):
        with pytest.raises(ConfigError) as error:
            load_config(None, ["model.path=m", "data.train=t.parquet", *overrides])
        return str(error.value)

    one = "reward.functions.iou.function=own.py:iou"
    assert told("reward.functions.iou.options.x=1").startswith("reward.functions.iou.function is not set")
    assert told("reward.weights.iou=1") == "reward.weights.iou=1.0: the scores are accuracy, format"
    assert told(one, "reward.weights.box=1") == "reward.weights.box=1.0: the scores are accuracy, format, iou"
    assert "reward.functions.iou.function='own'" in told("reward.functions.iou.function=own")
    assert "unknown setting reward.functions.iou.wait" in told(one, "reward.functions.iou.wait=1")
    assert told(one, "reward.function=own.py:a").startswith(
        "reward.function=own.py:a takes the place of all weights and"
    )
    assert told("reward.functions.think.function=own.py:a").startswith("reward.functions.think: this is the name")


# ------------------------------------------------------------------------------------------------------------- the box


def test_boxes_overlap():
    assert iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)
    assert iou([0, 0, 2, 2], [0, 0, 2, 2]) == 1
    assert iou([0, 0, 1, 1], [1, 1, 2, 2]) == iou([2, 2, 0, 0], [0, 0, 2, 2]) == iou([0, 0, 1], [0, 0, 1, 1]) == 0
    assert iou([1, 1, 1, 1], [1, 1, 1, 1]) == 0  # no area


def test_rewards_in_the_box():
    half = box("<answer>[0, 0, 1, 2]</answer>", {"answer": "[0, 0, 2, 2]"})
    assert half == {"reward": 0.5, "accuracy": 1.0, "parsed": "[0, 0, 1, 2]"}
    assert box("[0, 0, 2, 2]", {"answer": "[0, 0, 2, 2]"})["reward"] == 0  # not where the answer was asked for
    for said, reward in (("(1, 1)", 1), ("(1, 3)", 0), ("(1, 1, 1)", 0), ("1", 0)):
        assert point(f"\\boxed{{{said}}}", {"answer": "[0, 0, 2, 2]"})["reward"] == reward
    for said, reward in (("(3, 4)", 1), ("(3, 4.1)", 0)):
        assert point(f"\\boxed{{{said}}}", {"answer": "(0, 0)"}, radius=5)["reward"] == reward
    assert choice("\\boxed{(B) 12}", {"answer": "B"}) == {"reward": 1.0, "accuracy": 1.0, "parsed": "B"}
    assert choice("\\boxed{B or C}", {"answer": "B"})["reward"] == 0
    assert text("\\boxed{On  Top}", {"answer": "on top"})["reward"] == 1
    assert text("\\boxed{3.0}", {"answer": "3"})["reward"] == 0


@pytest.fixture
def endpoint():
    """A model at http://localhost that says yes to a given answer that is an even digit; and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            said = "Yes." if asked[-1][-1] in "02468" else "No."
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_a_judge_is_asked_about_each_answer_once(endpoint):
    url, asked = endpoint
    completions = ["\\boxed{4}", "\\boxed{4}", "\\boxed{5}", "4", "\\boxed{?}"]
    sample = {"problem": "How many?", "answer": "four"}
    assert judge(completions, [sample] * 5, url, "some-model") == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert len(asked) == 2
    assert all("How many?" in text and "four" in text for text in asked)


# --------------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.slow
def test_a_run_trains_resumes_evaluates_and_chooses_groups_by_its_own_accuracy(settings, endpoint, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import asyncio\n"
        "async def small(completion, sample):\n"
        "    await asyncio.sleep(0.01)\n"
        "    right = completion[-2:-1] in '01234'\n"
        "    digit = completion[-2:-1]\n"
        "    return {'reward': right, 'accuracy': right, 'parsed': digit, 'code': ord(digit or ' ')}\n"
        "def overlap(completion, sample):\n"
        "    from vogue.rewards.library import iou\n"
        "    return iou([0, 0, 10, 10], [0, 0, 10, ord(completion[-2:-1] or ' ') - 48])\n"
    )
    url, asked = endpoint
    own = [
        "reward.weights.accuracy=0",
        f"reward.functions.small.function={tmp_path}/own.py:small",
        f"reward.functions.overlap.function={tmp_path}/own.py:overlap",
        "reward.weights.overlap=0.5",
        f"reward.functions.judge.function={LIBRARY}:judge",
        "reward.weights.judge=0.25",
        f"reward.functions.judge.options.url={url}",
        "reward.functions.judge.options.model=some-model",
        "rollout.rounds=2",
        "rollout.prompts=2",
        "rollout.n=4",
        "trainer.eval_every=2",
        "trainer.log_completions=100",
        "branch.probability=0.5",  # its schedule would end with trainer.steps, which might not change then
    ]
    run = tmp_path / "run"
    assert main(["train", *settings, *own, "trainer.steps=2"]) == 0
    assert main(["train", *settings, *own, "trainer.steps=3", "--resume"]) == 0
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 1, 2}
    for row in rows:
        digit = row["completion"][-2:-1]
        assert (row["parsed"], row["accuracy"]) == (digit, float(digit in "01234"))  # also "", which is in it
        parts = row["components"]
        said = boxed(row["completion"])  # None of some: the model is a random one
        assert parts["judge"] == float(bool(said) and said[-1] in "02468")
        expected = (
            0.1 * is_formatted(row["completion"]) + parts["small"] + 0.5 * parts["overlap"] + 0.25 * parts["judge"]
        )
        assert row["reward"] == pytest.approx(expected)
    assert all(
        {"reward/small", "reward/overlap", "reward/judge", "reward/small/code", "rounds"} <= m.keys() for m in metrics
    )
    assert any(m["mixed_share"] > 0 for m in metrics)
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations
    out = tmp_path / "out.jsonl"
    assert main(["eval", *settings, *own, "--samples", "2", "--out", str(out)]) == 0
    judged = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["accuracy"] == float(row["parsed"] in "01234") for row in judged)
    assert asked
