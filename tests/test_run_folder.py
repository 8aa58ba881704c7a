"""A folder that can't hold a run, and one that another run works in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import vogue

from vogue.cli import main
from vogue.run.folder import FolderError, check_writable, locked, remove, writing
from vogue.settings import ConfigError

HOLD = """
import sys, pathlib
from vogue.run.folder import locked
with locked(pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    input()
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that has locked `run`; closing its input ends it."""
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/run", "/dev/null/run", "x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_made_or_is_none_is_told_at_once(settings, tmp_path, capsys, name):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"trainer\.output_dir=.*: no run can be written there: ."):
        check_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if "\0" not in name:
        assert main(["train", *settings, f"trainer.output_dir={tmp_path / name}"]) == 2
        assert "no run can be written there" in capsys.readouterr().err


def test_a_folder_that_is_read_only_is_told(on_a_disk):
    done = on_a_disk("size=1m,ro", "-c", "from vogue.run.folder import *; check_writable(Path('disk/run'))")
    assert "no run can be written there: Read-only file system" in done.stderr


def test_looking_whether_a_folder_can_be_written_to_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    check_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_second_run_in_a_folder_is_refused_as_long_as_the_first_one_lives(
    settings, tmp_path, capsys, other_run, resume
):
    assert main(["train", *settings, *resume]) == 2
    told = f"vogue train: {tmp_path}/run: another run works there (process {other_run.pid} on "
    assert told in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    other_run.kill()
    other_run.wait()
    assert main(["train", *settings, "trainer.steps=1", *resume]) == 0


def test_a_folder_is_free_again_after_the_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_has_another_name_before_anything_in_it_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "step_000002" / "hf").mkdir(parents=True)
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((path.name, path.exists())))
    remove(tmp_path / "step_000002")
    assert seen[-1] == (".step_000002.old", True)
    assert not (tmp_path / "step_000002").exists()


def test_a_disk_is_called_full_where_it_is_and_other_errors_keep_their_words(tmp_path):
    with (
        pytest.raises(FolderError, match=f"the disk is full: the logs can't be written to {tmp_path}"),
        writing("the logs", tmp_path),
    ):
        Path("/dev/full").write_text("x" * 100_000)
    with (
        pytest.raises(FolderError, match=r"the logs can't be written to .*: .*No such file"),
        writing("the logs", tmp_path),
    ):
        (tmp_path / "nowhere" / "file").write_text("x")
    with pytest.raises(KeyError), writing("the logs", tmp_path):
        raise KeyError


@pytest.mark.slow
def test_a_run_of_an_ended_process_holds_nothing(tmp_path, settings):
    assert vogue("train", *settings, "trainer.steps=1")[0] == 0
    assert main(["train", *settings, "trainer.steps=1", "--resume"]) == 0


def test_a_folder_in_which_another_run_works_is_told_before_anything_else(settings, tmp_path, capsys):
    with locked(tmp_path / "run"):
        assert main(["train", "--check", *settings]) == 2
    assert "another run works there (process " in capsys.readouterr().err
    assert main(["train", "--check", *settings]) == 0
