"""When a run saves, which checkpoint is its best, and what comes after a save: a command, and the hub at the end."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from ranks import launch

from vogue import distributed
from vogue.cli import main
from vogue.model import resuming
from vogue.run import kept_checkpoints, save_schedule
from vogue.run.folder import FolderError
from vogue.run.training import _note_best
from vogue.settings import ConfigError

REPOSITORY = "somebody/some-model"
FIXED = "branch.probability=0.5"  # else another number of steps is another run
EVALUATING = ("trainer.eval_every=1", "data.test_limit=4", "trainer.eval_samples=2")


def rows(folder, name="evaluations"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# -------------------------------------------------------------------------------------------------- which one, and when


def test_the_first_of_the_best_evaluations_is_the_best_by_its_own_metric_on_its_own_problems(config):
    chosen = config("trainer.save_best=pass@2", *EVALUATING)
    best, steps = None, []
    for step, value in enumerate([0.9, 0.2, 0.4, 0.4, 0.3, 0.5]):  # the first one is of the model before any step
        found = save_schedule.better({"pass@1": [1 - value, 0, 1], "pass@2": [value, 0, 1]}, step, chosen, best)
        if found:
            best = found
            steps.append((found["step"], found["value"]))
    assert steps == [(1, 0.2), (2, 0.4), (5, 0.5)]
    row = {"pass@1": [0.1, 0, 1], "pass@2": [0.1, 0, 1]}
    assert save_schedule.better(row, 6, chosen, best) is None
    for other in ("trainer.save_best=pass@1", "data.test_limit=3"):
        assert save_schedule.better(row, 6, config("trainer.save_best=pass@2", *EVALUATING, other), best)["step"] == 6
    assert save_schedule.better(row, 6, config(*EVALUATING), best) is None


@pytest.mark.parametrize("name", ["pass@3", "pass@4", "accuracy"])
def test_a_metric_that_evaluations_do_not_have_is_refused(config, name):
    with pytest.raises(ConfigError) as error:
        config(f"trainer.save_best={name}", *EVALUATING)
    told = f"trainer.save_best={name}: evaluations with trainer.eval_samples=2 have pass@1, pass@2"
    assert str(error.value) == told
    with pytest.raises(ConfigError, match=r"without trainer\.eval_every nothing is evaluated"):
        config("trainer.save_best=pass@1")


def test_a_checkpoint_is_due_every_so_many_steps_or_minutes_and_at_the_end(config, monkeypatch, tmp_path):
    _, _, device = distributed.start()
    request = save_schedule.Request(tmp_path, 0)
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(save_schedule, "time", clock)
    now = 1000.0
    schedule = save_schedule.Schedule(config("trainer.save_every=3", "trainer.steps=8"), device, request)
    assert [step for step in range(1, 9) if schedule.due(step)] == [3, 6, 8]
    now = 1e9
    assert not schedule.due(1)
    schedule = save_schedule.Schedule(config("trainer.save_every=0", "trainer.save_minutes=2"), device, request)
    now += 119
    assert not schedule.due(1)
    now += 1
    assert schedule.due(1) and schedule.due(2)
    schedule.saved()
    now += 119
    assert not schedule.due(2)


def test_a_checkpoint_is_due_where_a_file_or_a_signal_asks_for_it(config, tmp_path):
    rank, _, device = distributed.start()
    before = signal.getsignal(signal.SIGUSR1)
    with save_schedule.Request(tmp_path, rank) as request:
        schedule = save_schedule.Schedule(
            config("trainer.save_every=0", "trainer.steps=50", f"trainer.output_dir={tmp_path}"), device, request
        )
        assert not schedule.due(1)
        (tmp_path / "save").touch()
        assert schedule.due(2)
        schedule.saved()
        assert not (tmp_path / "save").exists() and not schedule.due(3)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert schedule.due(4)
        schedule.saved()
        assert not schedule.due(5)
        (tmp_path / "save").mkdir()
        assert schedule.due(6)
        with pytest.raises(FolderError, match=r"that a checkpoint was asked for can't be written to"):
            schedule.saved()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_best_checkpoint_stays_beside_the_newest_and_its_link_leads_to_it(new_trainer):
    trainer = new_trainer("trainer.keep=1", "trainer.save_best=pass@1", *EVALUATING)
    for trainer.step, value in ((1, 0.2), (2, 0.5), (3, 0.1), (4, 0.1)):
        _note_best(trainer, {"pass@1": [value, 0, 1]})
        trainer.save()
    assert saved(trainer.config.trainer.output_dir) == ["best", "step_000002", "step_000004"]
    best = kept_checkpoints.best_of(trainer.checkpoints)
    assert best == trainer.checkpoints / "step_000002"
    assert resuming.find(trainer.checkpoints, "best") == (best, 2)
    assert (trainer.checkpoints / "best" / "hf" / "config.json").is_file()
    trainer.step = 5
    _note_best(trainer, {"pass@1": [0.6, 0, 1]})
    trainer.save()
    assert saved(trainer.config.trainer.output_dir) == ["best", "step_000005"]
    assert resuming.find(trainer.checkpoints, "best")[1] == 5


def test_a_best_checkpoint_that_is_gone_has_no_link(new_trainer):
    trainer = new_trainer("trainer.save_best=pass@1", *EVALUATING)
    trainer.step = 1
    _note_best(trainer, {"pass@1": [0.5, 0, 1]})
    trainer.save()
    shutil.rmtree(trainer.checkpoints / "step_000001")
    kept_checkpoints.mark_best(trainer.checkpoints, trainer.state)
    assert saved(trainer.config.trainer.output_dir) == []
    with pytest.raises(ConfigError, match=r"--resume=best: there is no such checkpoint in .*; there are none"):
        resuming.find(trainer.checkpoints, "best")


# ------------------------------------------------------------------------------------------------------------- in a run


def test_a_run_keeps_its_best_checkpoint_and_names_it(settings, tmp_path, capsys):
    given = [*settings, FIXED, *EVALUATING, "trainer.save_best=pass@1", "trainer.keep=1", "trainer.save_every=0"]
    assert main(["train", *given]) == 0
    found = rows(tmp_path / "run")
    values = [row["pass@1"][0] for row in found]
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    first = values.index(max(values[1:]), 1)
    assert saved(tmp_path / "run") == sorted({"best", f"step_{first:06d}", "step_000004"})
    told = f"best         {tmp_path}/run/checkpoints/step_{first:06d}: pass@1 {100 * values[first]:.1f}% after {first} "
    assert told in capsys.readouterr().out
    # Its model answers as it did during the run.
    model = f"model.path={tmp_path}/run/checkpoints/best/hf"
    assert main(["eval", *given, model, "--out", str(tmp_path / "out.jsonl")]) == 0
    accuracies = [row["accuracy"] for row in rows(tmp_path, "out")]
    assert sum(accuracies) / len(accuracies) == pytest.approx(values[first])


@pytest.mark.long
def test_two_ranks_of_some_epochs_that_go_on_have_the_same_best_checkpoint_as_a_straight_run(settings, tmp_path):
    given = [*settings, *EVALUATING, "trainer.save_best=pass@1", "trainer.keep=9", "trainer.save_every=1"]
    given += ["trainer.steps=null", "trainer.epochs=1", "data.limit=8", "optimizer.lr=1e-2"]
    launch(2, "--module", "vogue.train", *given)
    straight, folder = tmp_path / "straight", tmp_path / "run"
    shutil.copytree(folder, straight, symlinks=True)
    best = kept_checkpoints.best_of(straight / "checkpoints").name
    assert best == "step_000001"  # of 8 / 4, so that the other one must remember it
    launch(2, "--module", "vogue.train", *given, f"--resume={best}")
    assert rows(folder) == rows(straight)
    for ours, theirs in zip(rows(folder, "metrics"), rows(straight, "metrics"), strict=True):
        stable = ("step", "loss", "reward", "tokens", "grad_norm")
        assert [ours[key] for key in stable] == pytest.approx([theirs[key] for key in stable], rel=1e-6)
    assert saved(folder) == saved(straight)
    assert kept_checkpoints.best_of(folder / "checkpoints").name == best
    ours, theirs = (torch.load(x / "checkpoints/step_000002/training/run.pt") for x in (folder, straight))
    assert ours["current"]["best"] == theirs["current"]["best"]


def test_a_checkpoint_of_the_model_alone_is_small_and_nothing_goes_on_from_it(settings, tmp_path, capsys):
    given = [*settings, FIXED, "trainer.steps=2", "trainer.save_every=1"]
    assert main(["train", *given, "trainer.steps=1"]) == 0
    assert main(["train", *given, "trainer.save_model_only=true", "--resume"]) == 0
    found = tmp_path / "run/checkpoints/step_000002"
    assert sorted(path.name for path in found.iterdir()) == ["hf", "state.json"]
    capsys.readouterr()
    assert main(["train", *given, "trainer.steps=3", "--resume"]) == 2
    told = capsys.readouterr().err
    assert f"--resume: {found} was written with trainer.save_model_only=true, so that no run can go on from it." in told
    assert "--resume=step_000001 goes on from the whole one before it" in told
    assert f"model.path={found}/hf with another trainer.output_dir begins a new run from its weights" in told


def test_a_run_that_fails_with_models_alone_says_that_it_cannot_go_on(settings, tmp_path, capsys):
    body = "calls = []\ndef own(completions, samples):\n    calls.append(1)\n    assert len(calls) < 3, 'enough'\n"
    (tmp_path / "own.py").write_text(body + "    return [float(i % 2) for i in range(len(completions))]\n")
    given = [*settings, "trainer.save_model_only=true", f"reward.function={tmp_path}/own.py:own"]
    assert main(["train", *given]) == 2
    told = capsys.readouterr().err
    assert f"its weights are in {tmp_path}/run/checkpoints/step_000002/hf, no run can go on from there" in told
    assert "--resume goes on" not in told


# --------------------------------------------------------------------------------------------------- after a checkpoint


def test_a_command_that_is_no_rank_of_the_run_and_a_hub_out_of_reach_may_fail(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    command = f'test -z "$RANK$MASTER_PORT" && ls "$VOGUE_CHECKPOINT" >> {tmp_path}/seen && echo $VOGUE_CHECKPOINT >&2'
    given = [*settings, "trainer.steps=2", "trainer.save_every=1"]
    given += [f"trainer.save_command={command}; exit 3", f"trainer.push_to_hub={REPOSITORY}"]
    assert main(["train", *given]) == 0
    assert (tmp_path / "seen").read_text().split() == ["hf", "state.json", "training"] * 2
    told = " ".join(capsys.readouterr().out.split())
    for step in (1, 2):
        folder = f"{tmp_path}/run/checkpoints/step_{step:06d}"
        assert f"trainer.save_command failed for {folder} with exit code 3: {folder}" in told
    assert f"warning: trainer.push_to_hub={REPOSITORY}: there is no token of the hub" in told
    assert f"{folder}/hf couldn't be sent: " in told
    assert f"hf upload {REPOSITORY} {folder}/hf" in told


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(config, tmp_path):
    chosen = config(f"trainer.save_command=sleep 60 | cat; touch {tmp_path}/late", "trainer.timeout=1")
    start = time.monotonic()
    told = save_schedule.run_command(chosen, tmp_path)
    assert told == f"trainer.save_command was ended for {tmp_path}: it took 0.5 s, half of trainer.timeout"
    assert time.monotonic() - start < 30
    assert not (tmp_path / "late").exists()


def test_what_a_command_leaves_in_the_background_is_not_waited_for(config, tmp_path):
    start = time.monotonic()
    assert save_schedule.run_command(config("trainer.save_command=sleep 20 &"), tmp_path) is None
    assert time.monotonic() - start < 15
    assert save_schedule.run_command(config(), tmp_path) is None


# ------------------------------------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a new repository and one commit take; nothing of it is reached here."""

    created, committed, refuses = [], {}, False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        place = f"http://{self.headers['Host']}/{REPOSITORY}"
        if self.refuses:
            return self._answer(403, {"error": "You may not write here"})
        if self.path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            return self._answer(200, {"url": place, "id": REPOSITORY})
        if "/preupload/" in self.path:
            files = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.committed[line["value"]["path"]] = line["value"]["content"]
            else:
                self.committed[line["key"]] = line["value"]["summary"]
        return self._answer(200, {"commitUrl": f"{place}/commit/0", "commitOid": "0", "success": True})

    def do_GET(self):
        self._answer(403 if self.refuses else 200, {"error": "You may not read here"})

    def _answer(self, code, value):
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def hub(monkeypatch, *, refuses=False):
    """A hub on this machine, which huggingface_hub takes for the one that there is; yields what it has got."""
    kind = type("OneHub", (Hub,), {"created": [], "committed": {}, "refuses": refuses})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield kind
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    return tmp_path / "hf"


