"""AVATAR's replay: advantages and tiers by hand, ratios to the policy that generated, and a buffer that is resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import launch
from test_groups import group

from vogue.cli import main
from vogue.config import load_config
from vogue.inputs import Prompt, View
from vogue.method.replay import drawn_by_tier, off_policy_advantages, surplus, tiers
from vogue.method.uncertainty import Signals
from vogue.metrics import Means
from vogue.model.packing import Row, collate
from vogue.rollout.engine import Completion
from vogue.settings import ConfigError
from vogue.step.groups import Trace, kept_lengths, rows, tally
from vogue.step.loader import REPLAYABLE
from vogue.step.objective import objective
from vogue.step.replay import BUFFER, remember, with_replayed
from vogue.step.run_state import RunState
from vogue_kernels import GuidanceConfig

NEEDED = ["model.path=some/model", "data.train=train.parquet"]
SHARES = (0.25, 0.35, 0.4)
AVATAR = ("method=avatar", "replay.size=30", "replay.n=2", "rollout.n=4", "rollout.prompts=8")


# ------------------------------------------------------------------------------------------------------- by hand


def test_replayed_rewards_are_judged_by_what_the_policy_earns_today():
    # R̄ = 1/4; the replayed (1, 0) have the sample std 0.7071.
    found = off_policy_advantages([1, 0], [0, 0, 1, 0], scaled=True)
    assert found.tolist() == pytest.approx([1.06066, -0.353553], abs=1e-5)
    assert off_policy_advantages([1, 0], [0, 0, 1, 0], scaled=False, weight=0.5).tolist() == [0.375, -0.125]
    # Alike among themselves, by the std of (1, 1, 1, 0, 0): variance (3 · 0.16 + 2 · 0.36) / 4 = 0.3.
    found = off_policy_advantages([1, 1], [1, 0, 0], scaled=True)
    assert found.tolist() == pytest.approx([(2 / 3) / 0.3**0.5] * 2, abs=1e-5)
    assert off_policy_advantages([1], [1, 1], scaled=True).tolist() == [0]
    assert off_policy_advantages([0], [1], scaled=True).tolist() == pytest.approx([-1 / 0.5**0.5], abs=1e-5)


def test_the_lowest_two_fifths_of_prompts_are_hard():
    found = tiers([i / 20 for i in range(20)], SHARES)
    assert found == [2] * 8 + [1] * 7 + [0] * 5
    assert tiers([0.5, 0.0, 1.0], SHARES) == [1, 2, 0]


def test_the_fullest_tier_gives_up_and_free_room_is_lent():
    # Rooms of 10: 2.5 easy, 3.5 medium, 4 hard.
    assert surplus([2, 3, 7], 10, SHARES) == [0, 0, 2]
    assert surplus([9, 0, 1], 10, SHARES) == [0, 0, 0]
    assert surplus([8, 1, 7], 10, SHARES) == [4, 0, 2]


def test_prompts_are_drawn_by_tier_each_once():
    means = [i / 40 for i in range(40)]  # 16 hard, 14 medium, 10 easy
    found = drawn_by_tier(means, 20, SHARES, np.random.default_rng(0))
    assert len(set(found)) == 20
    assert [sum(i < 16 for i in found), sum(16 <= i < 30 for i in found), sum(i >= 30 for i in found)] == [8, 7, 5]
    assert sorted(drawn_by_tier(means[:3], 20, SHARES, np.random.default_rng(0))) == [0, 1, 2]


def row_of(advantages, behaviours=()):
    prompt = Prompt(None, (), torch.tensor([5, 6]), torch.zeros(2, dtype=torch.int64))
    completions = tuple(Completion((7, 8), (-1.2, -0.8), "", True) for _ in advantages)
    shaped = tuple(torch.full((2,), a) for a in advantages)
    return Row(prompt, {"raw": View((), None, None)}, "raw", completions, shaped, behaviours=behaviours)


def test_the_ratio_of_a_replayed_token_is_to_the_policy_that_generated_it():
    config = load_config(None, [*NEEDED, "method=grpo"])
    stored = torch.tensor([-1.2, -0.9])
    batch = collate([row_of([2.0, 1.0], (None, stored))], 0, token_mean=True)
    logprob = torch.tensor([-1.0, -0.5, -1.0, -1.0], requires_grad=True)
    nothing = torch.zeros(4)
    signals = Signals(logprob, nothing, None)
    found = objective(batch, signals, config.loss, GuidanceConfig(alpha_out=0, alpha_per=0), 1, first=True)
    found.loss.backward()
    # Today's tokens: ratio 1, gradient -A. Replayed: e^0.2 = 1.2214 is clipped at 1.2; e^-0.1 isn't, gradient -ratio.
    assert logprob.grad.tolist() == pytest.approx([-2, -2, 0, -np.exp(-0.1)], abs=1e-6)
    assert found.loss.item() == pytest.approx(-2 - 2 - 1.2 - np.exp(-0.1), abs=1e-6)
    assert found.metrics["ratio_error"] == (0, 2)
    assert found.metrics["replay/clip_fraction"] == (1, 2)
    estimate = (np.exp(0.2) - 1 - 0.2) + (np.exp(-0.1) - 1 + 0.1)
    assert found.metrics["replay/kl"] == (pytest.approx(estimate, abs=1e-6), 2)
    # The correction for the engine compares two log-probabilities of the same policy: 0 and -0.1 of the replayed ones.
    assert found.metrics["mismatch/logprob"].total == pytest.approx(0.2 + 0.3 + 0 + 0.1, abs=1e-6)


def test_without_replayed_completions_a_batch_has_no_behaviour():
    assert collate([row_of([1.0])], 0, token_mean=True).behaviour is None


# -------------------------------------------------------------------------------------------------- the buffer


def seen(index, *accuracies, number=0, **given):
    some = group(number, *accuracies, **given)
    logprobs = tuple(-0.1 * (i + 1) for i in range(len(accuracies)))
    completions = tuple(replace(c, logprobs=(p,)) for c, p in zip(some.completions, logprobs))
    advantages = tuple(accuracy - 0.5 for accuracy in accuracies)
    return replace(some, item=replace(some.item, index=index), completions=completions, advantages=advantages)


def told(state, config, step, *groups):
    remember(groups, state, config, step, Means())


def test_what_is_stored_joins_later_groups_of_its_prompt_alone(config, new_trainer):
    new_trainer()  # one rank
    settings, state = config(*AVATAR, "advantage.shape=0"), RunState()
    first = seen(3, 1, 0)
    traced = replace(first, traces=(Trace(torch.zeros(1), None, torch.tensor([-0.7])), None))
    assert with_replayed([first], state, settings, 0, Means()) == [first]  # nothing is stored yet
    told(state, settings, 0, traced, seen(4, 0, 0, number=1))
    means, today = Means(), seen(3, 0, 0, 0, 0)
    joined, other = with_replayed([today, seen(5, 1, 0, number=1)], state, settings, 2, means)
    assert other.replayed == ()
    assert [one.age for one in joined.replayed] == [2, 2]
    # The trainer's own log-probability, and the engine's of the one that went through no forward.
    assert [one.behaviour.item() for one in joined.replayed] == pytest.approx([-0.7, -0.2])
    assert joined.replayed[0].completion.logprobs == pytest.approx((-0.1,))
    # R̄ = 1/6 of (1, 0, 0, 0, 0, 0), the replayed (1, 0).
    expected = [(1 - 1 / 6) / 0.5**0.5, (-1 / 6) / 0.5**0.5]
    assert [one.advantage for one in joined.replayed] == pytest.approx(expected, abs=1e-5)
    assert means["replay/age"] == (4, 2)
    assert means["replay/share"] == (2, 8)
    (row,) = rows(
        {
            0: replace(
                joined, item=replace(joined.item, prompt=row_of([1.0]).prompt, views={"raw": View((), None, None)})
            )
        },
        settings,
        1,
        True,
    )
    assert [b is None for b in row.behaviours] == [True, True, True, True, False, False]
    assert kept_lengths([joined]) == [1] * 6
    counted = Means()
    tally([joined], counted)
    assert counted["reward"] == (0, 4)  # what was generated before counts in no mean of this step


def test_old_completions_leave_and_so_do_the_oldest_of_the_fullest_tier(config, new_trainer):
    new_trainer()
    settings, state = config(*AVATAR, "replay.size=4", "replay.max_age=2"), RunState()
    told(state, settings, 0, seen(0, 0, 0), seen(1, 1, 1, number=1))
    told(state, settings, 1, seen(0, 0, 0), seen(1, 1, 1, number=1))
    # Of 8, tiers hard (index 0) and easy (index 1) hold 4 each with rooms of 1.6 and 1: easy gives up 2 or 3.
    kept = [(one["index"], one["step"]) for one in state.training[BUFFER]["stored"]]
    assert len(kept) == 4
    assert all(step == 1 for index, step in kept if index == 1)  # the oldest went
    assert sum(index == 0 for index, _ in kept) == 2
    told(state, settings, 2)
    told(state, settings, 3)
    assert state.training[BUFFER]["stored"] == []  # at step 4 they would be 3 steps old
    assert state.current[REPLAYABLE]["index"].tolist() == []
    assert state.training[BUFFER]["recent"][1] == [1, 1, 1, 1]


def test_a_step_draws_prompts_that_have_something_stored(new_loader):
    loader = new_loader(*AVATAR)
    loader.state.settled = {
        REPLAYABLE: {"index": torch.tensor([5, 9, 11, 20]), "mean": torch.tensor([0.0, 0.2, 0.4, 1.0])}
    }
    items = loader.items(3)
    assert sorted(item.index for item in items[1::2]) == [5, 9, 11, 20]
    loader.state.settled = {}
    assert len({item.number for item in loader.items(0)}) == 8  # nothing is stored yet


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["replay.n=3"], "replay.n=3: with replay.size=0 nothing is stored"),
        (["replay.size=8", "replay.tiers=[0.5,0.5,0.5]"], "replay.tiers=[0.5, 0.5, 0.5] sum to 1.5, not to 1"),
        (["method=avatar", "replay.size=0", "advantage.shape=0"], "replay.size=0 and advantage.shape=0: method=avatar"),
        (["replay.size=8", "method=passk"], "replay.size=8 with advantage.kind=passk"),
        (["replay.size=8", "sampling.kind=variance"], "replay.size=8 with replay.share: with sampling.kind=variance"),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, [*NEEDED, *overrides])
    assert str(error.value).startswith(message)


# --------------------------------------------------------------------------------- in a run, stopped and resumed

CURVES = ("reward", "loss", "grad_norm", "entropy", "tokens", "trained_tokens", "clip_fraction")
OF_REPLAY = ("replay/age", "replay/share", "replay/stored", "replay/kl", "replay/clip_fraction")


@pytest.fixture
def run(model_folder, digits_folder, tmp_path):
    def started(name, *settings, ranks=1):
        given = [
            *(f"model.path={model_folder}", "model.dtype=float32", f"data.train={digits_folder}/train.parquet"),
            *("data.system_prompt=Think.", "data.max_prompt_tokens=128", "rollout.engine=hf", "rollout.max_tokens=12"),
            *("optimizer.lr=1e-4", *AVATAR, f"trainer.output_dir={tmp_path / name}"),
        ]
        if ranks == 1:
            assert main(["train", *given, *settings]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *given, *settings)
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return started


@pytest.mark.slow
def test_a_stopped_run_replays_what_a_straight_one_does(run):
    straight = run("straight", "trainer.steps=4")
    run("stopped", "trainer.steps=2")
    resumed = run("stopped", "trainer.steps=4", "--resume")
    for one, two in zip(straight, resumed, strict=True):
        assert {name: one[name] for name in one if not name.startswith(("time", "throughput", "memory"))} == {
            name: two[name] for name in two if not name.startswith(("time", "throughput", "memory"))
        }
    assert "replay/age" not in straight[0]
    assert all(0 < row["replay/share"] <= 1 / 3 for row in straight[2:])
    assert all(row["replay/age"] >= 1 and row["replay/kl"] > 0 for row in straight[2:])
    assert [row["replay/stored"] for row in straight] == [30] * 4
    assert straight[3]["trained_tokens"] > 0
    assert straight[3]["ratio_error"] < 1e-5  # of today's completions alone


@pytest.mark.long
def test_two_ranks_replay_as_one(run):
    straight = run("one", "trainer.steps=4")
    run("two", "trainer.steps=2", ranks=2)
    resumed = run("two", "trainer.steps=4", "--resume", ranks=2)
    for one, two in zip(straight, resumed, strict=True):
        names = [name for name in (*CURVES, *OF_REPLAY) if name in one]
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-3)
    assert straight[3]["replay/share"] > 0
