"""Attention of rows that share a prompt, every way against a mask written out by its definition."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vogue.model.attention import FLEX, PARTS, attention_inputs, boolean_mask, shared_prefix_attention
from vogue.model.packing import PAD

ROWS = {
    "prompts-of-two-lengths": [(5, [2, 4]), (3, [3, 1, 1])],
    "equal-rows": [(4, [2, 2]), (4, [2, 2])],
    "one-token-each": [(1, [1]), (7, [5])],
    "longer-than-the-kernels-blocks": [(300, [40, 40, 40]), (290, [7, 90])],
}


def segments_of(rows):
    parts = [[0] * prompt + [i for i, n in enumerate(lengths, 1) for _ in range(n)] for prompt, lengths in rows]
    longest = max(map(len, parts))
    return torch.tensor([part + [PAD] * (longest - len(part)) for part in parts])


def by_definition(segments):
    """(B, L, L) bool, one pair of tokens at a time."""
    allowed = torch.zeros(*segments.shape, segments.shape[1], dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        for i, query in enumerate(row):
            for j, key in enumerate(row[: i + 1]):
                allowed[b, i, j] = key == query or (key == 0 and query != PAD)
    return allowed


def test_padding_has_a_row_to_attend_to_and_nothing_attends_to_it():
    allowed = boolean_mask(torch.tensor([[0, 0, 1, 1, 2, PAD]]))[0, 0]
    by_hand = [
        [1, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # first completion
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # the second one sees the prompt and itself, not the first
        [0, 0, 0, 0, 0, 1],  # padding
    ]
    assert allowed.int().tolist() == by_hand


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_parts_give_the_output_and_gradients_of_the_whole_mask(name, dtype, error):
    segments = segments_of(ROWS[name])
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(segments), heads, segments.shape[1], 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    query, key, value = inputs
    layout = attention_inputs(PARTS, segments, dtype)
    output, _ = shared_prefix_attention(None, query, key, value, None, 0.3, **layout)
    whole = scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        attn_mask=by_definition(segments)[:, None],
        scale=0.3,
    ).transpose(1, 2)
    real = (segments != PAD)[..., None, None]
    assert (output - whole).where(real, 0).abs().max() < error
    weights = torch.randn(output.shape, generator=generator, dtype=dtype).where(real, 0)
    ours = torch.autograd.grad((weights * output).sum(), inputs)
    theirs = torch.autograd.grad((weights * whole).sum(), inputs)
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < error * b.norm()


def test_padding_gets_nothing_and_is_finite():
    segments = segments_of([(2, [3]), (4, [1])])
    query = torch.randn(2, 1, segments.shape[1], 4)
    output, _ = shared_prefix_attention(
        None, query, query, query, None, **attention_inputs(PARTS, segments, query.dtype)
    )
    assert output.isfinite().all()


def test_the_block_mask_allows_what_the_boolean_one_does():
    for rows in ROWS.values():
        segments = segments_of(rows)
        block = attention_inputs(FLEX, segments, torch.float32)["attention_mask"]
        batch, length = segments.shape
        at = torch.arange(length)
        found = block.mask_mod(torch.arange(batch)[:, None, None], None, at[:, None], at)
        assert found.equal(by_definition(segments))
        assert block.shape == (batch, 1, length, length)


def test_dropout_is_refused():
    segments = segments_of([(2, [1])])
    query = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1"):
        shared_prefix_attention(
            None, query, query, query, None, dropout=0.1, **attention_inputs(PARTS, segments, query.dtype)
        )
