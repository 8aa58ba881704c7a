"""Several ranks train, evaluate and save as one does, under DeepSpeed's stages."""

import json
import runpy
import sys

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from test_engines import base_settings
from transformers import AutoModelForImageTextToText

from vogue.cli import main
from vogue.inputs import load_processor

pytestmark = pytest.mark.slow


# Partitions every parameter, which DeepSpeed doesn't do to small ones by itself.
PARTITIONED = "trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


@pytest.fixture(scope="module")
def train(model_folder, mixed_data, tmp_path_factory):
    """A function: train on this many ranks in a folder of its own; returns the folder."""

    def run(ranks, name, *overrides, resume=False):
        folder = root / name
        settings = [*base_settings(model_folder, mixed_data, folder), "rollout.engine=hf", PARTITIONED]
        settings += ["branch.granularity=response", "trainer.micro_batch_tokens=200", "optimizer.lr=1e-4"]
        settings += ["branch.probability=0.5"]  # else another number of steps is another run
        settings += [*overrides, *(["--resume"] if resume else [])]
        if ranks == 1:
            assert main(["train", *settings]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *settings)
        return folder

    root = tmp_path_factory.mktemp("runs")
    return run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_weights(folder, step):
    return load_file(folder / f"checkpoints/step_{step:06d}/hf/model.safetensors")


TOLD = ("trainer.log_completions=1000", "trainer.eval_every=3", "data.test_limit=5", "trainer.eval_samples=3")


@pytest.fixture(scope="module")
def on_one_rank(train, mixed_data):
    return train(1, "one", "trainer.steps=3", *TOLD, f"data.test={mixed_data}")


@pytest.fixture(scope="module")
def on_two_ranks(train, mixed_data):
    return train(2, "two", "trainer.steps=3", *TOLD, f"data.test={mixed_data}")


CURVES = ("reward", "format", "loss", "entropy", "u_per", "grad_norm", "noisy_share", "tokens")


def test_two_ranks_train_as_one_does(on_one_rank, on_two_ranks):
    one, two = metrics(on_one_rank), metrics(on_two_ranks)
    assert len(one) == len(two) == 3
    assert all(row["grad_norm"] > 1e-3 for row in one)
    for a, b in zip(one, two, strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=1e-4)
        assert 0 < b["balance"] <= 1
        assert "balance" not in a
        assert 0 < b["time/rollout"] <= b["time/rollout_slowest"]
        assert b["time/wait"] > 0


def test_what_is_told_of_a_completion_does_not_depend_on_which_rank_trained_on_it(on_one_rank, on_two_ranks):
    def told(folder):
        rows = map(json.loads, (folder / "completions.jsonl").read_text().splitlines())
        return {(row["step"], row["problem"], row["branch"], row["completion"], row["advantage"]): row for row in rows}

    one, two = told(on_one_rank), told(on_two_ranks)
    assert len(two) > 8
    assert two.keys() < one.keys()  # rank 0's own
    for key, row in two.items():
        for name in ("entropy", "u_per"):
            assert (row[name] is None) == (one[key][name] is None)
            assert row[name] is None or row[name] == pytest.approx(one[key][name], rel=1e-3, abs=1e-5)


def test_problems_that_ranks_share_get_the_answers_that_one_rank_gets(on_one_rank, on_two_ranks):
    one, two = ((folder / "evaluations.jsonl").read_text() for folder in (on_one_rank, on_two_ranks))
    first = json.loads(one.splitlines()[0])
    assert len(first["distinct"]) == 5  # 3 on one rank, 2 on the other
    assert len(set(first["distinct"])) > 1  # else their order would tell nothing
    assert two == one


def test_two_ranks_go_on_from_a_checkpoint_as_if_they_had_not_stopped(train, on_two_ranks):
    train(2, "resumed", "trainer.steps=1")
    resumed = train(2, "resumed", "trainer.steps=3", resume=True)
    for a, b in zip(metrics(on_two_ranks), metrics(resumed), strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=1e-6)
    straight, again = final_weights(on_two_ranks, 3), final_weights(resumed, 3)
    assert all((straight[name] - again[name]).abs().max() < 1e-6 for name in straight)


