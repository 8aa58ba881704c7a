"""CDE's bonus on rewards: by hand, in a group, and in a real step."""

from dataclasses import replace

import pytest
import torch
from test_groups import group

from vogue.config import load_config
from vogue.config.presets import JUDGING
from vogue.config.sections import RewardConfig
from vogue.method.advantage import group_advantages
from vogue.method.curiosity import bonus, log_perplexity, weight_at
from vogue.metrics import Means
from vogue.rewards import score
from vogue.rewards.explain import steps
from vogue.rollout.engine import Completion
from vogue.settings import ConfigError
from vogue.step.dynamic_sampling import found_mixed
from vogue.step.groups import RIGHT, WRONG, curious, judged, tally


def saying(some, *logprobs):
    """The group with completions of these log-probabilities."""
    return replace(some, completions=tuple(Completion((0,) * len(part), part, "", True) for part in logprobs))


def test_the_bonus_by_hand():
    paper = {"weight": 1.0, "alpha": 1.0, "cap": 3.0}
    surprise = log_perplexity((-0.1, -0.5, -0.3))
    assert surprise == pytest.approx(0.3)
    assert 1 + bonus(1, surprise, **paper) == pytest.approx(1.3)
    assert -1 + bonus(-1, surprise, **paper) == pytest.approx(-0.7)
    assert bonus(1, 0.9, **paper) == pytest.approx(1 / 3)  # capped
    assert bonus(0, 0.9, **paper) == 0
    assert bonus(1, surprise, weight=0.5, alpha=2.0, cap=1.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", [0.5, 0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.5, 0.375, 0.25, 0.125, 0.0]),
        ("cosine", [0.5, 0.4267767, 0.25, 0.0732233, 0.0]),  # (1 + cos 45°) / 4 = 0.4267767
        ("staircase", [0.5, 0.5, 0.0, 0.0, 0.0]),
    ],
)
def test_the_weight_over_a_run_by_hand(schedule, expected):
    found = [weight_at(step, 8, 0.5, schedule, 0.5) for step in (0, 2, 4, 6, 8)]
    assert found == pytest.approx(expected, abs=1e-7)


def test_a_schedule_that_there_is_not_is_told():
    with pytest.raises(ValueError, match="schedule 'exponential' is none of none, linear"):
        weight_at(0, 8, 0.5, "exponential", 0.5)


def test_a_group_of_right_answers_trains_by_its_surprise_and_dynamic_sampling_still_calls_it_unmixed(config):
    some = saying(group(0, 1.0, 1.0), (-0.1,), (-0.2, -0.4))
    settings = config("method=cde", "rollout.n=2")
    found = judged(some, curious(some, some.scores, settings, 0), settings)
    assert [score.reward for score in found.scores] == pytest.approx([1.1, 1.3])
    assert [score.components["curiosity"] for score in found.scores] == pytest.approx([0.1, 0.3])
    assert found.advantages == pytest.approx([-0.7071068, 0.7071068], abs=1e-4)
    assert found_mixed([found]) == {0: False}


def test_without_a_weight_scores_stay_the_same_and_at_a_weight_of_0_rewards_do(config):
    some = saying(group(0, 1.0, 0.0), (-0.1,), (-0.2, -0.4))
    assert curious(some, some.scores, config("rollout.n=2"), 0) == list(some.scores)
    late = curious(some, some.scores, config("method=cde", "rollout.n=2"), 2)  # of 4: the staircase has dropped
    assert [score.reward for score in late] == [1, 0]
    assert [score.components["curiosity"] for score in late] == [0, 0]


def test_the_log_perplexities_of_right_and_wrong_answers_are_counted():
    some = saying(group(0, 1.0, 0.0, 0.0), (-0.1,), (-0.2, -0.4), (-1.0,))
    means = Means()
    tally([some], means)
    assert means[RIGHT] == (pytest.approx(0.1), 1)
    assert means[WRONG] == (pytest.approx(1.3), 2)


