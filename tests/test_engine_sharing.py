"""Engines that share: ranks one engine of vLLM, engine and training the memory of a GPU."""

import json
from dataclasses import replace

import pytest
import torch
from ranks import apart, launch
from steps import batches_of, generated
from test_engines import base_settings
from test_several_ranks import PARTITIONED

from vogue.config import load_config
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.inputs import Preprocessor
from vogue.model.files import read_checkpoint
from vogue.run.memory import check_engine
from vogue.settings import ConfigError
from vogue.trainer import Trainer

pytestmark = pytest.mark.slow

CURVES = ("reward", "loss", "entropy", "grad_norm", "noisy_share", "tokens")


@pytest.fixture(scope="module")
def train(wide_model_folder, mixed_data, digits_folder, tmp_path_factory):
    """A function: train on two ranks with vLLM in a folder of its own; returns the folder.

    Of the only sample that is held out, and in second questions, one of the ranks has nothing to ask.
    """
    root = tmp_path_factory.mktemp("runs")

    def run(name, *overrides):
        folder = root / name
        settings = [*base_settings(wide_model_folder, mixed_data, folder), "rollout.engine=vllm", PARTITIONED]
        settings += [f"data.test={digits_folder}/test.parquet", "data.test_limit=1", "trainer.eval_every=1"]
        settings += ["optimizer.lr=1e-3", "branch.granularity=response", *overrides]
        launch(2, "--module", "vogue.train", *settings)
        return folder

    return run


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def assert_alike(found, expected, rel):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert {name: a[name] for name in CURVES} == pytest.approx({name: b[name] for name in CURVES}, rel=rel)


@pytest.fixture(scope="module")
def shared(train):
    return train("shared", "trainer.steps=2", "rollout.tensor_parallel=2")


def test_two_ranks_train_with_an_engine_each_or_with_one_that_they_share(train, shared):
    own = train("own", "trainer.steps=2")
    assert len(rows(own)) == 2
    for row in rows(own) + rows(shared):
        assert row["grad_norm"] > 1e-3
        assert row["mismatch/logprob"] < 1e-3  # in step 1: with the weights of the update before
        assert row["ratio_error"] == 0
    assert_alike(rows(shared), rows(own), rel=1e-4)
    assert rows(shared, "evaluations") == rows(own, "evaluations")


@pytest.mark.long
def test_ranks_that_share_an_engine_go_on_from_a_checkpoint_as_if_they_had_not_stopped(train, shared):
    train("stopped", "trainer.steps=1", "rollout.tensor_parallel=2")
    resumed = train("stopped", "trainer.steps=2", "rollout.tensor_parallel=2", "--resume")
    assert_alike(rows(resumed), rows(shared), rel=1e-6)
    assert rows(resumed, "evaluations") == rows(shared, "evaluations")


@pytest.mark.parametrize(
    ("shared", "ranks", "told"),
    [
        (2, 3, "doesn't divide the number of ranks, 3"),
        (2, 1, "doesn't divide the number of ranks, 1: a single process, as `vogue eval` is, takes 1"),
        (3, 3, "doesn't divide the model's 4 heads of attention"),
        (4, 4, "doesn't divide the model's 2 heads of the vision tower's attention"),
    ],
)
def test_ranks_that_cannot_share_the_model_are_told_so_before_it_is_loaded(
    shared, ranks, told, wide_model_folder, mixed_data, tmp_path, monkeypatch
):
    monkeypatch.setattr("vogue.run.memory.rank_count", lambda: ranks)
    config = load_config(
        None, [*base_settings(wide_model_folder, mixed_data, tmp_path), f"rollout.tensor_parallel={shared}"]
    )
    with pytest.raises(ConfigError) as error:
        check_engine(read_checkpoint(config.model.path).model, config)
    assert str(error.value) == f"rollout.tensor_parallel={shared} {told}"


# ------------------------------------------------------------------------------------------------------------- sleep


def asleep(trainer):
    """What vLLM's executor counts as asleep."""
    core = trainer.engine.llm.llm_engine.engine_core.engine_core
    return set(core.model_executor.sleeping_tags)


def through_a_step(settings):
    """What is asleep at each point of a step and an evaluation, told by vLLM's own executor.

    A CPU's worker frees no memory, and says that it can't: that it could is all that is made up here.
    """
    from vllm.platforms import current_platform

    type(current_platform).is_sleep_mode_available = lambda self: True
    config = load_config(None, settings)
    preprocessor = Preprocessor.of(config)
    data = check_samples(load_samples(config.data.train), preprocessor.lengths)
    trainer = Trainer(config, data, preprocessor, resume=None)
    found = {"at the start": asleep(trainer)}
    update, judge = trainer.update, trainer.judge

    def judging(groups):
        found["judging"] = asleep(trainer)
        return judge(groups)

    def updating(*arguments):
        found["training"] = asleep(trainer)
        with pytest.raises(RuntimeError, match="load_weights must come before generate"):
            generated(trainer)
        return update(*arguments)

    trainer.judge, trainer.update = judging, updating
    trainer.run_step()
    found["after the sync"] = asleep(trainer)
    trainer.evaluate(data.samples[:2])
    found["after an evaluation"] = asleep(trainer)
    groups = [replace(group, advantages=(1.0,) * len(group.completions)) for group in generated(trainer)]
    with torch.no_grad():
        pairs = [(trainer.policy(batch).logprob, batch.engine_logprob) for batch in batches_of(trainer, groups)]
    return found, max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def test_vllm_has_memory_for_what_it_does_and_for_nothing_else(model_folder, mixed_data, tmp_path):
    settings = [*base_settings(model_folder, mixed_data, tmp_path), "rollout.engine=vllm", "rollout.sleep=true"]
    settings += ["trainer.deepspeed.zero_optimization.stage=0", "optimizer.lr=1e-3"]
    found, disagreement = apart(through_a_step, settings)
    assert found == {
        "at the start": set(),
        "judging": set(),  # where second questions are generated
        "training": {"weights", "kv_cache"},
        "after the sync": {"kv_cache"},
        "after an evaluation": set(),
    }
    assert disagreement < 1e-3  # of the weights of the update


def test_sleep_is_refused_where_vllm_cannot_free_its_memory(config):
    from vogue.rollout.vllm import check_sleep

    if torch.cuda.is_available():
        pytest.skip("it can on a GPU")
    check_sleep(config("rollout.engine=vllm"))
    with pytest.raises(ConfigError, match=r"^rollout\.sleep=true: .* on this platform, cpu; leave it unset$"):
        check_sleep(config("rollout.engine=vllm", "rollout.sleep=true"))
