"""`vogue eval --benchmark` as a user runs it."""

import json

import pytest
from PIL import Image

from vogue.cli import main


@pytest.fixture
def chartqa_folder(tmp_path):
    """Three questions about one image; the tiny model answers in the format, with any digit."""
    folder = tmp_path / "chartqa"
    (folder / "png").mkdir(parents=True)
    Image.new("RGB", (56, 28), "white").save(folder / "png" / "1.png")
    rows = [{"imgname": "1.png", "query": "Which digit?", "label": label} for label in ("3", "7")]
    (folder / "test_human.json").write_text(json.dumps(rows))
    (folder / "test_augmented.json").write_text(json.dumps([rows[0] | {"label": "blue"}]))
    return folder


@pytest.fixture
def refused(capsys, settings):
    """A function: run `vogue eval` with these arguments, which must fail; returns its message."""

    def run(*arguments):
        assert main(["eval", *settings, *arguments]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("vogue eval: ")

    return run


@pytest.mark.slow
def test_chartqa_from_question_to_table(settings, chartqa_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = tmp_path / "out.jsonl"
    chosen = ["--benchmark", "chartqa", "--samples", "8", "--pass-at", "4,8", "--out", str(out)]
    assert main(["eval", *settings, f"data.test={chartqa_folder}", *chosen]) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in printed.splitlines() if "│" in line]
    assert "pass@1" in printed and "pass@4" in printed and "pass@8" in printed
    assert [row[:2] for row in cells] == [["all", "3"], ["augmented", "1"], ["human", "2"]]

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 * 8
    for row in rows:  # the rules by hand: the completion is <think></think>\boxed{digit}
        digit = row["completion"].removeprefix("<think></think>\\boxed{").split("}")[0]
        read = row["completion"].startswith("<think></think>\\boxed{") and digit.isdecimal()
        if read:
            assert row["parsed"] == digit
        assert row["right"] == (row["parsed"] == row["answer"])
    counts = [sum(row["right"] for row in rows if row["problem"] == number) for number in range(3)]
    assert sum(counts) > 0
    assert counts[2] == 0  # no digit is blue
    mean = 100 * sum(counts) / 24
    assert cells[0][2].startswith(f"{mean:.1f}% [")
    ever = 100 * sum(count > 0 for count in counts) / 3
    assert cells[0][4].startswith(f"{ever:.1f}% [")
    unread = sum(row["parsed"] is None for row in rows)
    assert f"no answer was found: {unread} of 24" in printed


def test_what_does_not_go_together_is_refused_before_anything_is_loaded(refused, chartqa_folder):
    chartqa = [f"data.test={chartqa_folder}", "--benchmark", "chartqa"]
    assert refused(*chartqa, "--view", "text") == ("--view text: a benchmark has no printed state to show in its place")
    assert refused(*chartqa, "--extractor", "http://127.0.0.1:9/v1") == (
        "--extractor URL and --extractor-model NAME need each other"
    )
    assert refused(*chartqa, "--extract-all") == "--extract-all needs --extractor, the endpoint to ask"
    assert refused(*chartqa, "--pass-at", "8") == "--pass-at 8 needs --samples 8 or more, but it is 4"
    assert refused("--pass-at", "2,5") == "--pass-at 5 needs --samples 5 or more, but it is 4"
    assert refused("--extractor", "http://127.0.0.1:9/v1").startswith("--extractor needs --benchmark")
    assert refused("--out", "nowhere/out.jsonl") == "--out nowhere/out.jsonl: there is no folder nowhere"
    assert refused(*chartqa, "--extractor", "127.0.0.1", "--extractor-model", "m").startswith(
        "127.0.0.1: an endpoint is"
    )


def test_an_unknown_benchmark_and_a_k_that_is_none_are_refused(settings, capsys):
    for chosen, told in ((["--benchmark", "mmlu"], "'mathverse', 'mathvista'"), (["--pass-at", "1,0"], "from 1 on")):
        with pytest.raises(SystemExit) as stop:
            main(["eval", *settings, *chosen])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


def test_the_help_shows_how_to_run_a_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    printed = capsys.readouterr().out
    for part in ("--benchmark chartqa --samples 16 --pass-at 1,2,4,8,16", "OPENAI_API_KEY", "algopuzzlevqa"):
        assert part in printed
