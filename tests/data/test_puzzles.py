import os
import re
import subprocess
import sys
from collections import Counter
from itertools import permutations

import numpy as np
import pyarrow.parquet as pq
import pytest

from vogue.cli import main
from vogue.data import DataError, load_samples
from vogue.data.puzzles import KINDS, draw_puzzles, puzzle_samples, write_puzzles
from vogue.rewards import score

FORMS = {"clock": r"(1[0-2]|[1-9]):[0-5][0-9]", "board_tiling": "Yes|No"}  # the others: an integer


def content(samples):
    return [(s.problem, s.answer, s.category, s.state, s.images[0].tobytes()) for s in samples]


@pytest.mark.parametrize("kind", KINDS)
def test_a_puzzle_depends_on_the_seed_and_its_number_alone(kind):
    alone = content(puzzle_samples([kind], "train", 6, seed=3, size=112))
    assert content(puzzle_samples([kind], "train", 4, seed=3, size=112)) == alone[:4]
    beside = puzzle_samples(["clock", kind] if kind != "clock" else ["maze", kind], "train", 6, seed=3, size=112)
    assert content(beside)[1::2] == alone
    assert content(puzzle_samples([kind], "train", 6, seed=4, size=112)) != alone


def test_puzzles_are_the_same_in_every_process():
    command = (
        "from vogue.data.puzzles import *\n"
        "for kind in ('maze', 'move_box', 'water_jugs', 'checker_move'):\n"
        "    print([(p.question, p.state) for p in draw_puzzles(kind, 'test', 20, 0)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", command], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop()) > 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_no_state_comes_twice_and_none_is_in_both_splits_whatever_the_seeds(kind):
    count = {"maze": 3000}.get(kind, 600)  # of 3 × 3 mazes there are few: without a check some 5 of these would repeat
    train, test = draw_puzzles(kind, "train", count, seed=0), draw_puzzles(kind, "test", 60, seed=1)
    assert not {puzzle.state for puzzle in train} & {puzzle.state for puzzle in test}
    for puzzles in (train, test):
        # a clock has 720 states, each asked about with different shifts
        shown = {(puzzle.state, puzzle.question if kind == "clock" else "") for puzzle in puzzles}
        assert len(shown) == len(puzzles)


def test_the_test_split_owns_a_tenth_of_the_states():
    pairs = {split: all_of("checker_move", split) for split in ("train", "test")}
    assert 0.08 < pairs["test"] / (pairs["test"] + pairs["train"]) < 0.12


def all_of(kind, split):
    """The number of puzzles there are, from the message to who asks for more."""
    with pytest.raises(
        DataError, match=rf"^1000000 puzzles asked of kind {kind}, split {split}, which has \d+\.$"
    ) as error:
        draw_puzzles(kind, split, 1_000_000, seed=0)
    found = int(re.search(r"has (\d+)", str(error.value))[1])
    assert len(draw_puzzles(kind, split, found, seed=1)) == found
    return found


def test_a_clock_is_asked_about_with_every_shift_at_every_time():
    asked = Counter(puzzle.state for puzzle in KINDS["clock"](np.random.default_rng(0)))
    assert len(asked) == 12 * 60
    assert set(asked.values()) == {4 * 59 * 2}  # 0..3 hours, 1..59 minutes, later and before


def test_every_pair_of_rows_of_checkers_that_moves_join_can_be_drawn():
    def after(row):
        i = row.index("_")
        left, right = row[:i], row[i + 1 :]
        if left.endswith("G"):
            yield left[:-1] + "_G" + right
        if right.startswith("R"):
            yield left + "R_" + right[1:]
        if right.startswith("GR"):
            yield left + "RG_" + right[2:]
        if left.endswith("GR"):
            yield left[:-2] + "_RG" + right

    def reached(row):
        found, last = set(), {row}
        for _ in range(10):
            last = {end for start in last for end in after(start)}
            found |= last
        return found

    rows = {
        "".join(row)
        for green in range(1, 6)
        for red in range(1, 6)
        if 3 <= green + red <= 6
        for row in permutations("G" * green + "R" * red + "_")
    }
    assert sum(len(reached(row)) for row in rows) == all_of("checker_move", "train") + all_of("checker_move", "test")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_takes_the_answer_as_the_question_asks_for_it_and_no_other(kind):
    puzzles = draw_puzzles(kind, "train", 60, seed=0)
    answers = {puzzle.answer for puzzle in puzzles}
    assert len(answers) > 1
    for puzzle in puzzles:
        assert re.fullmatch(FORMS.get(kind, r"\d+"), puzzle.answer)
        assert ("Answer with an integer." in puzzle.question) == (kind not in FORMS)
        for answer in answers:
            earned = score(f"<think>I see.</think>\\boxed{{{answer}}}", puzzle.answer)
            assert earned.accuracy == (answer == puzzle.answer) and earned.format == 1
    assert score("\\boxed{12}", "12:12").accuracy == 0


