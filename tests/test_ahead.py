"""Rollouts ahead of the training: which weights sample them, what waits for what, and runs that go on."""

import json
import threading

import pytest
from ranks import launch
from test_engines import base_settings

from vogue.metrics import Clock, Means
from vogue.rollout.engine import Completion, EngineError
from vogue.settings import ConfigError
from vogue.step.ahead import Ahead

AHEAD = ("rollout.engine=server", "rollout.ahead=1", "loss.importance_cap=2")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["rollout.engine=hf"], "rollout.ahead=1: rollout.engine=hf generates where the policy trains"),
        (["loss.importance_cap=null"], "rollout.ahead=1: .* set loss.importance_cap=2"),
        (["rollout.rounds=2"], "rollout.ahead=1: how many of rollout.rounds=2 are needed is known too late"),
        (["sampling.kind=variance"], "rollout.ahead=1: sampling.kind=variance chooses prompts by what the step before"),
        (["rollout.ahead=2"], "rollout.ahead=2: input should be less than or equal to 1"),
    ],
)
def test_rollouts_ahead_are_refused_where_they_would_be_wrong(given, told, config):
    with pytest.raises(ConfigError, match=told):
        config(*AHEAD, *given)
    config(*AHEAD, "loss.importance_cap=null", "loss.importance_floor=0.5")


class Slow:
    """An engine that answers with its version as the token, once it is let go."""

    def __init__(self):
        self.version, self.go, self.asked = 0, threading.Event(), []

    def generate(self, requests, n, sampling):
        version = self.version
        self.asked.append(version)
        assert self.go.wait(60)
        return [[Completion((version,), (-float(i) / 3,), "", True) for i in range(n)] for _ in requests]


def versions(groups):
    return {completion.token_ids[0] for group in groups for completion in group.completions}


def taken(ahead, step):
    means, clock = Means(), Clock()
    return ahead.groups(step, lambda groups: groups, means, clock), means, clock


def test_a_step_trains_on_what_was_sampled_one_update_before_while_the_next_is_sampled(config, new_loader):
    from vogue import distributed

    distributed.start()
    engine, given = Slow(), config(*AHEAD)
    ahead = Ahead(given, new_loader(*AHEAD), engine, [])
    engine.go.set()
    groups, means, _ = taken(ahead, 0)  # the first one has nothing before it
    assert versions(groups) == {0} and means["staleness"].total == 0
    ahead.wait()
    engine.go.clear()
    for step in (1, 2, 3):
        engine.version = step
        groups, means, clock = taken(ahead, step)
        assert versions(groups) == {step - 1} and means["staleness"].total == 1
        assert [group.item.number for group in groups] == [item.number for item in ahead._loader.items(step)]
        if step < 3:  # training would be here: the next one's is on its way, and nothing after the last one's
            engine.go.set()
            ahead.wait()
            engine.go.clear()
    assert engine.asked == [0, 0, 1, 2]
    assert clock.seconds["ahead"] > 0


def test_what_was_sampled_for_the_step_to_come_is_in_a_checkpoint_to_the_last_bit(config, new_loader, tmp_path):
    from vogue import distributed
    from vogue.step.run_state import RunState

    distributed.start()
    engine, given, loader = Slow(), config(*AHEAD), new_loader(*AHEAD)
    engine.go.set()
    ahead, state = Ahead(given, loader, engine, []), RunState()
    taken(ahead, 0)
    with ahead.saved_in(state, 1):
        state.save(tmp_path / "0.pt")
    assert state.current == {}
    expected, *_ = taken(ahead, 1)
    state.load(tmp_path / "0.pt")
    asked = Slow()
    asked.version = 1
    asked.go.set()
    resumed = Ahead(given, loader, asked, state.current["ahead"])
    groups, means, _ = taken(resumed, 1)
    assert [group.completions for group in groups] == [group.completions for group in expected]
    assert means["staleness"].total == 1
    resumed.wait()
    assert asked.asked == [1]  # of step 2 alone
    other = Ahead(given, new_loader(*AHEAD, ranks=2), asked, state.current["ahead"])
    with pytest.warns(UserWarning, match="on another number of ranks: they are generated anew"):
        groups, means, _ = taken(other, 1)
    assert versions(groups) == {1} and means["staleness"].total == 0


def test_what_fails_ahead_ends_the_step_that_it_is_of(config, new_loader):
    from vogue import distributed

    distributed.start()

    class Failing(Slow):
        def generate(self, requests, n, sampling):
            if len(self.asked) == 1:
                raise EngineError("no server is left")
            return super().generate(requests, n, sampling)

    engine = Failing()
    engine.go.set()
    ahead = Ahead(config(*AHEAD), new_loader(*AHEAD), engine, [])
    taken(ahead, 0)
    ahead.wait()
    with pytest.raises(EngineError, match="no server is left"):
        taken(ahead, 1)


# -------------------------------------------------------------------------------------------------- with a server


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


CURVES = ("reward", "loss", "entropy", "grad_norm", "tokens", "staleness")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_ahead_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(ranks, model_folder, mixed_data, tmp_path):
    def train(name, *overrides):
        settings = [*base_settings(model_folder, mixed_data, tmp_path / name), *AHEAD, "optimizer.lr=1e-3", *overrides]
        launch(ranks, "--module", "vogue.train", *settings, "rollout.server_timeout=300")
        return rows(tmp_path / name)

    straight = train("straight", "trainer.steps=4")
    assert [row["staleness"] for row in straight] == [0, 1, 1, 1]
    assert all(row["mismatch/sync"] < 1e-3 for row in straight)
    train("stopped", "trainer.steps=4", "trainer.save_every=2")
    import shutil

    shutil.rmtree(tmp_path / "stopped/checkpoints/step_000004")
    resumed = train("stopped", "trainer.steps=4", "--resume")
    for a, b in zip(resumed, straight, strict=True):
        assert {name: a[name] for name in CURVES} == pytest.approx({name: b[name] for name in CURVES}, rel=1e-5)