def test_one_rank_trains_unpartitioned_as_it_does_partitioned_and_goes_on_from_a_checkpoint(train):
    alone = "trainer.deepspeed.zero_optimization.stage=1"  # as by default
    train(1, "alone", alone, "trainer.steps=2")
    found = metrics(train(1, "alone", "trainer.steps=3", resume=True))  # with stage 3
    expected = metrics(train(1, "partitioned", "trainer.steps=3"))
    assert len(found) == len(expected) == 3
    for a, b in zip(expected, found, strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=1e-4)


RAW = ("branch.rollout=raw", "branch.probability=0.5", "trainer.updates=2")


def test_two_ranks_train_on_raw_rollouts_as_one_does_and_go_on_from_ones_checkpoint(train):
    one = metrics(train(1, "raw", *RAW, "trainer.steps=2"))
    train(1, "raw-two", *RAW, "trainer.steps=1")
    two = metrics(train(2, "raw-two", *RAW, "trainer.steps=2", resume=True))
    assert len(one) == len(two) == 2
    assert 0 < one[0]["paid_share"] < 1
    for a, b in zip(one, two, strict=True):
        names = (*CURVES, "paid_share")
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-4)


DAPO = ("method=dapo", "branch.probability=0", "rollout.rounds=3", "rollout.n=4", "trainer.updates=2")


@pytest.mark.long
def test_two_ranks_sample_dynamically_as_one_does_which_goes_on_from_their_checkpoint(train):
    one = metrics(train(1, "dapo", *DAPO, "trainer.steps=2"))
    train(2, "dapo-two", *DAPO, "trainer.steps=1")
    two = metrics(train(1, "dapo-two", *DAPO, "trainer.steps=2", resume=True))
    names = ("reward", "reward/overlong", "loss", "grad_norm", "entropy", "tokens", "rounds", "filled_share")
    assert len(one) == len(two) == 2
    assert max(row["rounds"] for row in one) > 1
    for a, b in zip(one, two, strict=True):
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-4, abs=1e-6)


BOTH_VIEWS = ("method=noisy_rollout", "branch.probability=0", "rollout.noisy_share=0.5", "trainer.updates=2")


@pytest.mark.long
def test_two_ranks_train_on_groups_of_both_views_as_one_does(train):
    one, two = (metrics(train(n, f"both-{n}", *BOTH_VIEWS, "trainer.steps=2")) for n in (1, 2))
    names = ("reward", "loss", "grad_norm", "entropy", "tokens", "noisy_share")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-4, abs=1e-6)


WEIGHTS = """
import sys, torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import AutoModelForImageTextToText
from vogue.model.weights import gathered_weights
from vogue.config import load_config
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.distributed import leave
from vogue.inputs import Preprocessor, load_processor
from vogue.trainer import Trainer

# argv: bytes to hold at most, settings
budget, *settings = [text for text in sys.argv[1:] if not text.startswith("--")]
config = load_config(None, settings)
preprocessor = Preprocessor(load_processor(config.model.path), "Think.", 128)
data = check_samples(load_samples(config.data.train), preprocessor.lengths)
trainer = Trainer(config, data, preprocessor, resume=None)
expected = dict(AutoModelForImageTextToText.from_pretrained(config.model.path, dtype="float32").named_parameters())
parameters = list(trainer.policy.model.parameters())
largest = max(p.ds_numel * p.element_size() for p in parameters)
assert all(p.numel() == 0 for p in parameters), "nothing is partitioned"
names = []
for name, tensor in gathered_weights(trainer.policy.model, int(budget)):
    held = sum(p.ds_numel * p.element_size() for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
    assert held <= max(int(budget), largest), held
    assert torch.equal(tensor, expected[name]), name
    names.append(name)
assert set(names) == expected.keys() and len(names) == len(expected)
assert all(p.numel() == 0 for p in parameters), "something stays gathered"
print("whole" if trainer.rank == 0 else "")
leave(0)
"""


