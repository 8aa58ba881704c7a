"""Which rank trains on which rows, and that it has them as the rank that generated them; also test_several_ranks.py."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue.data import DataError
from vogue.model.packing import pack, tokens_of
from vogue.step.balance import IDLE, IDLE_COMPARED, Load, balance, deal


def loads_of(*ranks, compared=()):
    """The loads of ranks whose rows have these tokens; those of `compared` (rank, number) are compared."""
    return [
        Load(rank, number, tokens, ("noisy",) if (rank, number) in compared else ())
        for rank, sizes in enumerate(ranks)
        for number, tokens in enumerate(sizes)
    ]


def told(share):
    """A rank's micro-batches as (rank, number) of their rows."""
    return [[load[:2] for load in micro_batch] for micro_batch in share]


def test_the_longest_of_all_rows_meet_by_hand():
    # Rank 0 has all long rows: alone it would take 90 + 80 + 70, while rank 1 waits.
    first, second = deal(loads_of([90, 80, 70], [20]), budget=100, ranks=2)
    # In order of size 90 80 | 70 20: rank 0 has generated both of the first two, the longer one stays there.
    assert told(first) == [[(0, 0)], [(0, 2)]]
    assert told(second) == [[(0, 1)], [(1, 0)]]
    # 90 + 70 is what the ranks take, of which rank 1 computes 80 + 20.
    assert balance([first, second]) == (90 + 70 + 80 + 20, 2 * (90 + 70))


def test_what_a_rank_generated_stays_with_it_where_sizes_allow():
    shares = deal(loads_of([50, 60], [60, 50]), budget=60, ranks=2)
    assert [told(share) for share in shares] == [[[(0, 1)], [(0, 0)]], [[(1, 0)], [(1, 1)]]]


def test_the_budget_is_lowered_where_that_leaves_less_waiting():
    # By a budget of 64, 16 x 4 | 16: the second rank would wait for the first one.
    first, second = deal(loads_of([16] * 5, [16]), budget=64, ranks=2)
    assert [len(micro_batch) for micro_batch in first + second] == [3, 3]


def test_compared_rows_come_first_and_in_equal_numbers():
    shares = deal(loads_of([40, 30], [20], compared={(0, 1)}), budget=40, ranks=2)
    # One compared row for two ranks: the other one computes an idle one meanwhile.
    assert told(shares[0]) == [[(0, 1)], [(0, 0)]]
    assert shares[1][0] == [IDLE_COMPARED]
    assert told(shares[1])[1:] == [[(1, 0)]]


def test_ranks_without_any_row_take_part_in_one_idle_forward():
    assert deal([], budget=100, ranks=3) == [[[IDLE]]] * 3
    assert balance([[[IDLE]]] * 3).count == 0


def test_one_rank_packs_by_its_budget_and_in_packings_order():
    loads = loads_of([30, 90, 40, 20], compared={(0, 3)})
    assert deal(loads, 100, 1) == [pack(loads, 100)]


SIZES = st.lists(st.lists(st.tuples(st.integers(2, 300), st.booleans()), max_size=12), min_size=2, max_size=5)


@given(SIZES, st.integers(1, 600))
def test_every_row_is_dealt_once_within_the_budget_and_ranks_stay_in_step(sizes, budget):
    loads = [Load(r, i, n, ("noisy",) * c) for r, mine in enumerate(sizes) for i, (n, c) in enumerate(mine)]
    shares = deal(loads, budget, len(sizes))
    dealt = [load for share in shares for micro_batch in share for load in micro_batch]
    assert sorted(load for load in dealt if load not in (IDLE, IDLE_COMPARED)) == sorted(loads)
    kinds = [[bool(micro_batch[0].others) for micro_batch in share] for share in shares]
    assert all(kind == kinds[0] == sorted(kinds[0], reverse=True) for kind in kinds)
    for share in shares:
        for micro_batch in share:
            longest = max(load.tokens for load in micro_batch)
            assert len(micro_batch) == 1 or longest * len(micro_batch) <= budget
    for slot in zip(*shares):  # of similar size, unless a rank has nothing left
        sizes_of_slot = [tokens_of(micro_batch) for micro_batch in slot]
        assert min(sizes_of_slot) > 0 or len(loads) < len(dealt)
    assert shares == deal(loads, budget, len(sizes))


def test_a_prompt_is_made_again_with_the_same_tokens_and_pixels(new_trainer):
    loader = new_trainer("branch.probability=0.5", "perturb.sigma=0.8", "rollout.rounds=2").loader
    for number in (0, 1):
        for item in loader.items(2, number):
            again = loader.again([item.origin], 2)[item.origin]
            assert again.number == item.number
            assert again.draws == item.draws
            assert torch.equal(again.prompt.token_ids, item.prompt.token_ids)
            assert again.views.keys() == item.views.keys()
            assert all(torch.equal(again.views[v].pixel_values, item.views[v].pixel_values) for v in item.views)


def test_what_stands_in_for_a_broken_sample_is_made_again_as_itself(new_trainer):
    loader = new_trainer("data.broken=skip").loader
    first = loader.items(0)[0]
    loader.samples = list(loader.samples)
    loader.samples[first.index] = replace(loader.samples[first.index], images=(b"not an image",))
    item = loader.items(0)[0]
    assert (item.skipped, item.index) == (1, (first.index + 1) % len(loader.samples))
    assert loader.again([item.origin], 0)[item.origin].prompt.sample == item.prompt.sample
    with pytest.raises(DataError, match="image 1 of 1"):
        loader.again([first.origin], 0)
