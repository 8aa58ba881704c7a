from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue.data import Sample
from vogue.inputs import Prompt, View
from vogue.model.packing import PAD, Row, collate, pack, spread
from vogue.rollout.engine import Completion
from vogue.step.loader import deal

NOTHING = View((), None, None)


def row(prompt_ids, *completions, advantages=None, others=(), weight=1.0):
    """A text-only row; a completion is (token ids, log-probabilities)."""
    ids = torch.tensor(prompt_ids)
    prompt = Prompt(Sample("?", "!", ()), (), ids, torch.zeros_like(ids))
    made = tuple(Completion(tuple(tokens), tuple(logprobs), "", True) for tokens, logprobs in completions)
    shaped = [torch.full((len(c.token_ids),), a) for c, a in zip(made, advantages or [0.0] * len(made))]
    return Row(prompt, {"raw": NOTHING, "noisy": NOTHING}, "raw", made, tuple(shaped), others, weight=weight)


def flat(length, compared=False):
    """A row of `length` tokens, one of them a completion's."""
    return row(range(length - 1), ((7,), (0.0,)), others=("noisy",) * compared)


lengths = st.lists(st.integers(2, 40), max_size=30)


@given(lengths, st.integers(1, 100))
def test_packing_loses_no_row_and_keeps_to_the_budget_with_padding(sizes, budget):
    rows = [flat(size) for size in sizes]
    packed = pack(rows, budget)
    assert sorted(id(r) for batch in packed for r in batch) == sorted(id(r) for r in rows)
    for batch in packed:
        assert len(batch) == 1 or max(r.tokens for r in batch) * len(batch) <= budget


@given(st.lists(st.integers(2, 400), max_size=60), st.integers(1, 2000))
def test_at_most_a_tenth_of_a_batch_is_padding_whatever_the_lengths(sizes, budget):
    for batch in pack([flat(size) for size in sizes], budget):
        real = sum(r.tokens for r in batch)
        assert max(r.tokens for r in batch) * len(batch) - real <= 0.1 * max(r.tokens for r in batch) * len(batch)


@given(lengths.filter(bool), st.integers(0, 5))
def test_spreading_makes_exactly_the_count_and_idles_only_for_want_of_rows(sizes, missing):
    rows = [flat(size) for size in sizes]
    packed = pack(rows, 50)
    spread_out = spread(packed, len(packed) + missing, replace(flat(2), weight=0.0))
    assert len(spread_out) == len(packed) + missing
    working = [batch for batch in spread_out if batch[0].weight]
    assert sorted(id(r) for batch in working for r in batch) == sorted(map(id, rows))
    idle = [r for batch in spread_out if not batch[0].weight for r in batch]
    assert len(idle) == max(0, len(spread_out) - len(rows))
    assert all(len(r.completions) == 1 for r in idle)


mixed = st.lists(st.tuples(st.integers(2, 40), st.booleans()), max_size=30)


@given(mixed, st.integers(1, 200))
def test_compared_rows_come_first_and_share_one_batch_at_most_with_others(sizes, budget):
    packed = pack([flat(*size) for size in sizes], budget)
    kinds = [r.compared for batch in packed for r in batch]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(len({r.compared for r in batch}) > 1 for batch in packed) <= 1


def test_compared_rows_and_others_of_one_length_share_a_batch():
    (batch,) = pack([flat(10), flat(10, True), flat(10), flat(10, True)], budget=40)
    assert [r.compared for r in batch] == [True, True, False, False]


@given(mixed.filter(lambda sizes: any(compared for _, compared in sizes)), st.integers(0, 5))
def test_every_part_of_a_compared_batch_has_compared_rows_first(sizes, missing):
    rows = [flat(*size) for size in sizes]
    packed = [batch for batch in pack(rows, 100) if batch[0].compared]
    spread_out = spread(packed, len(packed) + missing, replace(flat(2, True), weight=0.0))
    assert len(spread_out) == len(packed) + missing
    assert sum(len(batch) for batch in spread_out if batch[0].weight) == sum(map(len, packed))
    for batch in spread_out:
        kinds = [r.compared for r in batch]
        assert kinds == sorted(kinds, reverse=True)
        assert kinds[0]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=64), st.sampled_from([1, 2, 3, 8]))
