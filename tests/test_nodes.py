"""A run on several nodes: two of torchrun's, on two loopback addresses; and what is wrong with nodes, told at once."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from ranks import free_port, started_together, torchrun
from safetensors.torch import load_file

from vogue.cli import main

ROOT = Path(__file__).parents[1]
CURVES = ("reward", "loss", "entropy", "grad_norm", "tokens")
TWO_STEPS = ("trainer.steps=2", "branch.probability=0.5", "rollout.prompts=4")

MEET = """
import pathlib, sys, torch.distributed as dist
from vogue.run import errors, launch, shared_folder
from vogue.run.stacks import LostRank
dist.init_process_group("gloo")
here = pathlib.Path(sys.argv[1])
found = shared_folder.problems(here / "both" / "run")
dist.barrier()
print(launch.rank(), "sees", found, sorted(x.name for x in here.iterdir()), flush=True)
shared_folder.PATIENCE = 1.0
print(launch.rank(), "sees", shared_folder.problems(here / "own" / "run"), flush=True)
dist.barrier()
for text in ("the same", f"of rank {launch.rank()}"):
    errors.tell("train", ValueError(), text)
for rank in (None, 1):
    errors.tell("train", errors.agreed(ValueError(), rank), f"agreed {rank}")
errors.tell("train", LostRank(), f"lost by {launch.rank()}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def two_that_meet(tmp_path):
    """Two ranks that run MEET; what `own` is on the second one, nobody else sees."""
    (tmp_path / "meet.py").write_text(MEET)
    (tmp_path / "here" / "own").mkdir(parents=True)
    command = [sys.executable, tmp_path / "meet.py", tmp_path / "here"]
    hidden = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', tmp_path / "here" / "own"]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    own = [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in (0, 1)]
    ended = started_together([command, [*hidden, *command]], own)
    assert [code for code, _ in ended] == [0, 0], ended
    assert not list((tmp_path / "here" / "own").iterdir())
    return [text.splitlines() for _, text in ended]


def test_ranks_find_a_folder_that_is_not_shared_and_say_each_thing_once(two_that_meet, on_a_disk, tmp_path):
    first, second = two_that_meet
    # Of a folder that wasn't there nothing is left, and both see it.
    assert (first[0], second[0]) == ("0 sees [] ['own']", "1 sees [] ['own']")
    told = f"trainer.output_dir={tmp_path}/here/own/run isn't one folder for all ranks: rank 1 on "
    assert first[1].startswith(f'0 sees ["{told}')
    assert first[1][2:] == second[1][2:]
    said = [line.removeprefix("vogue train: ") for line in first[2:] + second[2:]]
    assert sorted(re.sub("rank .: the same", "the same", line) for line in said if "lost" not in line) == [
        *("agreed None", "rank 0: of rank 0", "rank 1: agreed 1", "rank 1: of rank 1", "the same"),
    ]
    (lost,) = [line for line in said if "lost" in line]
    assert lost in ("rank 0: lost by 0", "rank 1: lost by 1")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_nodes_of_two_ranks_train_as_one_rank_does(settings, tmp_path):
    nodes = tmp_path / "nodes"
    ended = started_together(torchrun(2, 2, *settings, *TWO_STEPS, f"trainer.output_dir={nodes}"), [{}, {}])
    assert [code for code, _ in ended] == [0, 0], ended
    printed = ended[0][1]
    # A file keeps what it prints: a line a step.
    assert re.findall(r"^step (\d)/2  reward .* left 0:\d\d:\d\d$", printed, re.MULTILINE) == ["1", "2"], printed
    assert main(["train", *settings, *TWO_STEPS]) == 0
    for a, b in zip(rows(tmp_path / "run"), rows(nodes), strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=2e-3)
        assert "time/wait" in b  # of several ranks, which were one run


def srun(ranks):
    """The variables of a SLURM step of this many tasks on one node."""
    shared = {
        **{"SLURM_JOB_ID": free_port(), "SLURM_STEP_ID": 0, "SLURM_NODEID": 0, "SLURM_STEP_NODELIST": "here"},
        **{"SLURM_STEP_NUM_TASKS": ranks, "SLURM_STEP_TASKS_PER_NODE": ranks},
    }
    return [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, **shared} for rank in range(ranks)]


@pytest.mark.long
def test_two_nodes_of_two_ranks_end_in_the_weights_of_four_tasks_of_srun_on_one(settings, tmp_path):
    vogue = [sys.executable, "-m", "vogue", "train"]
    commands = torchrun(2, 2, *settings, *TWO_STEPS, f"trainer.output_dir={tmp_path}/nodes")
    assert [code for code, _ in started_together(commands, [{}, {}])] == [0, 0]
    ended = started_together([[*vogue, *settings, *TWO_STEPS]] * 4, srun(4))
    assert [code for code, _ in ended] == [0] * 4, ended
    weights = [load_file(path) for path in tmp_path.glob("*/checkpoints/step_000002/hf/model.safetensors")]
    assert len(weights) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.long
def test_what_fails_on_one_rank_is_said_once_with_its_rank_and_ends_all_nodes(settings, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "import os\ndef own(completions, samples):\n    if os.environ['RANK'] == '3':\n        raise ValueError('no')\n"
        "    return [0.0] * len(completions)\n"
    )
    chosen = [*settings, *TWO_STEPS, f"reward.function={tmp_path}/rewards.py:own"]
    ended = started_together(torchrun(2, 2, *chosen), [{}, {}], patience=60)
    printed = "".join(text for _, text in ended)
    assert all(code == 1 for code, _ in ended)  # torchrun's own, whatever a rank's is; and it was not killed
    (line,) = [line for line in printed.splitlines() if line.startswith("vogue train: ")]
    assert line.startswith("vogue train: rank 3: reward.function=")


@pytest.mark.long
def test_a_folder_that_is_not_shared_ends_all_nodes_before_anything_is_trained(settings, tmp_path, on_a_disk):
    commands = torchrun(2, 2, *settings, *TWO_STEPS)
    (tmp_path / "run").mkdir()
    hidden = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', tmp_path / "run"]
    ended = started_together([commands[0], [*hidden, *commands[1]]], [{}, {}], patience=60)
    printed = "".join(text for _, text in ended)
    (line,) = [line for line in printed.splitlines() if line.startswith("vogue train: ")]
    assert f"trainer.output_dir={tmp_path}/run isn't one folder for all ranks: rank 2 on " in line
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.long
def test_deepspeeds_launcher_starts_two_nodes_of_a_hostfile(settings, tmp_path):
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    port = free_port()
    commands = [
        [
            *(str(Path(sys.executable).with_name("deepspeed")), f"--hostfile={tmp_path}/hostfile", "--no_ssh"),
            *(f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"),
            *("--module", "vogue.train", *settings, "trainer.steps=1"),
        ]
        for node in (0, 1)
    ]
    ended = started_together(commands, [{}, {}])
    assert [code for code, _ in ended] == [0, 0], ended
    (row,) = rows(tmp_path / "run")
    assert "time/wait" in row