def test_a_step_trains_on_rewards_with_the_bonus(new_trainer):
    metrics, groups = new_trainer("method=cde", "rollout.n=4").run_step()
    for found in groups:
        bonuses = [earned.components["curiosity"] for earned in found.scores]
        for earned, extra, completion in zip(found.scores, bonuses, found.completions):
            plain = 0.9 * (1 if earned.accuracy else -1) + 0.1 * earned.format
            surprise = -sum(completion.logprobs) / len(completion.logprobs)
            assert extra == pytest.approx(min(abs(plain) / 3, surprise), abs=1e-6)
            assert earned.reward == pytest.approx(plain + extra)
        rewards = torch.tensor([[score.reward for score in found.scores]])
        assert found.advantages == pytest.approx(group_advantages(rewards)[0].tolist(), abs=1e-6)
    same = [found for found in groups if len({score.accuracy for score in found.scores}) == 1]
    assert any(advantage for found in same for advantage in found.advantages)
    assert metrics["reward/curiosity"] > 0
    assert metrics["calibration_gap"] == pytest.approx(metrics[WRONG] - metrics[RIGHT])


# --------------------------------------------------------------------------------------------- the wrong answer's value


def test_a_wrong_answer_is_worth_what_the_settings_say():
    right, wrong = (rf"<think>Sum.</think>\boxed{{{digit}}}" for digit in (3, 4))
    settings = RewardConfig(wrong=-1.0)
    assert score(right, "3", settings).reward == pytest.approx(1.0)
    assert score(wrong, "3", settings).reward == pytest.approx(-0.9 + 0.1)
    assert score("no", "3", settings).reward == pytest.approx(-0.9)
    assert score(wrong, "3", settings).accuracy == 0
    assert ("reward.wrong", "-1, what a wrong answer counts as in place of 0") in steps(wrong, "3", settings)


def test_partial_credit_stands_between_the_wrong_answers_value_and_1():
    completion = "<description></description><think></think><rethink></rethink><answer>4</answer>"
    settings = RewardConfig(design="continuous", wrong=-1.0)
    # 3 and 4 differ by 1: credit 1/2, halfway from -1 to 1; nothing else earns anything
    assert score(completion, "3", settings).reward == pytest.approx(0.0)
    assert score(completion, "4", settings).reward == pytest.approx(0.8)


def test_designs_without_a_score_of_right_answers_have_no_value_of_a_wrong_one():
    assert "no_accuracy" not in JUDGING
    assert JUDGING["verifiable"] == JUDGING["vision_sr1"] == "accuracy"
    assert JUDGING["vanilla"] == "answer"


# ---------------------------------------------------------------------------------------------------------- settings

NEEDED = ["model.path=some/model", "data.train=train.parquet"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=cde", "curiosity.weight=0"], "curiosity.weight=0: method=cde without its bonus is method=grpo"),
        (
            ["curiosity.weight=0.5", "advantage.kind=passk"],
            "curiosity.weight=0.5: advantage.kind=passk reads right and wrong alone, not the reward",
        ),
        (
            ["reward.design=no_accuracy", "reward.wrong=-1"],
            "reward.wrong=-1.0: reward.design=no_accuracy has no score of right and wrong answers",
        ),
        (
            ["reward.function=own.py:reward", "reward.wrong=-1"],
            "reward.wrong=-1.0: reward.function=own.py:reward has no score of right and wrong answers",
        ),
        (
            ["curiosity.weight=0.5", "reward.functions.curiosity.function=own.py:reward"],
            "reward.functions.curiosity: this is the name of the bonus of curiosity.weight",
        ),
        (["reward.wrong=0.5"], "reward.wrong=0.5: input should be less than or equal to 0"),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides, told):
    with pytest.raises(ConfigError) as error:
        load_config(None, [*NEEDED, *overrides])
    assert str(error.value) == told


def test_cde_is_grpo_with_its_bonus_and_its_schedule_ends_with_the_run():
    cde = load_config(None, [*NEEDED, "method=cde"])
    assert (cde.curiosity.weight, cde.curiosity.alpha, cde.curiosity.cap, cde.reward.wrong) == (1, 1, 3, -1)
    assert (cde.branch.probability, cde.guidance.alpha_out, cde.guidance.alpha_per) == (0, 0, 0)
    assert cde.uses_steps() == ["curiosity.schedule"]
    assert load_config(None, [*NEEDED, "method=cde", "curiosity.schedule=none"]).uses_steps() == []
    assert load_config(None, [*NEEDED, "method=grpo"]).uses_steps() == []
