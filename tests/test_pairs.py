"""Shuffle-R1's pairs and batch shuffle, by hand and in a real update."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import TWO_BY_TWO, batches_of, generated, objective_of, rows_of
from test_groups import group

from vogue.config import load_config
from vogue.method.advantage import group_advantages
from vogue.method.pairs import drawn_pairs, kept_by_pairs, pair_count, paired
from vogue.metrics import Clock, Means
from vogue.settings import ConfigError
from vogue.step.groups import judged, kept_lengths
from vogue.step.pair_shuffle import Pair, shuffled, weights_of

NEEDED = ["model.path=some/model", "data.train=train.parquet"]


def advantages_of(*rewards):
    return group_advantages(torch.tensor([rewards], dtype=torch.float32))[0].tolist()


def test_six_right_of_eight_by_hand():
    # mean 3/4, sample variance (6/16 + 2 · 9/16) / 7 = 3/14, std 0.4629100: A = 0.5400617 and -1.6201852
    found = advantages_of(1, 1, 0, 1, 1, 0, 1, 1)
    assert paired(found) == [(0, 5), (1, 2), (3, 7), (4, 6)]
    some = replace(group(0, *[0.0] * 8), advantages=tuple(found))
    assert list(weights_of(some).values()) == pytest.approx([2.160247, 2.160247, 1.080123, 1.080123], abs=1e-5)
    assert kept_by_pairs(found, 0.5) == (True, True, True, False, False, True, False, False)


def test_one_right_of_eight_by_hand():
    # mean 1/8, sample variance (49/64 + 7/64) / 7 = 1/8: A = 2.4748737 and -0.3535534
    found = advantages_of(0, 0, 0, 1, 0, 0, 0, 0)
    some = replace(group(0, *[0.0] * 8), advantages=tuple(found))
    weights = list(weights_of(some).values())
    assert weights == pytest.approx([2.828427, 0.707107, 0.707107, 0.707107], abs=1e-4)
    assert [w / sum(weights[:2]) for w in weights[:2]] == pytest.approx([0.8, 0.2], abs=1e-5)
    assert paired(found)[0] == (3, 7)


def test_the_number_of_pairs_is_rounded_and_odd_groups_have_none():
    assert [pair_count(16, 0.5), pair_count(10, 0.29), pair_count(4, 0.3), pair_count(4, 0.1)] == [4, 1, 1, 0]
    with pytest.raises(ValueError, match="3 completions can't be paired"):
        paired([1.0, 0.0, -1.0])


def test_all_completions_count_in_the_advantages_and_the_widest_pairs_alone_are_kept(config):
    settings = config("method=grpo", "advantage.pairs=0.5", "rollout.n=8")
    some = group(0, *map(float, (1, 1, 0, 1, 1, 0, 1, 1)))
    found = judged(some, some.scores, settings)
    assert found.advantages == pytest.approx(advantages_of(1, 1, 0, 1, 1, 0, 1, 1))
    assert found.kept == (True, True, True, False, False, True, False, False)
    half = replace(some, kept=(False, True) * 4)  # what is left out already stays so
    assert judged(half, half.scores, settings).kept == (False, True, False, False, False, True, False, False)
    assert judged(some, some.scores, config("method=grpo", "rollout.n=8")).kept == (True,) * 8


# ----------------------------------------------------------------------------------------------------- batch shuffle


def test_sub_batches_are_as_large_as_the_step_and_repeat_no_pair_within_one():
    weights = [3.0, 1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0]
    found = drawn_pairs(weights, 2, np.random.default_rng(0))
    assert len(found) == 8
    assert len(set(found[:4])) == len(set(found[4:])) == 4
    assert not {2, 5} & set(found)
    assert [len(drawn_pairs([1.0] * 7, parts, np.random.default_rng(0))) for parts in (1, 2, 3, 7, 9)] == [7] * 5


def test_pairs_are_drawn_in_proportion_to_their_weight():
    found = drawn_pairs([0.8, 0.2, 0.0, 0.0], 4, np.random.default_rng(0))
    assert set(found) <= {0, 1}
    counts = sum(drawn_pairs([0.8, 0.2] + [0.0] * 8, 10, np.random.default_rng(i)).count(0) for i in range(1000))
    # 10,000 draws of one pair each: 8,000 expected, standard deviation 40
    assert abs(counts - 8000) < 160


def test_a_sub_batch_that_too_few_pairs_have_a_weight_for_has_each_of_them_once():
    assert drawn_pairs([0.0, 1.0, 0.0, 0.0], 2, np.random.default_rng(0)) == [1, 1]
    assert drawn_pairs([0.0, 0.0], 2, np.random.default_rng(0)) == []


def test_a_pair_of_which_one_is_left_out_weighs_the_other_alone():
    some = replace(group(3, 0, 0, 0, 0), advantages=(1.5, 0.5, -0.5, -1.5), kept=(True, False, False, True))
    assert weights_of(some) == {Pair(3, "raw", 0): 3.0}
    some = replace(some, kept=(True, False, True, False))
    assert weights_of(some) == {Pair(3, "raw", 0): 1.5, Pair(3, "raw", 1): 0.5}


SHUFFLED = ("method=grpo", "rollout.n=4", "trainer.shuffle=4", "trainer.updates=2")


def groups_of_step(trainer, *advantages):
    return [
        replace(found, advantages=given)
        for found, given in zip(generated(trainer, trainer.loader.items(0)), advantages, strict=True)
    ]


def test_updates_share_what_was_drawn_and_a_completion_comes_as_often_as_its_pair(new_trainer):
    trainer = new_trainer(*SHUFFLED, "trainer.shuffle=8")
    groups = groups_of_step(trainer, (2.0, 1.0, -1.0, -2.0), (0.0,) * 4, (0.1, -0.1, 0.0, 0.0), (3.0, 0.0, -1.0, -2.0))
    means = Means()
    updates = shuffled(groups, trainer.config, 0, means, Clock())
    total = [0] * 16
    for part in updates:
        repeats = [sum(found.repeats) for found in part.values()]
        assert sum(repeats) == 2 * 4  # 8 pairs were drawn, one a sub-batch: four an update
        for number, found in part.items():
            assert found.kept == tuple(count > 0 for count in found.repeats)
            assert found.repeats[0] == found.repeats[3] or number == 2
            for i, count in enumerate(found.repeats):
                total[4 * number + i] += count
    assert total[4:8] == [0] * 4
    assert max(total) > 1
    assert means["shuffled_share"] == (sum(total[4 * i + j] > 0 for i in (0, 3) for j in (0, 1)) + (total[8] > 0), 8)
    again = shuffled(groups, trainer.config, 0, Means(), Clock())
    other = shuffled(groups, trainer.config, 1, Means(), Clock())
    assert again == updates
    assert [[found.repeats for found in part.values()] for part in other] != [
        [found.repeats for found in part.values()] for part in updates
    ]


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_a_completion_that_is_drawn_twice_weighs_as_two(new_trainer, aggregation):
    trainer = new_trainer("method=grpo", *TWO_BY_TWO, f"loss.aggregation={aggregation}")
    first, second = groups_of_step(trainer, (1.0, -1.0), (1.0, -1.0))
    once, _ = first, second
    repeated = replace(once, repeats=(3, 1))
    lengths = [len(completion.token_ids) for completion in once.completions]
    assert kept_lengths([repeated]) == [lengths[0]] * 3 + [lengths[1]]
    (row,) = rows_of(trainer, repeated)
    assert row.repeats == (3, 1)
    (plain,), (weighed,) = batches_of(trainer, [once]), batches_of(trainer, [repeated])
    times = torch.tensor([3.0] * lengths[0] + [1.0] * lengths[1])
    torch.testing.assert_close(weighed.weights, plain.weights * times)
    tokens = torch.tensor([1.0] * lengths[0] + [-1.0] * lengths[1])
    assert objective_of(trainer, weighed).loss.item() == pytest.approx(
        -float((weighed.weights * tokens).sum()), rel=1e-5
    )


def test_a_step_that_is_shuffled_trains_on_what_has_an_advantage(new_trainer):
    partitions = "trainer.deepspeed.zero_optimization.stage=1"  # as by default: stage 0 tells no norm
    metrics, groups = new_trainer(*SHUFFLED, "optimizer.lr=1e-4", partitions).run_step()
    assert any(len(set(found.advantages)) > 1 for found in groups)
    assert metrics["grad_norm"] > 0
    assert 0 < metrics["shuffled_share"] <= 1
    assert metrics["ratio_error"] < 1e-6


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["advantage.pairs=0.5", "rollout.n=5"], "rollout.n=5 completions can't be paired"),
        (["trainer.shuffle=2", "rollout.n=5"], "rollout.n=5 completions can't be paired"),
        (["advantage.pairs=0.1", "rollout.n=4"], "advantage.pairs=0.1 of rollout.n=4 completions is no pair"),
        (
            ["method=shuffle_r1", "advantage.pairs=1", "trainer.shuffle=0"],
            "advantage.pairs=1 and trainer.shuffle=0: method=shuffle_r1 without both is method=grpo",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides, told):
    with pytest.raises(ConfigError) as error:
        load_config(None, [*NEEDED, *overrides])
    assert str(error.value).startswith(told)


@pytest.mark.parametrize("name", ["shuffle_r1", "mmr1"])
def test_the_recipes_are_settings_that_can_be_used(name):
    path = Path(__file__).parents[1] / f"examples/recipes/{name}.yaml"
    assert load_config(path, NEEDED).method == name


def test_shuffle_r1_keeps_8_of_16_and_draws_8_sub_batches():
    found = load_config(None, [*NEEDED, "method=shuffle_r1"])
    assert (found.advantage.pairs, found.trainer.shuffle, found.rollout.n) == (0.5, 8, 16)
    assert found.branch.probability == 0
