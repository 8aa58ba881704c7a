"""Checkpoints that are damaged, that don't fit on the disk, or whose making or deleting was stopped."""

import json
import os
import re
import shutil
import sys
from contextlib import nullcontext

import pytest
from ranks import alone, launcher
from safetensors.torch import load_file

from vogue.cli import main


def long_param(*values):
    return pytest.param(*values, marks=pytest.mark.long)


SHARD = "training/optimizer_00000_00.safetensors"
INDEX, RUN = "training/optimizer.json", "training/run.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, digits_folder):
    """The settings of a run, and its folder with the checkpoints after 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    settings = [
        *(f"model.path={model_folder}", "model.dtype=float32", f"data.train={digits_folder}/train.parquet"),
        *("data.system_prompt=Think.", "data.max_prompt_tokens=128", "rollout.engine=hf", "rollout.prompts=4"),
        *("rollout.n=2", "rollout.max_tokens=12", "optimizer.lr=1e-3", "trainer.steps=4", "trainer.save_every=2"),
    ]
    assert main(["train", *settings, f"trainer.output_dir={folder}"]) == 0
    return settings, folder


@pytest.fixture
def damaged(finished, tmp_path, capsys):
    """A function: damage a copy of the run, resume it; returns its folder, the exit code and what was printed."""
    settings, original = finished
    folder = tmp_path / "run"

    def run(damage, resume="--resume"):
        shutil.copytree(original, folder, dirs_exist_ok=True)
        damage(folder / "checkpoints" / "step_000004")
        capsys.readouterr()
        code = main(["train", *settings, f"trainer.output_dir={folder}", resume])
        return code, capsys.readouterr()

    return folder, run


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": (lambda step: cut(step / SHARD), f"{SHARD} has .* bytes and not "),
    "empty": (lambda step: os.truncate(step / INDEX, 0), f"{INDEX} has 0 bytes and not "),
    "flipped bit": (lambda step: flip(step / SHARD), f"{SHARD} isn't what was written: its checksum differs"),
    "missing": (lambda step: (step / SHARD).unlink(), f"{SHARD} is missing"),
    "no folder": (lambda step: shutil.rmtree(step / "training"), f"{INDEX} is missing"),
    "no state of the run": (lambda step: (step / RUN).unlink(), f"{RUN} is missing"),
    "flipped bit of the run's state": (lambda step: flip(step / RUN), f"{RUN} isn't what was written"),
    "state.json empty": (lambda step: os.truncate(step / "state.json", 0), "state.json is missing, empty or cut"),
    "state.json cut": (lambda step: cut(step / "state.json"), "state.json is missing, empty or cut"),
    "state.json missing": (lambda step: (step / "state.json").unlink(), "state.json is missing, empty or cut"),
    "state.json of another kind": (lambda step: (step / "state.json").write_text("[1]"), "state.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_whole_one_before_it_offered(damaged, name):
    folder, run = damaged
    damage, told = DAMAGES[name]
    code, printed = run(damage)
    assert code == 2
    assert "Traceback" not in printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("vogue train: ")]
    assert line.startswith(f"vogue train: --resume: {folder}/checkpoints/step_000004 is damaged: ")
    assert re.search(told, line)
    assert "--resume=step_000002 goes on from the whole one before it" in line
    readable = "step_000002" if "state.json" in name else "step_000004"  # nothing says what its weights were
    assert f"model.path={folder}/checkpoints/{readable}/hf with another trainer.output_dir begins a new run" in line


@pytest.mark.parametrize("how", ["step_000002", "whole"])
def test_the_checkpoint_before_a_damaged_one_ends_in_the_same_weights(damaged, finished, how):
    folder, run = damaged
    told = pytest.warns(UserWarning, match=r"passed over: --resume: .*step_000004 is damaged: ")
    with told if how == "whole" else nullcontext():
        code, _ = run(lambda step: cut(step / SHARD), f"--resume={how}")
    assert code == 0
    again, first = (load_file(run / "checkpoints/step_000004/hf/model.safetensors") for run in (folder, finished[1]))
    assert all((again[name] == first[name]).all() for name in first)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert main(["train", *finished[0], f"trainer.output_dir={folder}", "--resume"]) == 0  # it is whole


def test_checkpoints_after_the_one_that_is_gone_on_from_are_deleted(damaged, finished):
    folder, run = damaged
    code, _ = run(lambda step: shutil.copytree(step, step.with_name("step_000100")), "--resume=step_000002")
    assert code == 0
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000002", "step_000004"]


def test_where_no_checkpoint_is_whole_the_weights_are_offered_if_they_are(damaged):
    folder, run = damaged

    def damage(step):
        cut(step / SHARD)
        cut(step / "hf/model.safetensors")
        (step.with_name("step_000002") / SHARD).unlink()

    code, printed = run(damage)
    assert code == 2
    assert "goes on from" not in printed.err
    assert f"model.path={folder}/checkpoints/step_000002/hf with another" in printed.err
    code, printed = run(lambda step: [damage(step), flip(step.with_name("step_000002") / "hf/config.json")])
    assert code == 2
    assert "There is no whole one before it" in printed.err


def test_weights_that_are_damaged_are_told_and_not_needed(damaged):
    told = r"step_000004 can be gone on from, but not used: hf/model\.safetensors is missing"
    with pytest.warns(UserWarning, match=told):
        code, _ = damaged[1](lambda step: (step / "hf/model.safetensors").unlink())
    assert code == 0


def test_leftovers_of_saving_and_deleting_go_at_start(damaged):
    folder, run = damaged

    def leave(step):
        shutil.copytree(step, step.with_name(".step_000006.partial"))
        step.rename(step.with_name(".step_000004.old"))

    code, _ = run(leave)
    assert code == 0
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000002", "step_000004"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew_with_resume_alone(finished, tmp_path, capsys):
    settings = [*finished[0], f"trainer.output_dir={tmp_path}/run"]
    assert main(["train", *settings]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(["train", *settings]) == 2
    assert "holds a run already: pass --resume" in capsys.readouterr().err
    assert main(["train", *settings, "--resume"]) == 0
    assert "there is no checkpoint in " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


KILLED = """
import os, sys, shutil
from pathlib import Path
from vogue.cli import main
kind, *arguments = sys.argv[1:]
if kind == "renaming":  # the new checkpoint is whole, and not yet in its place
    rename = Path.rename
    Path.rename = lambda path, to: os.kill(os.getpid(), 9) if path.name.endswith(".partial") else rename(path, to)
