"""Which prompts a step trains on, and what its groups are worth."""

from dataclasses import replace

import pytest
from steps import group_of

from vogue.metrics import Means
from vogue.rewards import Score
from vogue.rollout.engine import Completion
from vogue.step.dynamic_sampling import assigned, choose, found_mixed
from vogue.step.groups import cut, in_updates, judged, overlong_punishment, rows, tally
from vogue.step.loader import Item


def group(number, *accuracies, rewards=None, lengths=None, update=0):
    count = len(accuracies)
    scores = tuple(Score(r, a, 1.0, None) for r, a in zip(rewards or accuracies, accuracies))
    completions = tuple(Completion((0,) * n, (0.0,) * n, "", True) for n in lengths or (1,) * count)
    item = Item(number, None, {}, (False,) * count, update)
    return group_of(item, completions, scores=scores)


def test_the_soft_punishment_by_hand():
    # 10 tokens at most, a buffer of 4: none up to 6 tokens, then a quarter more for each.
    found = [overlong_punishment(length, longest=10, buffer=4) for length in (1, 6, 7, 8, 9, 10)]
    assert found == [0, 0, -0.25, -0.5, -0.75, -1]


def test_a_long_completion_earns_less_and_that_is_told_and_reaches_the_advantages(config):
    settings = config("rollout.max_tokens=10", "reward.overlong_buffer=0.4", "rollout.n=3")
    plain = group(0, 1.0, 1.0, 0.0, lengths=(6, 8, 10))
    found = judged(plain, plain.scores, settings)
    assert [score.reward for score in found.scores] == [1.0, 0.5, -1.0]
    assert [score.components["overlong"] for score in found.scores] == [0, -0.5, -1]
    assert [score.accuracy for score in found.scores] == [1, 1, 0]
    # mean 1/6, sample variance ((5/6)² + (2/6)² + (7/6)²) / 2 = 13/12, std 1.040833
    assert found.advantages == pytest.approx([0.800641, 0.320256, -1.120897], abs=1e-5)
    assert judged(plain, plain.scores, config("rollout.n=3")).scores == plain.scores


def test_a_completion_that_was_cut_off_is_dropped_from_the_loss_and_not_from_the_baseline(config):
    some = group(0, 1.0, 0.0, 0.0)
    some = replace(some, completions=tuple(replace(c, finished=i != 1) for i, c in enumerate(some.completions)))
    some = replace(some, kept=(False, True, True))
    found = judged(some, some.scores, config("loss.drop_unfinished=true", "rollout.n=3"))
    assert found.kept == (False, False, True)
    kept = judged(some, some.scores, config("rollout.n=3"))
    assert kept.kept == some.kept
    assert found.advantages == kept.advantages


def test_passk_goes_by_right_and_wrong_whatever_the_rewards_are(config):
    settings = config("method=passk", "advantage.k=2", "rollout.n=4")
    some = group(0, 1.0, 0.0, 0.0, 0.0, rewards=(0.9, 0.5, 0.1, 0.0))
    # 3 of the 6 pairs hold the right one: R = 1/2, s = 1/2. Of a wrong one's 3 pairs 1 does: (1/3 - 1/2) / (1/2).
    assert judged(some, some.scores, settings).advantages == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_a_prompt_is_mixed_by_accuracy_alone_and_in_any_of_its_groups():
    groups = [group(0, 1, 1), group(0, 0, 1), group(1, 1, 1, rewards=(0.9, 1)), group(2, 0, 1), group(2, 0, 0)]
    assert found_mixed(groups) == {0: True, 1: False, 2: True}


def test_mixed_prompts_come_first_and_others_fill_up():
    assert choose({0: False, 1: True, 2: False, 3: True, 4: True}, 2) == [1, 3]
    assert choose({4: False, 3: True, 2: False, 1: False}, 3) == [1, 2, 3]


def test_chosen_prompts_are_shared_by_the_updates_and_nothing_else_is_kept():
    groups = [group(number, 0, 1) for number in range(6)]
    found = assigned(groups, [0, 2, 4, 5], updates=2)
    assert [any(g.kept) for g in found] == [True, False, True, False, True, True]
    assert [g.item.update for g in found if any(g.kept)] == [0, 0, 1, 1]


def test_groups_keep_their_number_in_the_updates_that_train_on_them():
    first, second = in_updates([group(3, 0, 1, update=1), group(4, 0, 1), group(5, 0, 1, update=1)], 2)
    assert {number: g.item.number for number, g in first.items()} == {1: 4}
    assert {number: g.item.number for number, g in second.items()} == {0: 3, 2: 5}


def test_a_group_that_is_longer_than_the_budget_is_cut_and_one_that_fits_is_not():
    lengths = (5, 3, 9, 4, 4)
    assert cut([0, 1, 2, 3, 4], lengths, 25) == [[0, 1, 2, 3, 4]]
    assert cut([0, 1, 2, 3, 4], lengths, 8) == [[0, 1], [2], [3, 4]]  # the third one is too long by itself
    assert cut([1, 4], lengths, 0) == [[1], [4]]
    assert cut([], lengths, 8) == []


def test_what_was_generated_is_counted_by_hand():
    def of(number, *answers, finished=(True,) * 4, **given):
        some = group(number, *(float(answer == "3") for answer in answers), lengths=(1, 2, 3, 4))
        scores = tuple(replace(score, parsed=answer) for score, answer in zip(some.scores, answers))
        completions = tuple(replace(c, finished=f) for c, f in zip(some.completions, finished))
        return replace(some, scores=scores, completions=completions, **given)

    groups = [
        of(0, "3", "3", "3", "3"),
        of(1, "3", "4", "5", None, finished=(True, True, True, False)),
        of(2, "4", "4", "4", "4", kept=(True, True, False, False), sources=("raw", "noisy") * 2, paid=(True,) * 4),
        of(3, "4", "4", "5", "5", kept=(False,) * 4),
    ]
    means = Means()
    tally(groups, means)
    assert means["solved_share"] == (1, 4)
    assert means["mixed_share"] == (1, 4)
    assert means["pass_at_n"] == (2, 4)  # all four of the first are right, and one of the second
    assert means["distinct_answers"] == (1 + 4 + 1 + 2, 4)
    assert means["accuracy"] == (4 + 1, 16)
    assert means["finished"] == (15, 16)
    assert means["tokens"] == (4 * (1 + 2 + 3 + 4), 16)
    assert means["noisy_share"] == (1, 4 + 4 + 2)  # of those that are kept
    assert means["paid_share"] == (2, 4 + 4 + 2)


@pytest.mark.parametrize("method", ["vppo", "roma", "dvrp", "vogue"])
def test_what_is_measured_changes_no_row_without_an_image(new_loader, config, mixed_data, method):
    chosen = (f"method={method}", "branch.rollout=raw", f"data.train={mixed_data}", "rollout.prompts=24")
    completions = (Completion((5, 6), (-1.0, -1.0), "", True),) * 2
    found = []
    for measures in ("trainer.measure_every=0", "trainer.measure_every=1"):
        loader = new_loader(*chosen, measures)
        given = {"scores": (Score(1.0, 1.0, 1.0, None),) * 2, "advantages": (1.0, -1.0)}
        groups = [group_of(item, completions, **given) for item in loader.items(0) if not item.views["raw"].shown]
        assert groups
        found.append([row.others for row in rows(dict(enumerate(groups)), config(*chosen, measures), 0, True)])
    assert not any(found[0]) and found[0] == found[1]
