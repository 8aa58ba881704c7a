"""Which samples a step trains on, on which rank, and their loading ahead."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue.data import DataError
from vogue.settings import ConfigError
from vogue.step.loader import sample_order

# ------------------------------------------------------------------------------------------------- loading ahead


def test_a_step_trains_on_what_was_loaded_ahead_and_that_is_what_it_would_load_itself(new_loader):
    loader = new_loader("branch.probability=0.5")
    for step in range(3):
        ahead, now = loader.load_ahead(step), loader.items(step)
        assert [item.number for item in ahead] == [item.number for item in now]
        for a, b in zip(ahead, now, strict=True):
            assert a.prompt.sample == b.prompt.sample
            assert a.draws == b.draws
            assert a.views.keys() == b.views.keys()
            assert all(torch.equal(a.views[name].pixel_values, b.views[name].pixel_values) for name in a.views)
        assert loader._ahead[0] == step + 1
    loader.load_ahead(3)  # the last of 4: nothing comes after it
    assert loader._ahead is None


def test_what_was_loaded_ahead_for_another_step_is_not_taken(new_loader):
    loader = new_loader()
    loader.load_ahead(0)  # and step 1
    assert [item.prompt.sample.place for item in loader.load_ahead(2)] == [
        item.prompt.sample.place for item in loader.items(2)
    ]


def test_what_is_loaded_ahead_sees_what_had_happened_when_the_step_before_began(new_loader):
    loader, seen = new_loader(), {}
    items = loader.items

    def look(step, number=0):
        seen[step] = dict(loader.state.settled)
        return items(step, number)

    loader.items = look
    for step in range(3):
        loader.state.current["done"] = step  # by the step before
        loader.load_ahead(step)
        loader.state.current["done"] = "more"  # while the next one is loaded
        loader._ahead[1].result()
    assert seen == {0: {}, 1: {"done": 0}, 2: {"done": 1}, 3: {"done": 2}}


def test_loading_ahead_takes_one_thread_and_leaves_the_others_to_training(new_loader):
    loader, threads = new_loader(), torch.get_num_threads()
    loader.load_ahead(0)
    assert loader._background.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == threads


def test_an_image_that_goes_missing_stops_the_step_that_needs_it_with_its_samples_name(new_loader):
    loader = new_loader()
    loader.samples = list(loader.samples)
    order = sample_order(len(loader.samples), 4, 4, 0)  # of step 1
    broken = loader.samples[order[2]]
    loader.samples[order[2]] = replace(broken, images=(Path("gone.png"),))
    loader.load_ahead(0)  # while step 1 is loaded
    with pytest.raises(DataError, match=f"{re.escape(broken.place)}: image 1 of 1 .*gone.png"):
        loader.load_ahead(1)


def test_a_broken_image_is_replaced_by_the_next_sample_where_that_is_asked_for(new_loader):
    loader = new_loader("data.broken=skip")
    loader.samples = list(loader.samples)
    order = sample_order(len(loader.samples), 0, 4, 0)
    lost = order[2]
    following = loader.samples[(lost + 1) % len(loader.samples)]
    loader.samples[lost] = replace(loader.samples[lost], images=(b"not an image",))
    items = loader.load_ahead(0)
    assert [item.skipped for item in items] == [0, 0, 1, 0]
    assert items[2].prompt.sample == following
    loader.samples[:] = [replace(sample, images=(b"not an image",)) for sample in loader.samples]
    with pytest.raises(DataError, match="no sample left that can be used"):
        loader.items(0)


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


def test_every_step_and_every_image_is_perturbed_anew(new_loader):
    loader = new_loader()
    sample = loader.samples[0]

    def noisy(step, number):
        return loader.item(sample, step, number, (True, True)).views["noisy"].pixel_values

    assert torch.equal(noisy(0, 0), noisy(0, 0))
    assert not torch.equal(noisy(0, 0), noisy(1, 0))
    assert not torch.equal(noisy(0, 0), noisy(0, 1))


def test_the_images_of_a_prompt_are_perturbed_each_by_itself(new_loader):
    loader = new_loader()
    image = loader.samples[0].images[0]
    twice = replace(loader.samples[0], problem="<image><image>Alike?", images=(image, image))
    views = loader.item(twice, 0, 0, (True, True)).views
    first, second = views["raw"].pixel_values.chunk(2)
    assert torch.equal(first, second)
    first, second = views["noisy"].pixel_values.chunk(2)
    assert not torch.equal(first, second)


def test_every_round_of_a_step_has_prompts_and_draws_of_its_own(new_loader):
    loader = new_loader("rollout.prompts=12", "rollout.rounds=2", "branch.probability=0.5")
    first, second = loader.items(0), loader.items(0, 1)
    assert [item.number for item in first + second] == list(range(24))
    assert {item.prompt.sample.place for item in first}.isdisjoint(item.prompt.sample.place for item in second)
    draws = [[item.draws[0] for item in items] for items in (first, second)]
    assert draws[0] != draws[1]  # twelve draws each: alike by chance once in 4,096
    again = [item.draws[0] for item in loader.items(1)]
    assert draws[0] != again


def test_ranks_share_a_steps_prompts_without_overlap(new_loader):
    def told(loader):
        return [(item.number, item.prompt.sample.place, item.draws) for item in loader.items(0)]

    alone = told(new_loader("branch.probability=0.5"))
    shared = [told(new_loader("branch.probability=0.5", rank=rank, ranks=2)) for rank in (1, 0)]
    assert sorted(shared[0] + shared[1]) == alone


def test_ranks_share_each_updates_prompts_so_that_their_work_is_alike(new_loader):
    work, numbers = [], []
    for rank in (0, 1):
        loader = new_loader("method=grpo", "rollout.prompts=8", "trainer.updates=2", rank=rank, ranks=2)
        loader.lengths = [10 + (7 * i) % 24 for i in range(len(loader.samples))]
        items = loader.items(0)
        numbers.append([item.number for item in items])
        lengths = {sample.place: length for sample, length in zip(loader.samples, loader.lengths)}
        work.append(sum(lengths[item.prompt.sample.place] for item in items))
    assert [sum(number < 4 for number in mine) for mine in numbers] == [2, 2]
    assert sorted(numbers[0] + numbers[1]) == list(range(8))
    assert abs(work[0] - work[1]) <= 24


def test_ranks_share_the_prompts_that_take_a_second_forward(new_loader):
    settings = "branch.probability=0.5", "rollout.prompts=8"
    loaders = [new_loader(*settings, rank=rank, ranks=2) for rank in (0, 1)]
    for step in range(10):
        counts = []
        for loader in loaders:
            loader.lengths = [10] * len(loader.samples)
            counts.append(sum(item.draws[0] for item in loader.items(step)))
        assert abs(counts[0] - counts[1]) <= 1


def test_prompts_that_ranks_cannot_share_are_refused(new_loader):
    with pytest.raises(ConfigError, match=r"rollout.prompts / trainer.updates = 2 .* 3 ranks"):
        new_loader("trainer.updates=2", ranks=3)