def test_no_rank_holds_more_of_the_partitioned_weights_than_the_budget(model_folder, mixed_data, tmp_path):
    script = tmp_path / "weights.py"
    script.write_text(WEIGHTS)
    settings = [*base_settings(model_folder, mixed_data, tmp_path / "run"), "rollout.engine=hf", PARTITIONED]
    assert "whole" in launch(2, script, 100_000, *settings)


COLLECTIVES = """
import torch, torch.distributed as dist
from vogue import distributed

distributed.start()
for _ in range(20):
    dist.all_gather_into_tensor(torch.empty(2000), torch.ones(1000))
    dist.all_reduce(torch.ones(3))
print("rank done")
"""


def test_ranks_end_without_an_abort_right_after_a_collective(tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    assert launch(2, script).count("rank done") == 2  # and `launch` asserts the exit code of both


GRADIENTS = """
import sys, torch
from dataclasses import replace
from deepspeed.utils import safe_get_full_grad
from vogue.config import load_config
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.distributed import leave
from vogue.step.groups import generate
from vogue.inputs import Preprocessor, load_processor
from vogue.metrics import Clock, Means
from vogue.trainer import Trainer

# argv: where to save, a model with a tied and one with an untied head, settings
target, tied, untied, *settings = [text for text in sys.argv[1:] if not text.startswith("--")]

def gradients(path):
    config = load_config(None, [*settings, f"model.path={path}"])
    preprocessor = Preprocessor(load_processor(config.model.path), "Think.", 128)
    data = check_samples(load_samples(config.data.train), preprocessor.lengths)
    trainer = Trainer(config, data, preprocessor, resume=None)
    items = trainer.loader.items(trainer.step)
    groups = generate(trainer.engine, config, items, trainer.step)
    advantages = lambda prompt: tuple((-1.0) ** (prompt + i) * (1 + prompt) for i in range(4))
    groups = [replace(g, advantages=advantages(g.item.number)) for g in groups]
    whole = config.trainer.deepspeed["zero_optimization"].get("stage") == 0
    assert whole or all(p.numel() == 0 for p in trainer.policy.parameters()), "nothing is partitioned"
    found = {}

    def record():  # in place of the optimizer's step
        found.update({name: safe_get_full_grad(p).clone() for name, p in trainer.policy.named_parameters()})

    trainer.deepspeed.step = record
    trainer.update(groups, Means(), Clock())
    return found, trainer.rank

found = {"tied": gradients(tied)[0]}
found["untied"], rank = gradients(untied)
if rank == 0:
    torch.save(found, target)
if torch.distributed.get_world_size() > 1:
    leave(0)
"""


@pytest.fixture(scope="module")
def gradients(model_folder, mixed_data, tmp_path_factory):
    """(whole, partitioned): gradients by name, of a tied and an untied model, on one rank and on two."""
    folder = tmp_path_factory.mktemp("gradients")
    script = folder / "gradients.py"
    script.write_text(GRADIENTS)
    settings = [*base_settings(model_folder, mixed_data, folder / "run"), "rollout.engine=hf"]
    settings += ["branch.granularity=response", "trainer.micro_batch_tokens=200"]
    models = [model_folder, untie(model_folder, folder / "untied")]
    with pytest.MonkeyPatch.context() as patch:
        stage = "trainer.deepspeed.zero_optimization.stage=0"
        patch.setattr(sys, "argv", [str(script), str(folder / "whole.pt"), *map(str, models), *settings, stage])
        runpy.run_path(str(script), run_name="__main__")
    launch(2, script, folder / "partitioned.pt", *models, *settings, PARTITIONED)
    return torch.load(folder / "whole.pt"), torch.load(folder / "partitioned.pt")


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_gradients_of_partitioned_parameters_equal_those_of_whole_ones(head, gradients):
    whole, partitioned = (found[head] for found in gradients)
    assert whole.keys() == partitioned.keys()
    assert ("model.lm_head.weight" in whole) == (head == "untied")
    for name, gradient in whole.items():
        assert (partitioned[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    weight = "model.model.language_model.embed_tokens.weight" if head == "tied" else "model.lm_head.weight"
    assert whole[weight].norm() > 1e-2


def untie(model_folder, target):
    """The model with a head of its own."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype="float32")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(target)
    load_processor(str(model_folder)).save_pretrained(target)
    return target
