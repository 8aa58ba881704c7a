"""A run's metrics in the trackers of `trainer.report_to`, by each that is installed, without a network."""

import json
import subprocess
import sys

import pytest
from accelerate.utils import imports
from ranks import environment

from vogue.run import trackers
from vogue.settings import ConfigError

OFFLINE = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": "file:./mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
# Reports two steps and an evaluation, then goes on for a third step as a resumed run does.
RUN = """
import sys
from rich.console import Console
from vogue.config import load_config
from vogue.run.logs import RunLog

config = load_config(None, sys.argv[1:])
record = {"step": 0, "problem": "1 + 1?", "answer": "2", "completion": "two", "reward": 1.0, "accuracy": 1.0}
record |= {"advantage": 0.5, "branch": "raw", "image": []}
for start, steps in ((0, (0, 1)), (2, (2,))):
    with RunLog(config, start, Console(quiet=True)) as log:
        for step in steps:
            log.step(step, {"reward": 0.5 + step}, [record])
        log.evaluation(steps[-1] + 1, {"pass@1": [0.25, 0.2, 0.3], "problems": [], "completions": 4})
"""


def needs(name):
    return pytest.mark.skipif(not getattr(imports, f"is_{name}_available")(), reason=f"{name} isn't installed")


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("mlflow", "wandb")])
def test_a_stopped_and_resumed_run_is_one_run_of_the_tracker(name, settings, tmp_path):
    told = [*settings, f"trainer.report_to=[{name}]", "trainer.project=digits", "trainer.run_name=seed0"]
    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-c", RUN, *told], cwd=tmp_path, env=environment() | OFFLINE, check=True)
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())
    if name == "wandb":
        assert {path.name.rsplit("-", 1)[1] for path in (tmp_path / "wandb").glob("offline-run-*")} == {known["wandb"]}
        return
    (folder,) = (tmp_path / "mlruns").glob(f"*/{known['mlflow']}")
    assert (folder / "tags" / "mlflow.runName").read_text() == "seed0"
    rows = [line.split()[1:] for line in (folder / "metrics" / "reward").read_text().splitlines()]
    assert rows == [["0.5", "0"], ["1.5", "1"], ["2.5", "2"]]
    assert len((folder / "metrics" / "eval" / "pass_at_1").read_text().splitlines()) == 2
    assert (folder / "params" / "rollout.prompts").read_text() == "4"


@pytest.mark.skipif(imports.is_swanlab_available(), reason="swanlab is installed")
def test_a_tracker_that_is_not_installed_is_told_before_the_run(config):
    told = trackers.missing(config("trainer.report_to=[swanlab]"))
    assert told == ["trainer.report_to=swanlab: swanlab isn't installed: pip install swanlab"]


def test_arguments_for_a_tracker_that_is_not_asked_for_are_refused(config):
    assert trackers.missing(config("trainer.tracker_args={wandb: {entity: me}}")) == [
        "trainer.tracker_args.wandb: trainer.report_to doesn't have wandb"
    ]


class InAFile:
    """A tracker by accelerate's interface that writes down what it is told."""

    name, requires_logging_directory, main_process_only = "clearml", False, True

    def __init__(self, project, **arguments):
        self.told, self.id = [("project", project), ("arguments", arguments)], "task7"

    tracker = property(lambda self: self)

    def start(self):
        self.told.append(("start",))

    def store_init_configuration(self, values):
        self.told.append(("settings", values["trainer.steps"]))

    def log(self, values, step):
        self.told.append(("log", step, values))

    def log_table(self, name, columns, rows, step):
        self.told.append((name, step, columns, rows))

    def finish(self):
        self.told.append(("finish",))


def test_what_a_tracker_is_told_of_a_new_run_and_of_a_resumed_one(config, monkeypatch):
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "clearml", InAFile)
    given = config("trainer.report_to=[clearml]", "trainer.tracker_args={clearml: {tags: [a]}}")
    given.trainer.output_dir.mkdir()
    record = dict.fromkeys(trackers.COLUMNS, 1) | {"image": ["completions/a.webp"]}
    for resumed, more in ((False, {}), (True, {"continue_last_task": "task7"})):
        found = trackers.Trackers(given, resumed)
        found.log({"reward": 0.5}, 3)
        found.table([record], 3)
        found.finish()
        told = found.running["clearml"].told
        assert told[:2] == [("project", "vogue"), ("arguments", {"task_name": "run", "tags": ["a"]} | more)]
        assert [one[0] for one in told[2:]] == [
            "start",
            *([] if resumed else ["settings"]),
            "log",
            "completions",
            "finish",
        ]
        assert told[-3] == ("log", 3, {"reward": 0.5})
        assert told[-2][3] == [[1] * 8 + [str(given.trainer.output_dir / "completions/a.webp")]]


class Failing(InAFile):
    """As long as `down`, nobody answers it."""

    down = True

    def log(self, values, step):
        if self.down:
            raise ConnectionError(f"no route at {step}")  # an OSError, as a full disk is
        super().log(values, step)


def test_a_tracker_that_fails_for_a_while_lacks_that_and_no_run_ends(config, monkeypatch):
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "clearml", Failing)
    given = config("trainer.report_to=[clearml]")
    given.trainer.output_dir.mkdir()
    found = trackers.Trackers(given, False)
    with pytest.warns(UserWarning) as warned:
        found.log({"reward": 0.5}, 0)
        found.log({"reward": 0.5}, 1)
    told = [str(one.message) for one in warned]
    assert told == ["trainer.report_to=clearml lacks what it was to be told: ConnectionError: no route at 0"]
    (tracker,) = found.running.values()
    tracker.down = False
    found.log({"reward": 0.5}, 2)
    assert tracker.told[-1] == ("log", 2, {"reward": 0.5})
    tracker.down = True
    with pytest.warns(UserWarning, match="clearml isn't asked again in this run: ConnectionError: no route at 5"):
        for step in (3, 4, 5):
            found.log({"reward": 0.5}, step)
    assert found.running == {}
    found.finish()


def test_a_tracker_that_cannot_be_started_is_told_before_the_run(config, monkeypatch):
    class Refused(InAFile):
        def start(self):
            raise RuntimeError("not logged in")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "clearml", Refused)
    with pytest.raises(ConfigError, match=r"^trainer.report_to=clearml can't be started: RuntimeError: not logged in$"):
        trackers.Trackers(config("trainer.report_to=[clearml]"), False)
