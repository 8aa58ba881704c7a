"""The statistics of a sweep, on numbers small enough to work out by hand."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vogue.estimates import interval, sign_flip
from vogue.report.differences import plot_differences
from vogue.settings import ConfigError
from vogue.sweep_table import Outcome, compare, markdown, read_outcome

TOOLS = Path(__file__).parents[1] / "tools"


def outcome(after, before=(0, 0, 0, 0), n=4, problems=None, **training):
    return Outcome(n, problems, list(before), list(after), {"seconds": 2.0} | training)


@pytest.mark.parametrize(
    "differences, p",
    [
        ((1, 2, 3), 2 / 8),  # only all signs alike reach 6
        ((3, 1, -1), 6 / 8),  # |3 +- 1 +- 1| >= 3 for three of four, and as many of -3
        ((1, 2, -3), 1),  # a sum of 0 is reached by any signs
        ((0.1, 0.2, 0.3, 0.1, 0.2), 2 / 32),
        ((-0.1, -0.2, -0.3, -0.1, -0.2), 2 / 32),
        ((0, 0, 0), 1),
        ((5,), 1),
    ],
)
def test_the_sign_flip_test_counts_the_signs_that_reach_the_sum(differences, p):
    assert sign_flip(np.array(differences, float)) == p


def test_identical_variants_differ_by_exactly_nothing():
    runs = {seed: outcome(right) for seed, right in enumerate([(0, 1, 4, 2), (1, 1, 3, 2), (0, 0, 4, 4)])}
    row = compare({"first": runs, "same": dict(runs)})["variants"]["same"]
    assert row["difference"] == {"pass@1": [0, 0, 0], "pass@4": [0, 0, 0]}
    assert row["p"] == {"pass@1": 1, "pass@4": 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"problems": "a"}, {"problems": "b"}),
        ({}, {"after": (0, 1, 2), "before": (0, 0, 0)}),
        ({}, {"before": (0, 0, 0)}),  # whose data.test was changed between its evaluations
    ],
)
def test_runs_that_answered_other_problems_are_not_paired(one, other):
    runs = [outcome(**{"after": (0, 1, 4, 2)} | given) for given in (one, other)]
    with pytest.raises(
        ConfigError, match=r"^long/seed_0 was evaluated on . problems, which aren't the 4 of first/seed"
    ):
        compare({"first": {0: runs[0]}, "long": {0: runs[1]}})


def test_runs_that_have_not_noted_their_problems_are_paired():
    assert compare({"first": {0: outcome((0, 1, 4, 2))}, "new": {0: outcome((0, 1, 4, 2), problems="a")}})


def test_a_shift_of_every_problem_is_found_without_any_spread_of_problems_or_seeds():
    # One more of four right: pass@1 is 0.25 higher everywhere; pass@4 is 1 or 0, and rises where none was right.
    before = {0: (0, 1, 3, 2), 1: (1, 1, 3, 2), 2: (0, 0, 3, 3)}
    first = {seed: outcome(right) for seed, right in before.items()}
    better = {seed: outcome([count + 1 for count in right]) for seed, right in before.items()}
    row = compare({"first": first, "better": better})["variants"]["better"]
    assert row["difference"]["pass@1"] == [0.25, 0.25, 0.25]
    assert row["difference"]["pass@4"][0] == pytest.approx(3 / 12)
    assert row["difference"]["pass@4"][1] < row["difference"]["pass@4"][2]
    assert row["p"]["pass@1"] == 2 / 8
    assert row["p"]["pass@4"] == 4 / 8  # seeds' differences 1/4, 0, 2/4: the sign of the 0 doesn't matter


def test_the_interval_of_two_seeds_without_spread_of_problems_has_three_values():
    found = interval(np.array([[0.0] * 50, [1.0] * 50]))  # resampled seeds: 0, 1/2, 1/2, 1
    assert (found.value, found.low, found.high) == (0.5, 0, 1)


def test_more_seeds_with_the_same_answers_do_not_narrow_the_interval():
    # The same problems were drawn for all seeds: 10 x 100 values of which only 100 are independent.
    found = interval(np.tile([0.0, 1.0], (10, 50)))
    assert found.value == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 100**0.5, rel=0.1)


def test_the_interval_has_the_spread_of_seeds_and_of_problems():
    rng = np.random.default_rng(0)
    seeds, problems = rng.normal(size=(40, 1)), rng.normal(size=(1, 200))
    found = interval(seeds + problems)
    expected = (seeds.var() / 40 + problems.var() / 200) ** 0.5
    assert found.value == pytest.approx(seeds.mean() + problems.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_a_run_whose_problems_were_exchanged_is_refused(tmp_path):
    rows = [{"step": step, "n": 4, "right": [1], "problems": name} for step, name in ((0, "a"), (5, "b"))]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="its first and its last evaluation are of different problems"):
        read_outcome(tmp_path)


def test_a_run_is_read_from_its_folder(tmp_path):
    evaluations = [{"step": step, "n": 4, "right": right} for step, right in ((0, [0, 1]), (5, [2, 2]), (10, [3, 4]))]
    metrics = [
        {"step": step, "entropy": step, "distinct_answers": 2.0, "time/train/forward": 9.0, "generated_tokens": 100.0}
        | {f"time/{phase}": 0.1 * (step + 1) ** 2 for phase in ("data", "rollout", "reward", "train", "sync")}
        | ({"u_per": 0.5} if step == 9 else {})
        for step in range(10)
    ]
    for name, rows in {"evaluations": evaluations, "metrics": metrics}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_outcome(tmp_path)
    assert (found.n, found.before, found.after) == (4, [0, 1], [3, 4])
    seconds = found.training.pop("seconds")
    assert seconds == pytest.approx(0.5 * (25 + 36) / 2)  # steps take 0.5, 2, 4.5 ... 50; the forward is part of train
    assert found.training.pop("generated") == 1000  # of the whole run
    assert found.training == {"entropy": 8.5, "distinct_answers": 2.0, "u_per": 0.5}  # of the last two steps


def test_variants_are_paired_over_the_seeds_that_both_have():
    first = {0: outcome((0, 0, 0, 0)), 1: outcome((4, 4, 4, 4))}
    other = {1: outcome((4, 4, 0, 4)), 2: outcome((0, 0, 0, 0))}
    rows = compare({"first": first, "other": other, "none": {}, "apart": {2: outcome((1, 1, 1, 1))}})["variants"]
    assert rows["other"]["seeds"] == [1, 2]
    assert rows["other"]["paired"] == [1]
    assert rows["other"]["held_out"]["pass@1"][0] == 3 / 8
    assert rows["other"]["difference"]["pass@1"][0] == -1 / 4
    assert rows["none"] == {"baseline": "first", "seeds": []}
    assert "difference" not in rows["apart"]
    assert "difference" not in rows["first"]


def test_a_variant_with_a_baseline_of_its_own_is_compared_with_that_one():
    outcomes = {
        "grpo": {0: outcome((0, 2), (0, 1))},
        "vogue": {0: outcome((2, 2), (0, 1))},
        "grpo_other": {0: outcome((4, 3), (3, 3))},
        "vogue_other": {0: outcome((4, 4), (3, 3))},
    }
    found = compare(outcomes, {"vogue_other": "grpo_other"})
    assert {name: row["pass@1"][0] for name, row in found["before"].items()} == {"grpo": 1 / 8, "grpo_other": 6 / 8}
    rows = found["variants"]
    assert {name: row["difference"]["pass@1"][0] for name, row in rows.items() if "difference" in row} == {
        "vogue": 2 / 8,
        "vogue_other": 1 / 8,
    }
    lines = markdown(found, seeds=1).splitlines()
    assert lines[0] == "| variant | seeds | pass@1 | minus its baseline | p | pass@4 | minus its baseline | p |"
    assert lines[2].startswith("| (before training) |  | 12.5% [") and "| (before training, grpo_other) |" in lines[3]
    assert lines[6].startswith("| grpo_other | 1 | 87.5% [") and lines[6].endswith("|  |  |")
    assert lines[7].startswith("| vogue_other (baseline: grpo_other) | 1 | 100.0% [") and "| +12.5 [" in lines[7]
    assert "Differences from grpo, or from the baseline that stands behind the name, in points" in "\n".join(lines)


def test_the_table_says_what_is_in_it():
    first = {seed: outcome((0, 2), (0, 1), entropy=1.0 + seed, generated=5600.0 + 100 * seed) for seed in range(2)}
    other = {seed: outcome((1, 3), (0, 1), u_per=0.01) for seed in range(2)}
    lines = markdown(compare({"grpo": first, "vogue": other}), seeds=3).splitlines()
    assert lines[0] == "| variant | seeds | pass@1 | minus grpo | p | pass@4 | minus grpo | p |"
    assert lines[2].startswith("| (before training) |  | 12.5% [0.0, 25.0] |  |  | 50.0% [0.0, 100.0] |")
    assert lines[3].startswith("| grpo | 2 of 3 | 25.0% [0.0, 50.0] |  |  | 50.0% [0.0, 100.0] |")
    assert lines[4].startswith("| vogue | 2 of 3 | 50.0% [25.0, 75.0] | +25.0 [+25.0, +25.0] | 0.5 | 100.0%")
    assert lines[8] == "| grpo | 1.5 ± 0.71 |  | 2 ± 0 | 5,650 ± 71 |"
    assert lines[9] == "| vogue |  | 0.01 ± 0 | 2 ± 0 |  |"
    assert "which 2 of them can't bring below 0.5" in lines[13]


def test_several_sweeps_have_one_table_and_one_figure(tmp_path, capsys, monkeypatch):
    first = {seed: outcome((0, 2), (0, 1), generated=1000.0) for seed in range(2)}
    better = {seed: outcome((1, 3), (0, 1), generated=1500.0) for seed in range(2)}
    given = []
    for task, variants in {"one": {"better": better}, "two": {"same": first, "none": {}}}.items():
        (tmp_path / f"{task}.json").write_text(json.dumps(compare({"grpo": first, **variants})))
        given.append(f"{task}={tmp_path / task}.json")
    monkeypatch.setattr(sys, "argv", ["sweep_tables.py", *given, "--out", str(tmp_path / "figure.png")])
    runpy.run_path(str(TOOLS / "sweep_tables.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        "| variant | one: pass@1 | one: pass@4 | one: tokens | two: pass@1 | two: pass@4 | two: tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| better | +25.0* | +50.0 | 1.5 | – | – | – |",  # pass@4 rises in one problem of two
        "| same | – | – | – | +0.0 | +0.0 | 1.0 |",
    ]
    with Image.open(tmp_path / "figure.png") as image:
        assert len(image.convert("RGB").getcolors(100_000)) > 10


def test_one_seed_has_no_deviation_and_two_completions_no_pass_at_4():
    found = compare({"only": {7: outcome((1, 2), (0, 0), n=2)}})
    assert list(found["before"]["only"]) == ["pass@1"]
    assert found["variants"]["only"]["training"] == {"seconds": [2.0, None]}
    assert markdown(found, seeds=1).splitlines()[7] == "| only | 2 |"


def test_the_figure_has_a_row_of_each_variant_but_the_first(tmp_path):
    first = {seed: outcome((0, 2), (0, 1), generated=1000.0) for seed in range(2)}
    others = {f"other {i}": {seed: outcome((1, 3), (0, 1), generated=2000.0) for seed in range(2)} for i in range(3)}
    plot_differences({"": compare({"grpo": first})}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    sizes = []
    for count in (1, 3):
        chosen = dict(list(others.items())[:count])
        plot_differences({"": compare({"grpo": first, "empty": {}, **chosen})}, path := tmp_path / f"{count}.png")
        with Image.open(path) as image:
            sizes.append(image.size)
            assert len(image.convert("RGB").getcolors(100_000)) > 10
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] - sizes[0][1] == pytest.approx(2 * 0.24 * 120, abs=2)
