from itertools import combinations, product
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue.method.advantage import (
    deviation,
    group_advantages,
    mixed,
    over,
    over_tokens,
    passk_advantages,
    rloo_advantages,
)

groups = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8).map(lambda r: torch.tensor([r]))


def test_advantages_by_hand():
    # (1, 0, 0, 1): mean 1/2, sample variance 4·(1/4)/3 = 1/3, so A = ±(1/2)·√3 = ±0.8660254.
    # (0.1, 0.1, 1.0): mean 0.4, sample variance (0.09 + 0.09 + 0.36)/2 = 0.27, std 0.5196152,
    # A = −0.5773503, −0.5773503, 1.1547005.
    assert group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).tolist() == [
        pytest.approx([0.8660254, -0.8660254, -0.8660254, 0.8660254], abs=1e-5)
    ]
    assert group_advantages(torch.tensor([[0.1, 0.1, 1.0]])).tolist() == [
        pytest.approx([-0.5773503, -0.5773503, 1.1547005], abs=1e-5)
    ]


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[0.0, 1.0], [5.0, 3.0]])
    assert torch.equal(group_advantages(rewards)[0], group_advantages(rewards[:1])[0])
    assert group_advantages(rewards).sign().tolist() == [[-1, 1], [1, -1]]


def test_a_group_of_equals_has_exactly_no_advantage():
    for reward in (0.0, 0.1, 0.9, 1.0):
        assert (group_advantages(torch.full((2, 7), reward)) == 0).all()  # 7 · 0.1 / 7 is not 0.1 in float32


@given(groups)
def test_advantages_average_to_zero_and_keep_the_order(rewards):
    advantages = group_advantages(rewards)
    assert advantages.mean().abs() < 1e-3
    better = rewards[0][:, None] > rewards[0]
    assert (advantages[0][:, None] >= advantages[0])[better].all()


@given(groups)
def test_only_mixed_groups_have_an_advantage(rewards):
    assert mixed(rewards).item() == (len(set(rewards[0].tolist())) > 1)
    assert mixed(rewards).item() or (group_advantages(rewards) == 0).all()


def test_mixed_tells_the_groups_that_carry_a_gradient():
    accuracy = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert mixed(accuracy).tolist() == [False, True, False]


def test_groups_of_one_and_unfinite_rewards_are_refused():
    with pytest.raises(ValueError, match=r"rewards have shape \(3, 1\)"):
        group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="the reward of response 1 in group 0 is nan"):
        group_advantages(torch.tensor([[0.0, float("nan")]]))


@pytest.mark.parametrize("k", range(1, 7))
def test_passk_advantages_are_means_over_all_subsets_that_hold_a_response(k):
    subsets = list(combinations(range(6), k))
    for right in product((False, True), repeat=6):
        rewards = [float(any(right[i] for i in subset)) for subset in subsets]
        mean, std = fmean(rewards), pstdev(rewards)
        expected = [
            fmean((r - mean) / std for subset, r in zip(subsets, rewards) if i in subset) if std else 0.0
            for i in range(6)
        ]
        assert passk_advantages(torch.tensor([right]), k)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_at_k_1_passk_is_grpo_with_the_populations_deviation():
    right = torch.tensor([[True, False, False, True, False]])
    found = passk_advantages(right, 1)
    assert found.mean().abs() < 1e-6
    assert found.std(unbiased=False).item() == pytest.approx(1)


def test_a_k_that_no_group_has_is_refused():
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to the 2 responses"):
            passk_advantages(torch.tensor([[True, False]]), k)


def test_unscaled_and_leave_one_out_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.1, 0.1, 0.1, 0.1]])
    unscaled, left_out = group_advantages(rewards, scaled=False), rloo_advantages(rewards)
    assert unscaled[0].tolist() == pytest.approx([0.625, -0.375, -0.375, 0.125])  # the mean is 0.375
    # The others' means are 0.5/3, 1.5/3, 1.5/3 and 1/3.
    assert left_out[0].tolist() == pytest.approx([0.833333, -0.5, -0.5, 0.166667], abs=1e-6)
    assert unscaled[1].tolist() == left_out[1].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="must be"):
        rloo_advantages(torch.ones(1, 1))


def test_one_deviation_for_all_groups_by_hand_and_in_any_order():
    # 1, 0, 0, 1, 0.5, 0.5: mean 0.5, sample variance 4 · 0.25 / 5 = 0.2, std 0.4472136
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5]
    assert deviation(rewards) == pytest.approx(0.4472136)
    assert over(torch.tensor([0.5, -0.5]), deviation(rewards)).tolist() == pytest.approx([1.1180315, -1.1180315])
    generated = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    assert deviation(generated) == deviation(generated[::-1]) == deviation(generated[500:] + generated[:500])
    assert over(torch.zeros(2), deviation([0.1] * 7)).tolist() == [0, 0]


def test_ends_of_a_completion_have_a_larger_advantage_by_hand():
    assert over_tokens(2.0, 5, 0.3).tolist() == pytest.approx([2.6, 2.15, 2.0, 2.15, 2.6])
    assert over_tokens(-1.0, 4, 0.9).tolist() == pytest.approx([-1.9, -1.1, -1.1, -1.9])  # 0.9 / 9 between
    assert over_tokens(1.0, 1, 0.3).tolist() == pytest.approx([1.3])
    assert over_tokens(1.0, 2, 0.3).tolist() == pytest.approx([1.3, 1.3])
    assert over_tokens(1.0, 4001, 0.3).mean().item() == pytest.approx(1.1, abs=1e-4)  # 1 + 0.3 / 3


def test_without_a_shape_every_token_has_the_advantage_itself():
    assert torch.equal(over_tokens(0.1, 7, 0.0), torch.full((7,), 0.1))
