"""Attention of rows that share a prompt, every way against a mask written out by its definition."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from vogue.model.attention import FLEX, PARTS, VARLEN, attention_inputs, boolean_mask, shared_prefix_attention
from vogue.model.packing import PAD
from vogue.model.varlen import flash, flash_backward, varlen_layout

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
@pytest.mark.parametrize("implementation", [PARTS, VARLEN])
def test_the_parts_give_the_output_and_gradients_of_the_whole_mask(name, dtype, error, implementation):
    segments = segments_of(ROWS[name])
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(segments), heads, segments.shape[1], 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    query, key, value = inputs
    layout = attention_inputs(implementation, segments, dtype)
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


def test_sequences_of_the_flash_calls_are_segments_and_then_completions_on_prompts():
    layout = varlen_layout(segments_of([(2, [3, 1]), (4, [1])]))  # the second row ends with a token of padding
    assert layout.own.queries.tolist() == layout.own.keys.tolist() == [0, 2, 5, 6, 10, 11, 12]
    assert (layout.own.longest_query, layout.own.longest_key, layout.own.causal) == (4, 4, True)
    assert layout.before.queries.tolist() == [0, 4, 5] and layout.completions.tolist() == [2, 3, 4, 5, 10]
    assert layout.before.keys.tolist() == [0, 2, 6] and layout.prompts.tolist() == [0, 1, 6, 7, 8, 9]
    assert (layout.before.longest_query, layout.before.longest_key, layout.before.causal) == (4, 4, False)
    assert layout.own.queries.dtype == layout.before.keys.dtype == torch.int32


def test_merging_in_bfloat16_errs_no_more_than_twice_what_one_softmax_does():
    segments = segments_of(ROWS["longer-than-the-kernels-blocks"])
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, segments.shape[1], 16)
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask, weights = by_definition(segments)[:, None], torch.randn(shape, generator=generator).transpose(1, 2)
    weights = weights.where((segments != PAD)[..., None, None], 0)

    def results(output, given):
        return [output, *torch.autograd.grad((weights * output).sum(), given)]

    truth = results(scaled_dot_product_attention(*exact, attn_mask=mask).transpose(1, 2), exact)
    plain = results(scaled_dot_product_attention(*inputs, attn_mask=mask).transpose(1, 2), inputs)
    layout = attention_inputs(VARLEN, segments, torch.bfloat16)
    ours = results(shared_prefix_attention(None, *inputs, None, **layout)[0], inputs)
    for a, b, c in zip(ours, plain, truth):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()


def test_the_flash_calls_are_taken_by_torch_as_they_are_made_on_a_gpu():
    layout = varlen_layout(segments_of([(3, [2, 1])]))
    with FakeTensorMode():  # shapes alone: torch checks and binds the arguments of tensors that no GPU holds
        query, key = (torch.empty(6, heads, 16, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        spans = layout.own._replace(
            **{x: torch.empty(4, dtype=torch.int32, device="cuda") for x in ("queries", "keys")}
        )
        out, lse = flash(query, key, key, spans, 0.25)
        grads = flash_backward(out, query, key, key, out, lse, spans, 0.25)
    assert out.shape == query.shape and (lse.shape, lse.dtype) == ((4, 6), torch.float32)
    assert [x.shape for x in grads] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize("implementation", [PARTS, VARLEN])
def test_padding_gets_nothing_and_is_finite(implementation):
    segments = segments_of([(2, [3]), (4, [1])])
    query = torch.randn(2, 1, segments.shape[1], 4)
    output, _ = shared_prefix_attention(
        None, query, query, query, None, **attention_inputs(implementation, segments, query.dtype)
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