def test_answers_keep_to_the_ranges_of_the_benchmark_and_none_is_a_safe_guess():
    ranges = {"move_box": 5, "water_jugs": 4, "tower_of_hanoi": 6, "checker_move": 10}
    for kind, most in ranges.items():
        counts = Counter(int(puzzle.answer) for puzzle in draw_puzzles(kind, "train", 400, seed=0))
        assert set(counts) == set(range(1, most + 1))
        assert max(counts.values()) < 1.4 * 400 / most
    tiled = Counter(puzzle.answer for puzzle in draw_puzzles("board_tiling", "train", 600, seed=0))
    assert 250 < tiled["Yes"] < 350


def test_written_splits_are_in_the_easyr1_schema_with_category_and_state(tmp_path):
    write_puzzles(tmp_path, ["clock", "n_queens"], count=5, test=2, size=112, seed=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]
    columns = ["problem", "answer", "images", "source", "category", "state", "keywords"]
    assert pq.read_schema(tmp_path / "train.parquet").names == columns
    for split, count in (("train", 5), ("test", 2)):
        loaded = load_samples(tmp_path / f"{split}.parquet")
        made = list(puzzle_samples(["clock", "n_queens"], split, count, seed=7, size=112))
        assert [s.category for s in loaded] == ["clock", "n_queens"] * count
        for a, b in zip(loaded, made, strict=True):
            assert (a.problem, a.answer, a.source, a.state) == (b.problem, b.answer, "puzzles", b.state)
            assert a.load_images()[0].tobytes() == b.images[0].tobytes()
    assert loaded[0].problem.startswith("<image>The clock shows the time. What time ")


def test_the_command_writes_the_kinds_asked_for(tmp_path, capsys):
    arguments = ["--kind", "maze,clock", "--count", "3", "--test", "1", "--size", "112", "--out", str(tmp_path / "new")]
    assert main(["data", "puzzles", *arguments]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/new/train.parquet\n{tmp_path}/new/test.parquet\n"
    assert [s.category for s in load_samples(tmp_path / "new" / "train.parquet")] == ["maze", "clock"] * 3


def test_the_help_names_every_kind_and_its_commands_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "puzzles", "--help"])
    text = capsys.readouterr().out
    assert f"kinds: {', '.join(KINDS)}\n" in text
    commands = re.findall(r"vogue (data puzzles --kind .*) --count (\d+) --out (\S+)", text)
    assert [(command.count(",") + 1) * int(count) for command, count, _ in commands] == [3000, 8000]
    for command, _, folder in commands:
        few = ["--count", "2", "--test", "1", "--out", str(tmp_path / folder)]
        assert main([*command.split(), *few]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "clock,cloc"], f"kind is 'cloc'; it must be one of {', '.join(KINDS)}."),
        (["--kind", "clock", "--size", "56"], "size is 56 px; puzzles are legible from 112 px."),
        (
            ["--kind", "checker_move", "--count", "5", "--test", "1000"],
            "1000 puzzles asked of kind checker_move, split",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(arguments, message, tmp_path, capsys):
    assert main(["data", "puzzles", *arguments, "--out", str(tmp_path / "new")]) == 2
    assert f"vogue data: {message}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", ["-1", "2.5", "many"])
def test_numbers_must_be_whole(value, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["data", "puzzles", "--count", value, "--out", str(tmp_path)])
    assert f"argument --count: must be a whole number, but is '{value}'" in capsys.readouterr().err


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="split is 'dev'; it must be one of train, test"):
        draw_puzzles("clock", "dev", 1, seed=0)