def test_ranks_get_equally_many_prompts_and_nearly_equal_work(costs, ranks):
    costs = costs[: len(costs) // ranks * ranks]
    shares = deal(costs, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert {len(share) for share in shares} == {len(costs) // ranks}
    work = [sum(costs[i] for i in share) for share in shares]
    assert max(work) - min(work) <= max(costs, default=0)  # whatever the order they come in


def test_dealing_by_hand():
    assert deal([5, 1, 9, 3, 7, 2], 2) == [[2, 3, 5], [0, 1, 4]]  # 9, 3 and 2; 7, 5 and 1


def test_rows_of_similar_length_share_a_batch():
    packed = pack([flat(size) for size in (95, 40, 100, 44)], budget=200)
    assert [[r.tokens for r in batch] for batch in packed] == [[100, 95], [44, 40]]


def test_collating_by_hand():
    long = row([10, 11, 12], ((20, 21), (-0.5, -0.25)), ((30, 31, 32), (-1.0, -2.0, -3.0)), advantages=(1.5, -0.5))
    short = row([40, 41], ((50,), (-4.0,)), advantages=(2.0,))
    batch = collate([long, short], pad_id=99, token_mean=True)
    # The last token of a completion predicts nothing and isn't read, unless it is the only one.
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 30, 31], [40, 41, 50, 99, 99, 99]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 1, PAD, PAD, PAD]]
    # 20 is predicted where the prompt ends (2), 21 at 20's place (3); 30 where the prompt ends again, and so on.
    # The second row starts at 6: 50 is predicted at its position 1.
    assert batch.positions.tolist() == [2, 3, 2, 4, 5, 7]
    assert batch.targets.tolist() == [20, 21, 30, 31, 32, 50]
    assert batch.advantages.tolist() == [1.5, 1.5, -0.5, -0.5, -0.5, 2.0]
    assert batch.engine_logprob.tolist() == [-0.5, -0.25, -1.0, -2.0, -3.0, -4.0]
    assert batch.weights.tolist() == [1.0] * 6
    assert batch.others == ()


def test_a_sequence_mean_gives_each_completion_the_same_weight():
    rows = [row([1], ((2, 3, 4, 5), (0.0,) * 4), ((6, 7), (0.0,) * 2)), row([1], ((8, 9), (0.0,) * 2), weight=0.0)]
    assert collate(rows, 0, token_mean=False).weights.tolist() == [0.25] * 4 + [0.5] * 2 + [0.0] * 2
    assert collate(rows, 0, token_mean=True).weights.tolist() == [1.0] * 6 + [0.0] * 2


def test_images_of_a_batch_follow_the_order_of_its_rows():
    def view(value, grid):
        patches = grid[1] * grid[2]
        return View((f"image {value}",), torch.full((patches, 3), float(value)), torch.tensor([grid]))

    rows = [
        replace(row([1], ((2,), (0.0,)), others=("raw",)), views={"raw": raw, "noisy": behaviour}, trained="noisy")
        for behaviour, raw in [
            (view(1, (1, 2, 2)), view(5, (1, 2, 2))),
            (NOTHING, NOTHING),
            (view(3, (1, 2, 4)), view(7, (1, 2, 4))),
        ]
    ]
    batch = collate(rows, 0, token_mean=True)
    assert batch.images.pixel_values[:, 0].tolist() == [1.0] * 4 + [3.0] * 8
    assert batch.others[0].images.pixel_values[:, 0].tolist() == [5.0] * 4 + [7.0] * 8
    assert batch.images.sizes.tolist() == [[1, 2, 2], [1, 2, 4]]
    assert batch.images.order == (0, 1)


def test_advantages_and_completions_must_pair():
    with pytest.raises(ValueError, match="zip"):
        collate([replace(row([1], ((2,), (0.0,))), advantages=(torch.ones(1), torch.ones(1)))], 0, token_mean=True)
