"""`vogue sweep`: what it refuses, what it runs and in which order, and how it goes on.

Most of these put a script in the place of `vogue train`, through the sweep's own `launcher`: it leaves the files of a
run within a second, or fails in the way that it is told to.
"""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from omegaconf import OmegaConf

from vogue.cli import main
from vogue.config import Config, load_config, save_config
from vogue.sweep import GRACE, Sweep, load_sweep, plan

ROOT = Path(__file__).parents[1]
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
from vogue.config import load_config, save_config

resume = sys.argv[-1] == "--resume"
config = load_config(sys.argv[1], sys.argv[2 : len(sys.argv) - resume])
folder = config.trainer.output_dir
name = f"{folder.parent.name}/{folder.name}"
here = pathlib.Path(__file__).parent
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps([name, resume, os.environ["OMP_NUM_THREADS"]]) + "\\n")
how = json.loads((here / "how.json").read_text()).get(name)

if how == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the child, which inherits that and must be killed
    child = subprocess.Popen(["sleep", "1000"])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (here / "pids.json.new").write_text(json.dumps([os.getpid(), child.pid]))
    os.rename(here / "pids.json.new", here / "pids.json")
    child.wait()
if how == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / "pids.json").write_text(json.dumps([os.getpid()]))
    time.sleep(1000)
