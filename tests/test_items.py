"""Which samples a step trains on, on which rank, and their loading ahead."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue.data import DataError
from vogue.groups import sample_order
from vogue.settings import ConfigError
from vogue.trainer import _check_split

# ------------------------------------------------------------------------------------------------- loading ahead


def test_a_step_trains_on_what_was_loaded_ahead_and_that_is_what_it_would_load_itself(new_trainer):
    trainer = new_trainer("branch.probability=0.5")
    for trainer.step in range(3):
        ahead, now = trainer.items_ahead(), trainer.items(trainer.step)
        assert [item.number for item in ahead] == [item.number for item in now]
        for a, b in zip(ahead, now, strict=True):
            assert a.prompt.sample is b.prompt.sample
            assert a.draws == b.draws
            assert torch.equal(a.raw.pixel_values, b.raw.pixel_values)
            assert (a.noisy is None) == (b.noisy is None)
            assert a.noisy is None or torch.equal(a.noisy.pixel_values, b.noisy.pixel_values)
        assert trainer._ahead[0] == trainer.step + 1
    trainer.step = 3  # the last of 4: nothing comes after it
    trainer.items_ahead()
    assert trainer._ahead is None


def test_loading_ahead_takes_one_thread_and_leaves_the_others_to_training(new_trainer):
    trainer, threads = new_trainer(), torch.get_num_threads()
    trainer.run_step()
    assert trainer._background.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == threads


def test_an_image_that_goes_missing_stops_the_step_that_needs_it_with_its_samples_name(new_trainer):
    trainer = new_trainer()
    order = sample_order(len(trainer.samples), 4, 4, 0)  # of step 1
    broken = trainer.samples[order[2]]
    trainer.samples[order[2]] = replace(broken, images=(Path("gone.png"),))
    trainer.items_ahead()  # step 0, while step 1 is loaded
    trainer.step = 1
    with pytest.raises(DataError, match=f"{re.escape(broken.place)}: image 1 of 1 .*gone.png"):
        trainer.items_ahead()


# ----------------------------------------------------------------------------------------------------- data order


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 9))
def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own(size, count, seed):
    steps = 3 * size // count + 1
    order = [i for step in range(steps) for i in sample_order(size, step * count, count, seed)]
    for epoch in range(len(order) // size):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert order == sample_order(size, 0, steps * count, seed)  # however it is cut into steps


def test_seeds_and_epochs_shuffle_differently():
    assert sample_order(50, 0, 50, seed=0) != sample_order(50, 0, 50, seed=1)
    assert sample_order(50, 0, 50, seed=0) != sample_order(50, 50, 50, seed=0)


def test_ranks_share_a_steps_prompts_without_overlap(new_trainer):
    trainer = new_trainer("branch.probability=0.5")
    alone = [(item.number, item.prompt.sample.place, item.draws) for item in trainer.items(trainer.step)]
    shared = []
    for rank in (1, 0):
        other = copy.copy(trainer)
        other.rank, other.ranks = rank, 2
        shared += [(item.number, item.prompt.sample.place, item.draws) for item in other.items(other.step)]
    assert sorted(shared) == alone


def test_ranks_share_each_updates_prompts_so_that_their_work_is_alike(new_trainer):
    trainer = new_trainer("method=grpo", "rollout.prompts=8", "trainer.updates=2")
    trainer.lengths = [10 + (7 * i) % 24 for i in range(len(trainer.samples))]
    work, numbers = [], []
    for rank in (0, 1):
        other = copy.copy(trainer)
        other.rank, other.ranks = rank, 2
        items = other.items(other.step)
        numbers.append([item.number for item in items])
        lengths = {sample.place: length for sample, length in zip(trainer.samples, trainer.lengths)}
        work.append(sum(lengths[item.prompt.sample.place] for item in items))
    assert [sum(number < 4 for number in mine) for mine in numbers] == [2, 2]
    assert sorted(numbers[0] + numbers[1]) == list(range(8))
    assert abs(work[0] - work[1]) <= 24


def test_prompts_that_ranks_cannot_share_are_refused(config):
    with pytest.raises(ConfigError, match=r"rollout.prompts / trainer.updates = 2 .* 3 ranks"):
        _check_split(config("trainer.updates=2"), 3)
