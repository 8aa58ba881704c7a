import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vogue.data import DataError, Sample, load_samples, write_parquet
from vogue.evaluate import (
    Estimate,
    Judged,
    by_category,
    estimate,
    evaluate_model,
    evaluation_row,
    headline,
    judge,
    pass_at_k,
    powers_of_two,
    requests_for,
    summary,
    write_judged,
)
from vogue.rewards import Score, score_batch
from vogue.rollout.engine import Completion
from vogue.rollout.hf import HfEngine


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_sample(numbers):
    n, right, k = numbers
    samples = [True] * right + [False] * (n - right)
    choices = [any(chosen) for chosen in combinations(samples, k)]
    assert pass_at_k(n, right, k) == pytest.approx(sum(choices) / len(choices))


@pytest.mark.parametrize("k", [0, 5])
def test_more_than_there_are_samples_cannot_be_asked(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples a problem, there are 4"):
        pass_at_k(4, 2, k)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = estimate((rng.random(60) < 0.3).tolist())
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.3 <= found.high
    assert 0.89 <= covered / 200 <= 0.99  # 95%, four standard deviations, and the bootstrap's own shortfall


def test_the_interval_of_a_mean_narrows_with_the_square_root_of_the_problems():
    few, many = estimate([0.0, 1.0] * 50), estimate([0.0, 1.0] * 5000)
    assert few.value == many.value == 0.5
    assert few.high - few.low == pytest.approx(2 * 1.96 * 0.5 / 100**0.5, rel=0.15)
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(10, rel=0.15)


def test_an_estimate_of_a_ratio_is_one_of_sums_over_problems():
    found = estimate([1.0, 0.0, 0.5], [1.0, 0.0, 4.0])
    assert found.value == pytest.approx(1.5 / 5)
    assert found.low == pytest.approx(0.125)  # the third problem alone was drawn, or it and the second
    assert found.high == pytest.approx(1)
    assert str(estimate([0.0, 0.0], [0.0, 0.0])) == "–"


def judged(*right_of_four):
    completion = Completion((1,), (0.0,), "text", True)
    return [
        Judged(
            Sample("Which?", "4", ()),
            (completion,) * 4,
            tuple(Score(0.9 * (i < right), float(i < right), 0.0, None) for i in range(4)),
        )
        for right in right_of_four
    ]


def test_the_summary_averages_over_problems():
    found = summary(judged(0, 1, 4), (1, 2, 4))
    assert found["pass@1"].value == pytest.approx((0 + 0.25 + 1) / 3)
    assert found["pass@2"].value == pytest.approx((0 + 0.5 + 1) / 3)
    assert found["pass@4"].value == pytest.approx(2 / 3)


def test_the_summary_has_what_is_asked_for_and_no_more_than_there_are_samples_for():
    assert list(summary(judged(1, 0), (3, 1))) == ["pass@3", "pass@1"]
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples a problem, there are 4"):
        summary(judged(1, 0), (5,))


@pytest.mark.parametrize(("n", "ks"), [(1, (1,)), (3, (1, 2)), (4, (1, 2, 4)), (16, (1, 2, 4, 8, 16))])
def test_the_powers_of_two_up_to_the_number_of_samples(n, ks):
    assert powers_of_two(n) == ks


def test_a_record_holds_what_every_problem_got_beside_the_means():
    parsed = (("3", "4", None, "3"), (None,) * 4)
    items = [
        replace(item, scores=tuple(replace(score, parsed=answer) for score, answer in zip(item.scores, answers)))
        for item, answers in zip(judged(2, 0), parsed)
    ]
    row = json.loads(json.dumps(evaluation_row(items)))
    assert list(row) == ["pass@1", "pass@2", "pass@4", "n", "problems", "right", "distinct"]
    assert (row["n"], row["right"], row["distinct"]) == (4, [2, 0], [2, 0])
    assert row["pass@2"] == pytest.approx([5 / 12, 0, 5 / 6])  # 5 of 6 pairs hold one of two, for one problem of two
    assert headline(row) == {"pass@1": Estimate(0.25, 0, 0.5), "pass@4": Estimate(0.5, 0, 1)}


def test_an_estimate_reads_as_percent_with_its_interval():
    assert str(Estimate(0.5, 0.4219, 0.578)) == "50.0% [42.2, 57.8]"


def judge_all(engine, preprocessor, config, samples, numbers=None):
    numbers = numbers or range(len(samples))
    return judge(engine, preprocessor, config, samples, requests_for(preprocessor, config, samples, numbers), numbers)


def test_judging_depends_on_the_number_of_a_problem_and_not_on_its_company(config, processor, preprocessor, samples):
    settings = config("trainer.eval_samples=2")
    engine = HfEngine(settings, processor)
    together = judge_all(engine, preprocessor, settings, samples[:3])
    alone = judge_all(engine, preprocessor, settings, samples[2:3], numbers=[2])
    for ours, theirs in zip(alone[0].completions, together[2].completions):
        assert (ours.token_ids, ours.finished) == (theirs.token_ids, theirs.finished)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)  # of another batch: float32 rounding
    assert together[0].completions[0] != together[0].completions[1]
    for item in together:
        texts = [completion.text for completion in item.completions]
        assert list(item.scores) == score_batch(texts, [item.sample] * 2)