if how == "meet":  # ends well only where two of these run at once
    (here / f"met-{folder.name}").touch()
    deadline = time.monotonic() + 60
    while len(list(here.glob("met-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    how = "alone" if time.monotonic() >= deadline else None
if how == "silent":
    sys.exit(0)
if not resume and (folder / "metrics.jsonl").exists():
    sys.exit("holds a run already")
folder.mkdir(parents=True, exist_ok=True)
save_config(config, folder / "config.yaml")
phases = {f"time/{phase}": 0.5 for phase in ("data", "rollout", "reward", "train", "sync")}
(folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "entropy": 1.0} | phases) + "\\n")
if how == "fail after a checkpoint":
    (folder / "checkpoints/step_000001").mkdir(parents=True)
    (folder / "checkpoints/step_000001/state.json").write_text("{}")
if how == "fail after an evaluation":
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": 0, "n": 4, "right": [0, 1, 2]}) + "\\n")
if how:
    sys.exit(f"line before\\n{name}: something went [wrong]")
rows = [{"step": 0, "n": 4, "right": [0, 1, 2]}, {"step": config.trainer.steps, "n": 4, "right": [1, 1, 3]}]
(folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
print("ran", name)
"""
BASE = {
    "model": {"path": "base"},
    "data": {"train": "train.parquet", "test": "test.parquet"},
    "trainer": {"steps": 2, "eval_every": 2},
}


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    """A function: write a sweep of two variants and two seeds, with changes; returns its path as text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "how.json").write_text("{}")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def write(**changes):
        sweep = {
            "settings": "base.yaml",
            "output_dir": "out",
            "seeds": [0, 1],
            "variants": {"grpo": ["method=grpo"], "vogue": []},
            "launcher": [sys.executable, "stand_in.py"],
        } | changes
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
        return "sweep.yaml"

    return write


@pytest.fixture
def how(tmp_path):
    """A function: tell the stand-in how runs are to go wrong, by their name."""
    return lambda **ways: (tmp_path / "how.json").write_text(json.dumps({k.replace("__", "/"): ways[k] for k in ways}))


@pytest.fixture
def calls(tmp_path):
    """A function: the calls of the stand-in since it was last asked, (name, resumed, threads) each."""

    def read():
        path = tmp_path / "calls.jsonl"
        found = [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    return read


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seedz": [1]}, "unknown setting seedz; `vogue sweep --help` lists them all"),
        ({"seeds": []}, "seeds=[]: "),
        ({"seeds": [0, 3, 3]}, "seeds=[0, 3, 3]: 3 is there more than once"),
        ({"variants": {}}, "variants={}: "),
        ({"variants": {"../vogue": []}}, "'../vogue': string should match pattern"),
        ({"variants": {"vogue": None}}, "variants.vogue=None: "),
        ({"baselines": {"vogue": "gpro"}}, "baselines: vogue: there is no variant gpro"),
        (
            {"variants": {"a": [], "b": [], "c": []}, "baselines": {"b": "a", "c": "b"}},
            "baselines: c: b is compared with a itself",
        ),
        ({"jobs": 0}, "jobs=0: "),
        ({"variants": {"grpo": [], "bad": ["guidance.alpha_perr=1"]}}, "variant bad: unknown setting guidance.alpha_p"),
        ({"variants": {"bad": ["method=grpo", "guidance.alpha_per=1"]}}, "variant bad: method=grpo fixes guidance.al"),
        ({"overrides": ["seed=3"]}, "seed=3: a sweep sets seed and trainer.output_dir itself"),
        ({"variants": {"a": [], "b": ["data.test=b.parquet"]}}, "variant b: data.test=b.parquet, but a has test.parq"),
        ({"overrides": ["trainer.eval_every=0"]}, "trainer.eval_every is not set"),
        ({"settings": "nowhere.yaml"}, "configuration file nowhere.yaml does not exist"),
        ({"launcher": ["no-such-launcher"]}, "launcher: there is no command no-such-launcher"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_before_anything_is_written(
    sweep_file, capsys, tmp_path, changes, message
):
    file = sweep_file(**changes)
    before = sorted(tmp_path.iterdir())
    assert main(["sweep", file]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vogue sweep: ")
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_variant_that_is_there_twice_is_refused(sweep_file, capsys, tmp_path):
    file = sweep_file()
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text.replace("  vogue: []\n", "  grpo: []\n"))
    assert main(["sweep", file]) == 2
    assert "found duplicate key grpo" in capsys.readouterr().err


def test_a_sweep_needs_its_file_and_a_table_a_run(sweep_file, capsys):
    assert main(["sweep", "trainer.steps=3"]) == 2
    assert "FILE is missing" in capsys.readouterr().err
    assert main(["sweep", sweep_file(), "--table"]) == 2
    assert "no run in out is done yet" in capsys.readouterr().err


def test_help_shows_every_setting_of_a_sweep(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    text = capsys.readouterr().out
    for name in Sweep.model_fields:
        assert f"\n  {name}: " in text


def test_the_example_compares_variants_with_grpo(monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    sweep = load_sweep("examples/sweeps/digits.yaml")
    assert next(iter(sweep.variants)) == "grpo"
    assert sweep.jobs == 2
    assert load_sweep("examples/sweeps/digits.yaml", jobs=1).jobs == 1


# ------------------------------------------------------------------------------------------------------------ runs


def leave_checkpoint(config, step, **rows):
    """What a run that was stopped at `step` leaves; `rows` of its logs by their names. Returns the model's folder."""
    folder = config.trainer.output_dir
    model = folder / "checkpoints" / f"step_{step:06d}" / "hf"
    model.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    for name, log in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return model


def test_a_variant_may_go_on_from_runs_that_began_with_the_model_of_the_others(sweep_file, capsys, tmp_path):
    second = r"model.path=second/\${seed}/checkpoints/step_000003/hf"
    file = sweep_file(variants={"grpo": ["method=grpo"], "staged": [second]})
    assert main(["sweep", file]) == 2
    assert "staged: model.path=second/0/checkpoints/step_000003/hf, but grpo has base: a var" in capsys.readouterr().err
    steps = [{"step": step, "generated_tokens": 10**step} for step in range(6)]
    for seed in (0, 1):
        first, then = (f"trainer.output_dir={name}/{seed}" for name in ("first", "second"))
        model = leave_checkpoint(load_config("base.yaml", [first]), 2, metrics=steps)
        leave_checkpoint(load_config("base.yaml", [then, f"model.path={model}"]), 3, metrics=steps)
    assert main(["sweep", file]) == 0
    table = json.loads((tmp_path / "out/table.json").read_text())["variants"]
    assert table["staged"]["training"]["generated"] == [111 + 11, 0.0]  # of steps behind the checkpoint nothing
    assert "generated" not in table["grpo"]["training"]
    save_config(load_config("base.yaml", ["model.path=other"]), tmp_path / "second/1/config.yaml")
    assert main(["sweep", file]) == 2
    assert "staged: model.path=other, but grpo has base: a var" in capsys.readouterr().err


def test_a_variant_of_another_model_is_compared_with_its_own_baseline(sweep_file, capsys, tmp_path):
    other = ["method=grpo", "model.path=other"]
    given = {"variants": {"grpo": ["method=grpo"], "vogue": [], "grpo_other": other, "vogue_other": [other[1]]}}
    assert main(["sweep", sweep_file(**given)]) == 2
    assert "grpo_other: model.path=other, but grpo has base: a var" in capsys.readouterr().err
    given["baselines"] = {"grpo_other": "grpo", "vogue_other": "grpo"}
    assert main(["sweep", sweep_file(**given)]) == 2
    given["baselines"] = {"vogue_other": "grpo_other"}
    capsys.readouterr()
    assert main(["sweep", sweep_file(**given)]) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "out/table.json").read_text())["variants"]
    assert [name for name, row in rows.items() if "difference" in row] == ["vogue", "vogue_other"]
    assert {name: row["baseline"] for name, row in rows.items()} == {
        **{"grpo": "grpo", "vogue": "grpo", "grpo_other": "grpo_other", "vogue_other": "grpo_other"}
    }


def test_runs_take_turns_by_seed_and_a_variant_stands_over_the_overrides(sweep_file):
    file = sweep_file(
        overrides=["guidance.alpha_per=3", "trainer.steps=4"], variants={"a": ["trainer.steps=6"], "b": []}
    )
    runs = plan(load_sweep(file), ["trainer.steps=8"])
    assert [run.name for run in runs] == ["a/seed_0", "b/seed_0", "a/seed_1", "b/seed_1"]
    assert [run.config.trainer.steps for run in runs] == [6, 8, 6, 8]
    assert {run.config.guidance.alpha_per for run in runs} == {3}
    assert [run.config.seed for run in runs] == [0, 0, 1, 1]
    assert str(runs[1].folder) == "out/b/seed_0"
    assert isinstance(runs[0].config, Config)


def test_a_sweep_leaves_runs_logs_and_a_table_and_does_nothing_twice(sweep_file, calls, capsys, tmp_path):
    file = sweep_file()
    assert main(["sweep", file, "data.limit=9"]) == 0
    cores = str(len(os.sched_getaffinity(0)))
    names = ["grpo/seed_0", "vogue/seed_0", "grpo/seed_1", "vogue/seed_1"]
    assert calls() == [(name, False, cores) for name in names]
    assert (tmp_path / "out/vogue/seed_1.log").read_text() == "ran vogue/seed_1\n"
    table = (tmp_path / "out/table.md").read_text()
    assert table.startswith("`vogue sweep sweep.yaml data.limit=9`\n\n| variant | seeds | pass@1 |")
    for text in ("| vogue | 2 | 41.7% [", "| +0.0 [+0.0, +0.0] | 1 |", "torch 2.", "cores "):
        assert text in table
    values = json.loads((tmp_path / "out/table.json").read_text())
    assert values["before"]["grpo"]["pass@1"][0] == 3 / 12
    assert values["variants"]["grpo"]["held_out"]["pass@1"][0] == pytest.approx(5 / 12)
    assert "41.7% [" in capsys.readouterr().out

    assert main(["sweep", file, "data.limit=9"]) == 0
    assert "4 of 4 runs are done already" in capsys.readouterr().out
    assert main(["sweep", file, "--table", "data.limit=9"]) == 0
    assert "41.7% [" in capsys.readouterr().out
    assert calls() == []


def test_a_failed_run_stops_no_other_and_is_named_with_the_end_of_its_log(sweep_file, how, calls, capsys):
    how(grpo__seed_0="fail", vogue__seed_1="silent")
    assert main(["sweep", sweep_file()]) == 1
    output = capsys.readouterr().out
    assert "grpo/seed_0 failed with exit code 1; out/grpo/seed_0.log ends with:\n  line before\n" in output
    assert "  grpo/seed_0: something went [wrong]\n" in output
    assert "vogue/seed_1 ended before its last evaluation; out/vogue/seed_1.log ends with:" in output
    assert output.count("1 of 2") == 2  # of each variant's seeds, in the table
    assert len(calls()) == 4
    how()
    assert main(["sweep", sweep_file()]) == 0
    assert [(name, resumed) for name, resumed, _ in calls()] == [("grpo/seed_0", False), ("vogue/seed_1", False)]


def test_a_run_goes_on_from_its_checkpoint(sweep_file, how, calls, tmp_path):
    file = sweep_file(seeds=[0])
    how(vogue__seed_0="fail after a checkpoint")
    assert main(["sweep", file]) == 1
    calls()
    how()
    assert main(["sweep", file]) == 0
    assert [(name, resumed) for name, resumed, _ in calls()] == [("vogue/seed_0", True)]
    assert (tmp_path / "out/vogue/seed_0.log").read_text().splitlines()[-2:] == [
        "vogue/seed_0: something went [wrong]",
        "ran vogue/seed_0",
    ]


def test_a_run_is_done_after_its_last_evaluation_and_not_after_its_first(sweep_file, how, calls):
    file = sweep_file(seeds=[0])
    how(vogue__seed_0="fail after an evaluation")
    assert main(["sweep", file]) == 1
    calls()
    how()
    assert main(["sweep", file]) == 0
    assert [name for name, _, _ in calls()] == ["vogue/seed_0"]


@pytest.mark.parametrize("way", ["done", "fail", "fail after a checkpoint"])
def test_what_other_settings_made_is_neither_compared_nor_gone_on_with_nor_removed(
    sweep_file, how, calls, capsys, tmp_path, way
):
    file = sweep_file(seeds=[0])
    how(**({} if way == "done" else {"vogue__seed_0": way}))
    main(["sweep", file])
    calls()
    capsys.readouterr()
    for option in ([], ["--table"]):
        assert main(["sweep", file, "trainer.steps=3", *option]) == 2
        error = capsys.readouterr().err
        assert "seed_0 holds another run than this sweep's: trainer.steps was 2 and is 3; choose another" in error
    assert calls() == []
    assert (tmp_path / "out/vogue/seed_0/metrics.jsonl").exists()
    how()
    assert main(["sweep", file, "trainer.keep=1"]) == 0  # which changes nothing that a run computes


def test_so_many_runs_at_a_time_share_the_cores(sweep_file, how, calls):
    how(vogue__seed_0="meet", vogue__seed_1="meet")
    assert main(["sweep", sweep_file(variants={"vogue": []}), "--jobs", "2"]) == 0
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {threads for _, _, threads in calls()} == {threads}


def test_the_users_number_of_threads_stays(sweep_file, calls, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(["sweep", sweep_file(seeds=[0], variants={"vogue": []})]) == 0
    assert calls() == [("vogue/seed_0", False, "7")]


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_second_interrupt_waits_for_no_run_and_leaves_none(sweep_file, how, capsys, tmp_path):
    how(vogue__seed_0="stubborn")
    pids = tmp_path / "pids.json"

    def interrupt():
        while not (pids.exists() and pids.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    assert main(["sweep", sweep_file()]) == 130
    assert time.monotonic() - start < GRACE
    assert "stopping: runs may end their step within" in capsys.readouterr().out
    assert not any(map(alive, json.loads(pids.read_text())))


def test_a_sweep_that_is_terminated_ends_all_that_it_started(sweep_file, how, capsys, tmp_path):
    how(vogue__seed_0="hang")
    pids = tmp_path / "pids.json"

    def terminate():
        deadline = time.monotonic() + 120
        while not pids.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    assert main(["sweep", sweep_file()]) == 130
    assert "stopped: 1 of 4 runs are done; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    deadline = time.monotonic() + 60  # a busy machine takes its time with what is killed
    while any(map(alive, json.loads(pids.read_text()))):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_sweeps_do_not_work_in_one_folder(sweep_file, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["sweep", sweep_file()]) == 2
    assert "another `vogue sweep`, or a run that one left behind, works in out" in capsys.readouterr().err


@pytest.mark.long
def test_a_real_sweep_compares_methods_from_one_start(settings, sweep_file, tmp_path):
    chosen = [*settings, "trainer.steps=1", "trainer.eval_every=1", "trainer.eval_samples=4"]
    chosen = [text for text in chosen if not text.startswith("trainer.output_dir")]
    OmegaConf.save(OmegaConf.from_dotlist(chosen), tmp_path / "base.yaml")
    file = sweep_file(seeds=[3])
    text = yaml.safe_load((tmp_path / file).read_text())
    del text["launcher"]
    (tmp_path / file).write_text(yaml.safe_dump(text, sort_keys=False))
    assert main(["sweep", file]) == 0, (tmp_path / "out/grpo/seed_3.log").read_text()
    evaluations = {
        variant: [json.loads(line) for line in (tmp_path / f"out/{variant}/seed_3/evaluations.jsonl").open()]
        for variant in ("grpo", "vogue")
    }
    assert evaluations["grpo"][0] == evaluations["vogue"][0]  # the same start, problems and seeds of sampling
    assert [row["step"] for row in evaluations["vogue"]] == [0, 1]
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert list(table["before"]["grpo"]) == ["pass@1", "pass@4"]
    after = {name: rows[-1]["pass@1"][0] for name, rows in evaluations.items()}
    row = table["variants"]["vogue"]
    assert row["difference"]["pass@1"][0] == pytest.approx(after["vogue"] - after["grpo"])
    assert row["training"].keys() == {"entropy", "distinct_answers", "u_per", "seconds", "generated"}
    assert "u_per" not in table["variants"]["grpo"]["training"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_of_a_sweep_can_be_planned(path, monkeypatch, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(path)
    if path.stem == "methods_puzzles":  # goes on from these
        for run in plan(load_sweep(path.with_name("pebr_first.yaml")), []):
            leave_checkpoint(run.config, run.config.trainer.steps)
    runs = plan(sweep, [])
    assert len(runs) == len(sweep.seeds) * len(sweep.variants) and runs[0].name.endswith("/seed_0")
    assert len({run.arguments for run in runs}) == len(runs)  # no two are the same run