def test_a_folder_is_sent_to_a_private_repository(monkeypatch, folder):
    with hub(monkeypatch) as got:
        assert save_schedule.push(REPOSITORY, folder, 40) == f"pushed to {REPOSITORY}: {folder}"
    assert (got.created[0]["name"], got.created[0]["visibility"]) == ("some-model", "private")
    assert got.committed == {"header": "After 40 steps", "config.json": "e30="}  # base64 of {}


def test_a_hub_that_refuses_or_is_not_there_is_told_with_the_way_by_hand(monkeypatch, folder):
    with hub(monkeypatch, refuses=True):
        refused = save_schedule.push(REPOSITORY, folder, 40)
    gone = save_schedule.push(REPOSITORY, folder, 40)  # nobody listens there any more
    for told, why in ((refused, "403"), (gone, "")):
        assert told.startswith(f"trainer.push_to_hub={REPOSITORY}: {folder} couldn't be sent: ")
        assert told.endswith(f"\nBy hand: hf upload {REPOSITORY} {folder}")
        assert why in told


@pytest.mark.parametrize("name", ["a/b/c", "me/my model", "-me/x"])
def test_what_cannot_be_a_repository_is_refused_before_the_run(config, name):
    with pytest.raises(ConfigError, match=f"^trainer.push_to_hub={name}: "):
        save_schedule.check_hub(config(f"trainer.push_to_hub={name}"))
