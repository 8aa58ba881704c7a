import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue.method.branch import bonus_sign, draw, noisy_probability

granularities = st.sampled_from(["prompt", "response", "step"])


def test_the_noisy_share_falls_from_one_to_zero_and_stays_there():
    assert [noisy_probability(step, 200) for step in (0, 50, 150, 200, 300)] == [1.0, 0.75, 0.25, 0.0, 0.0]


def test_a_fixed_share_stays():
    assert [noisy_probability(step, 200, fixed=0.5) for step in (0, 200)] == [0.5, 0.5]
    assert noisy_probability(0, 200, fixed=0.0) == 0.0


@given(granularities, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_a_draw_has_the_shape_of_the_responses_and_depends_on_seed_and_step_alone(granularity, p, g, seed, step):
    first = draw(granularity, p, g, 0.5, seed, step)
    torch.rand(7)
    assert first.shape == (p, g)
    assert first.dtype == torch.bool
    assert torch.equal(first, draw(granularity, p, g, 0.5, seed, step))
    assert draw(granularity, p, g, 1.0, seed, step).all()
    assert not draw(granularity, p, g, 0.0, seed, step).any()


def test_granularity_says_what_shares_a_draw():
    by_prompt = draw("prompt", 64, 8, 0.5, seed=0, step=3)
    assert (by_prompt == by_prompt[:, :1]).all()
    assert by_prompt[:, 0].float().var() > 0
    by_response = draw("response", 64, 8, 0.5, seed=0, step=3)
    assert (by_response != by_response[:, :1]).any()
    steps = [draw("step", 4, 8, 0.5, seed=0, step=step) for step in range(20)]
    assert all(z.all() or not z.any() for z in steps)
    assert len({z[0, 0].item() for z in steps}) == 2


@pytest.mark.parametrize("granularity", ["prompt", "response", "step"])
def test_every_granularity_has_the_same_expectation(granularity):
    share = torch.stack([draw(granularity, 4, 4, 0.3, seed=1, step=step) for step in range(2000)]).float().mean()
    assert share == pytest.approx(0.3, abs=0.041)  # 4 standard deviations of 2000 draws


def test_neighbouring_seeds_and_steps_are_not_correlated():
    by_step = torch.stack([draw("response", 1, 1, 0.5, 0, step)[0, 0] for step in range(2000)]).float()
    by_seed = torch.stack([draw("response", 1, 1, 0.5, seed, 0)[0, 0] for seed in range(2000)]).float()
    for draws in (by_step, by_seed, (by_step == by_seed).float()):
        assert draws.mean() == pytest.approx(0.5, abs=0.045)  # 4 standard deviations
        assert torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1].abs() < 0.09


def test_the_bonus_turns_around_between_two_shares_of_the_run():
    assert [bonus_sign(step, 100, None) for step in (0, 50, 100)] == [1, 1, 1]
    signs = [bonus_sign(step, 100, (0.2, 0.6)) for step in (0, 20, 30, 40, 50, 60, 99)]
    assert signs == pytest.approx([1, 1, 0.5, 0, -0.5, -1, -1])
    assert [bonus_sign(step, 10, (0.5, 0.5)) for step in (4, 5, 6)] == [1, 1, -1]