else:  # an old one is being deleted
    others = shutil.rmtree
    def rmtree(path, *rest, **named):
        if not (Path(path).name.endswith(".old") and Path(path).exists()):
            return others(path, *rest, **named)
        next(Path(path).rglob("*.safetensors")).unlink()
        os.kill(os.getpid(), 9)
    shutil.rmtree = rmtree
sys.exit(main(["train", *arguments]))
"""


@pytest.mark.parametrize("kind", ["renaming", "deleting"])
def test_a_run_killed_while_it_saves_or_deletes_goes_on_from_a_whole_checkpoint(finished, tmp_path, kind):
    settings = [*finished[0], f"trainer.output_dir={tmp_path}/run", "trainer.keep=1"]
    (tmp_path / "killed.py").write_text(KILLED)
    code, told = alone(tmp_path / "killed.py", kind, *settings)
    assert code == -9, told
    assert main(["train", *settings, "--resume"]) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000004"]


# Once the checkpoint after 2 steps is there, somebody else fills the disk, up to a share of another checkpoint.
FILLING = """
import os, pathlib, shutil
here = pathlib.Path(__file__).parent

def own(completions, samples):
    if (here / "disk/run/checkpoints/step_000002").exists() and not (here / "filled").exists():
        (here / "filled").touch()
        ballast = bytes(shutil.disk_usage(here / "disk").free - {left})
        (here / "disk/ballast").write_bytes(ballast)
    return [float(i % 2) for i in range(len(completions))]
"""
UNKNOWING = """
import shutil
shutil.disk_usage = lambda _: type("Usage", (), {"total": 1 << 40, "used": 0, "free": 1 << 40})
"""
TRAINING = "import runpy; runpy.run_module('vogue.train', run_name='__main__')"
FULL = """
import subprocess, sys
from pathlib import Path
for more in ([], ["--resume"]):
    code = subprocess.run([*sys.argv[1:], *more]).returncode
    print("found", code, sorted(path.name for path in Path("disk/run/checkpoints").iterdir()))
    Path("disk/ballast").unlink(missing_ok=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "share", "known"),
    [
        (1, 0.6, False),
        *(long_param(*case) for case in ((1, 0.2, False), (1, 0.9, True), (2, 0.7, False), (2, 0.7, True))),
    ],
)
def test_a_disk_that_is_full_is_told_once_and_the_run_goes_on_from_the_checkpoint_before(
    finished, on_a_disk, tmp_path, ranks, share, known
):
    settings, folder = finished
    size = sum(path.stat().st_size for path in (folder / "checkpoints/step_000002").rglob("*") if path.is_file())
    (tmp_path / "rewards.py").write_text(FILLING.format(left=int(share * size)))
    own = (f"reward.function={tmp_path}/rewards.py:own", "trainer.output_dir=disk/run")
    (tmp_path / "train.py").write_text(TRAINING if known else UNKNOWING + TRAINING)
    command = [*([sys.executable] if ranks == 1 else launcher(2)), tmp_path / "train.py"]
    done = on_a_disk(f"size={8 * size}", "-c", FULL, *command, *settings, *own)
    assert "Traceback" not in done.stderr, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("vogue train: ")]
    rank = "" if ranks == 1 else "rank 0: "
    assert told.startswith(
        f"vogue train: {rank}the disk is full: the checkpoint after 4 steps can't be written to disk/"
    )
    assert told.endswith(" are free") == known
    assert [line for line in done.stdout.splitlines() if line.startswith("found")] == [
        "found 2 ['step_000002']",
        "found 0 ['step_000002', 'step_000004']",
    ]
