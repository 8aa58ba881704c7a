"""`vogue score`: a verdict step by step, and a run's completions scored again."""

import json

import pytest

from vogue.cli import main


def lines(capsys, *arguments):
    """What the command prints, by the name of the step."""
    assert main(["score", *arguments]) == 0
    return {line[:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}


def test_a_verdict_is_told_step_by_step(capsys):
    told = lines(capsys, "<think>5 + 7</think> \\boxed{5} or \\boxed{12 cm}", "12 m")
    assert told == {
        "given": "'12 cm', from the last finished \\boxed{}",
        "read as": "the number 12 with the unit cm",
        "right answer": "'12 m', read as the number 12 with the unit m",
        "verdict": "wrong: units differ: cm, m",
        "accuracy": "0, weight 0.9",
        "format": "1, weight 0.1",
        "reward": "0.1",
    }


def test_a_completion_without_an_answer_is_told_what_was_asked_for(capsys):
    told = lines(capsys, "\\boxed{3}", "3", "reward.design=vanilla")
    assert told["given"] == "none: nothing in a finished <answer>, which reward.design=vanilla asks for"
    assert told["reward"] == "0"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("(B) 12 cm", "option B with the text '12 cm'"),
        ("3:05:30 pm", "the time 15:05:30"),
        ("x = 1/2", "the number 1/2, called x"),
        ("4:3", "a ratio of 4, 3"),
        ("{1, 2}", "several answers (\\{\\}): 1 | 2"),
        ("2\\sqrt{3} \\text{ cm}", "the expression 2\\sqrt{3} with the unit cm"),
        ("On Top!", "the words 'on top'"),
    ],
)
def test_what_an_answer_was_read_as_is_told(capsys, given, told):
    assert lines(capsys, f"\\boxed{{{given}}}", "5")["read as"] == told


def test_a_runs_completions_are_scored_again_and_the_changes_shown(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {path: some/model}\nreward: {design: vanilla}\n")
    rows = [("<answer>no pot</answer>", "on top", 1.0), ("<answer>３</answer>", "3", 0.0), ("3", "3", 0.0)]
    path = tmp_path / "completions.jsonl"
    keys = ("completion", "answer", "accuracy")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    assert main(["score", "--file", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "line 1: 1 is now 0",
        "  'no pot' for 'on top': words, case and spacing apart",
        "line 2: 0 is now 1",
        "  '３' for '3': the same text, but for how it is written",
        "3 completions: 1 more are right, 1 fewer",
    ]


def test_what_cannot_be_scored_is_refused(tmp_path, capsys):
    assert main(["score", "\\boxed{3}"]) == 2
    assert "COMPLETION and ANSWER are missing" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"completion": "3"}\n')
    assert main(["score", "--file", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl, line 1: no 'answer'; it has completion" in capsys.readouterr().err
    assert main(["score", "--file", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl: no completions in it" in capsys.readouterr().err