def test_an_evaluation_has_a_temperature_of_its_own(config, processor, preprocessor, samples):
    def answers(*overrides, seed=0):
        chosen = config(f"seed={seed}", "trainer.eval_samples=1", "rollout.temperature=5", *overrides)
        return [item.completions[0].token_ids for item in judge_all(engine, preprocessor, chosen, samples)]

    engine = HfEngine(config(), processor)
    assert answers() != answers(seed=1)
    greedy = answers("trainer.eval_temperature=0")
    assert answers("trainer.eval_temperature=0", seed=1) == greedy
    assert answers("trainer.eval_temperature=1e-4", seed=2) == greedy  # the limit of ever colder samples


@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_the_noisy_view_is_of_the_perturbed_images(config, digits_folder, sigma):
    chosen = ("data.test_limit=4", "trainer.eval_samples=2", f"perturb.sigma={sigma}")
    settings = config(f"data.test={digits_folder / 'test.parquet'}", *chosen)
    found = evaluate_model(settings, ("image", "noisy"), Console(quiet=True))
    clean, noisy = ([c.logprobs for item in found[view] for c in item.completions] for view in ("image", "noisy"))
    assert (clean == noisy) == (sigma == 0)
    assert [item.sample for item in found["noisy"]] == [item.sample for item in found["image"]]


def test_the_problems_of_a_record_are_known_by_place_and_answer_whatever_is_asked():
    def problems(change):
        return evaluation_row([replace(one, sample=replace(one.sample, **change)) for one in judged(1, 2)])["problems"]

    assert problems({"place": "a, row 1"}) == problems({"place": "a, row 1", "problem": "Which one? Be brief."})
    assert problems({"place": "a, row 1"}) != problems({"place": "a, row 2"})
    assert problems({"answer": "1"}) != problems({"answer": "2"})


def test_prompts_that_are_too_long_in_one_view_are_left_out_of_all(config, digits_folder, tmp_path, capsys):
    samples = [replace(sample, state="1") for sample in load_samples(digits_folder / "test.parquet", 3)]
    samples[1] = replace(samples[1], state="1 " * 400)
    write_parquet(samples, tmp_path / "test.parquet")
    chosen = (f"data.test={tmp_path / 'test.parquet'}", "trainer.eval_samples=1", "data.max_prompt_tokens=300")
    with pytest.raises(DataError, match=r"test.parquet, row 1.*data.overlong=drop leaves such samples out"):
        evaluate_model(config(*chosen), ("image", "text"), Console(quiet=True))
    found = evaluate_model(config(*chosen, "data.overlong=drop"), ("image", "text"), Console())
    assert "1 of 3 samples are left out, since their prompts are too long" in capsys.readouterr().out
    for judged in found.values():
        assert [item.sample.answer for item in judged] == [samples[0].answer, samples[2].answer]


def test_judged_completions_are_written_one_a_line(tmp_path):
    write_judged({"image": judged(1), "text": judged(0, 2)}, tmp_path / "out.jsonl")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 12
    assert records[0] == {
        "view": "image",
        "category": "",
        "problem": 0,
        "question": "Which?",
        "answer": "4",
        "completion": "text",
        "parsed": None,
        "reward": 0.9,
        "accuracy": 1.0,
    }
    assert [record["problem"] for record in records] == [0] * 8 + [1] * 4
    assert [record["view"] for record in records] == ["image"] * 4 + ["text"] * 8


def test_categories_are_reported_beside_the_whole_where_there_are_several():
    right, wrong = judged(4), judged(0)
    assert by_category(right + wrong) == {"all": right + wrong}
    maze = [Judged(replace(item.sample, category="maze"), item.completions, item.scores) for item in right]
    assert by_category(maze) == {"all": maze}
    assert by_category(maze + wrong + maze) == {"maze": maze + maze, "none": wrong, "all": maze + wrong + maze}
