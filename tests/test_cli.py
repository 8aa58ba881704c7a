"""What a user sees who gets something wrong: exit code 2 and one message that names it, before anything is trained."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from vogue.cli import main
from vogue.config import Config
from vogue.config.settings_help import fields
from vogue.run.folder import read_rows


@pytest.fixture
def fails(capsys):
    """A function: run a command that must fail; returns its message."""

    def run(*arguments):
        assert main(list(arguments)) == 2
        output = capsys.readouterr()
        assert "Traceback" not in output.out + output.err
        message = [line for line in output.err.splitlines() if line.startswith("vogue ")]
        assert len(message) == 1
        return message[0]

    return run


def data_file(folder, **changes):
    path = folder / "bad.json"
    path.write_text(json.dumps([{"problem": "How many?", "answer": "3", "images": []} | changes]))
    return f"data.train={path}"


def test_an_unknown_setting(fails, settings):
    message = fails("train", *settings, "trainer.stepz=3")
    assert message == "vogue train: unknown setting trainer.stepz; `vogue train --help` lists them all"


def test_a_configuration_file_that_is_missing(fails, settings):
    assert fails("train", "nowhere.yaml", *settings) == "vogue train: configuration file nowhere.yaml does not exist"


def test_two_configuration_files(fails, settings):
    assert "second.yaml: one YAML file may stand before" in fails("train", "first.yaml", "second.yaml", *settings)


def test_a_missing_model_folder(fails, settings):
    assert fails("train", *settings, "model.path=/nowhere/model").startswith("vogue train: model.path=/nowhere/model: ")


def test_a_missing_data_file(fails, settings):
    assert "nowhere.parquet: no such file" in fails("train", *settings, "data.train=nowhere.parquet")


def test_no_data_file(fails, settings):
    assert "data.train is not set" in fails("train", *[text for text in settings if not text.startswith("data.train=")])
    assert "data.test is not set" in fails("eval", *[text for text in settings if not text.startswith("data.test=")])


def test_an_image_that_cannot_be_read(fails, settings, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    message = fails("train", *settings, data_file(tmp_path, images=["broken.png"]))
    assert "bad.json, row 0: image 1 of 1" in message
    assert "broken.png) cannot be read" in message


def test_an_image_that_is_missing(fails, settings, tmp_path):
    assert "nowhere.png) cannot be read" in fails("train", *settings, data_file(tmp_path, images=["nowhere.png"]))


def test_a_sample_without_an_answer(fails, settings, tmp_path):
    message = fails("train", *settings, data_file(tmp_path, answer=""))
    assert "bad.json, row 0: 'answer' must be text and not empty" in message


def test_a_prompt_that_is_too_long_is_refused_with_its_length(fails, settings, tmp_path):
    message = fails("train", *settings, data_file(tmp_path, problem="word " * 200))
    assert "bad.json, row 0: the prompt has " in message
    assert "more than data.max_prompt_tokens=128" in message


def test_an_output_folder_that_holds_a_run(fails, settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "run holds a run already: pass --resume" in fails("train", *settings)


def test_a_checkpoint_that_is_not_there(fails, settings, tmp_path):
    told = f"--resume=step_000009: there is no such checkpoint in {tmp_path}/run/checkpoints; there are none"
    assert told in fails("train", *settings, "--resume=step_000009")


def test_settings_may_stand_on_both_sides_of_an_option(fails, settings):
    unknown = "unknown setting nothing;"
    assert unknown in fails("train", "--resume", *settings, "nothing.like=1")
    assert unknown in fails("train", settings[0], "--resume", *settings[1:], "nothing.like=1")
    assert unknown in fails("train", settings[0], "--resume=step_000002", *settings[1:], "nothing.like=1")


def test_prompts_that_updates_do_not_divide(fails, settings):
    assert "trainer.updates=3 does not divide rollout.prompts=4" in fails("train", *settings, "trainer.updates=3")


def test_nothing_is_written_by_a_run_that_cannot_start(fails, settings, tmp_path):
    fails("train", *settings, "model.path=/nowhere/model")
    assert list(tmp_path.iterdir()) == []


def test_warmstart_does_not_overwrite_a_folder(fails, tmp_path):
    assert f"{tmp_path} exists already" in fails("warmstart", str(tmp_path))


def test_the_digits_own_warmstart_settings_do_not_go_with_data(fails, tmp_path):
    folder = tmp_path / "base"
    message = fails("warmstart", str(folder), "--data", "train.parquet", "--misread", "0.2")
    assert message == "vogue warmstart: --misread 0.2 is of the digits' demonstrations: it goes without --data"
    assert "nowhere.parquet: no such file" in fails("warmstart", str(folder), "--data", "nowhere.parquet")
    message = fails("warmstart", str(folder), "--model", "base")
    assert message == "vogue warmstart: --model base is of other data's demonstrations: it goes with --data"


def test_help_lists_every_setting_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    words = " ".join(" ".join(lines).split())
    for key, field in fields(Config, ""):
        default = "required" if field.is_required() else "unset" if field.default is None else field.default
        assert f"  {key} [{default}]" in lines
        assert f"{key} [{default}] {field.description}" in words
    assert "perturb: T(x): how an image is perturbed." in lines
    assert max(map(len, lines)) <= 120


def test_evaluation_prints_pass_at_k_with_its_interval_and_writes_the_completions(settings, capsys, tmp_path):
    assert main(["eval", *settings, "--samples", "4", "--out", str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "pass@1" in printed
    assert "pass@4" in printed
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6 * 4


def test_evaluation_compares_the_views_of_each_category(settings, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    chosen = ["--samples", "1", "--view", "image,text,both", "--out", str(tmp_path / "out.jsonl")]
    assert main(["eval", *settings, *chosen]) == 0
    cells = [re.split(r"\s*│\s*", line.strip("│ ")) for line in capsys.readouterr().out.splitlines() if "│" in line]
    counted = {(category, view): int(problems) for category, view, problems, *_ in cells}
    assert [view for category, view in counted if category == "all"] == ["image", "text", "both"]
    for view in ("image", "text", "both"):
        assert sum(counted[key] for key in counted if key[1] == view) == 2 * counted["all", view] == 12
    questions = {}
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        record = json.loads(line)
        questions.setdefault(record["view"], []).append(record["question"])
    for image, text, both in zip(*questions.values()):
        digits = re.fullmatch(r"(Left digit: \d\nRight digit: \d\n\n)(W.*)", text)
        assert (image, both) == ("<image>" + digits[2], "<image>" + text)


def test_a_view_that_does_not_exist_or_has_no_state(fails, settings, tmp_path):
    assert fails("eval", *settings, "--view", "sound") == (
        "vogue eval: view is 'sound'; it must be one of image, noisy, text, both."
    )
    data = data_file(tmp_path).removeprefix("data.train=")
    assert f"{data}, row 0: view 'text' needs a 'state'" in fails(
        "eval", *settings, f"data.test={data}", "--view", "text"
    )


def test_more_digits_than_there_are_and_nothing_is_written(fails, tmp_path):
    message = fails("data", "digits", str(tmp_path / "data"), "--train", "50", "--test", "10000000")
    assert re.fullmatch(r"vogue data: 10000000 pairs asked of the test split, which has \d+\.", message)
    assert not (tmp_path / "data").exists()


def test_an_evaluation_takes_a_runs_file_that_evaluates_as_it_trains(fails, settings):
    message = fails("eval", *settings, "trainer.eval_every=2", "data.test=null")
    assert message == "vogue eval: data.test is not set: the samples to evaluate on"


def test_an_option_that_does_not_exist(settings, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *settings, "--frobnicate"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --frobnicate" in capsys.readouterr().err


def test_profile_takes_steps_and_nothing_else(settings, capsys):
    with pytest.raises(SystemExit):
        main(["train", *settings, "--profile", "3,x"])
    assert "3,x is not a list of steps such as 3,5" in capsys.readouterr().err


def test_profile_writes_a_trace_of_the_chosen_step_alone(settings, tmp_path):
    assert main(["train", *settings, "trainer.steps=2", "--profile", "1"]) == 0
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "step_000001_rank0.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"vogue::linear_branch_stats", "aten::mm"} <= names


def curves(folder):
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/", "memory")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


@pytest.mark.slow
def test_a_run_leaves_what_it_promises_and_goes_on_as_if_it_had_not_stopped(settings, capsys, tmp_path):
    settings = [*settings, "trainer.save_every=2", "trainer.eval_every=2", "data.test_limit=2", "rollout.n=4"]
    settings += ["trainer.measure_every=3"]
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert main(["train", *settings]) == 0
    assert str(run / "curves.png") in capsys.readouterr().out.replace("\n", "")
    files = {"metrics.jsonl", "completions.jsonl", "evaluations.jsonl", "config.yaml", "curves.png"}
    assert {path.name for path in run.iterdir()} == files | {*("tensorboard", "checkpoints", "completions", ".lock")}
    shutil.copytree(run, straight)

    shutil.rmtree(run / "checkpoints" / "step_000004")  # as if it had stopped before that was whole
    assert main(["train", *settings, "--resume"]) == 0
    assert [row["step"] for row in curves(run)] == [0, 1, 2, 3]
    assert any(row["loss"] != 0 for row in curves(run)[2:])
    assert curves(run) == curves(straight)
    capsys.readouterr()
    assert main(["watch", str(run)]) == 0
    assert "4 of 4 steps · finished" in capsys.readouterr().out
    (limit,) = {row["memory_gb_limit"] for row in read_rows(run / "metrics.jsonl")}
    assert 0 < limit < 1e6
    images = [
        {path.name: path.read_bytes() for path in (folder / "completions").iterdir()} for folder in (run, straight)
    ]
    assert len(images[0]) >= 8
    assert images[0] == images[1]
    for name in ("evaluations.jsonl", "completions.jsonl"):
        assert (run / name).read_text() == (straight / name).read_text()
    weights = [load_file(folder / "checkpoints/step_000004/hf/model.safetensors") for folder in (straight, run)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_a_training_whose_gradients_are_no_longer_finite_ends(settings, capsys, tmp_path):
    (tmp_path / "alternating.py").write_text(
        "def score(texts, samples):\n    return [i % 2 for i in range(len(texts))]\n"
    )
    chosen = ["optimizer.lr=1e30", f"reward.function={tmp_path}/alternating.py:score"]
    assert main(["train", *settings, *chosen]) == 1
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vogue ")]
    assert len(message) == 1
    assert message[0].startswith("vogue train: step 3: the gradient wasn't finite in 3 updates in a row, none of which")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1]
    assert ["grad_norm" in row for row in rows] == [True, False, False]
    chosen += ["trainer.deepspeed.zero_optimization.stage=0", f"trainer.output_dir={tmp_path}/unpartitioned"]
    assert main(["train", *settings, *chosen]) == 1
    assert "step 1: the gradient isn't finite, and ZeRO's stage 0 would apply it" in capsys.readouterr().err
