"""Logits that the forward pass keeps for the backward pass: exact, within their bytes, only where of use."""

import oracle
import pytest
import torch
from test_linear_stats import Case, assert_as_exact_as_plain, assert_branch_stats_as_exact_as_plain, evaluate
from test_operator import count_matrix_products, inputs, largest_allocation

import vogue_kernels
from vogue_kernels import IGNORE, linear_branch_stats, linear_logprob

ALL = 1 << 40  # bytes, more than there are


def float32_bytes(logits, backend):
    """What a backend keeps so many float32 logits in."""
    return logits * 5 // 2 if backend == "cpu" else logits * 4


CASES = [
    Case("normal", 37, 72, 1500, "bf16", 1.3, True),
    Case("normal", 70, 37, 1003, "f16", 0.7, True),
    *(Case(rows, 33, 72, 2051, "f32") for rows in ("peaked", "onehot", "huge")),
    *(Case(rows, 33, 72, 2051, "bf16") for rows in ("flat", "peaked", "onehot", "negative", "rising", "huge")),
    Case("onehot", 33, 72, 2051, "f16"),
]


@pytest.mark.parametrize("part", [0.6, 2], ids=["some", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_kept_logits_are_as_exact_as_plain_pytorch(case, part, backend):
    raw, noisy, weight, targets, bias = case.inputs()
    keep = int(part * case.n * case.v * weight.itemsize)

    def of_one(operator, **options):
        return lambda *leaves, **given: operator(*leaves, **given, **options)

    def of_both(operator, **options):  # without the divergences
        return lambda *leaves, **given: operator(*leaves, **given, **options)[:4]

    for of, name, hiddens in (of_one, "linear_logprob", [raw]), (of_both, "linear_branch_stats", [raw, noisy]):
        args = (hiddens, weight, targets, bias, case.temperature)
        truth = evaluate(of(getattr(oracle, name)), *args, dtype=torch.float64)
        plain = evaluate(of(getattr(oracle, name)), *args)
        options = dict(backend=backend, keep_logits_bytes=keep * len(hiddens))
        actual = evaluate(of(getattr(vogue_kernels, name), **options), *args)
        names = [*(f"grad hidden {i}" for i in range(len(hiddens))), "grad weight", "grad bias"]
        assert_as_exact_as_plain(actual[1], plain[1], truth[1], names)
    assert_branch_stats_as_exact_as_plain(case, backend, keep_logits_bytes=2 * keep)


def test_results_are_the_same_to_the_last_bit(backend):
    raw, noisy, weight, targets = inputs(n=9, v=3000, dtype=torch.bfloat16)
    for operator, hiddens in ((linear_logprob, [raw]), (linear_branch_stats, [raw, noisy])):
        plain = operator(*hiddens, weight, targets, backend=backend)
        for keep in (1, 40_000, ALL):
            kept = operator(*hiddens, weight, targets, backend=backend, keep_logits_bytes=keep)
            assert all(torch.equal(x, y) for x, y in zip(kept, plain))


def gradients_after_the_weight_changed(operator, hiddens, weight, targets, wanted, result=0, **options):
    """Gradients of the sum of one result, for which the backward pass finds −W in the place of W."""
    results = operator(*hiddens, weight, targets, **options)
    weight.data = -weight.data
    gradients = torch.autograd.grad(results[result].sum(), wanted)
    weight.data = -weight.data
    return gradients


@pytest.mark.parametrize("skipped", [0, 20])
def test_what_is_kept_is_not_computed_again(skipped, backend):
    # ∂W = ∂Lᵀ H reads W only where ∂L is computed again: with −W there, those rows come out wrong.
    hidden, _, weight, targets = inputs(n=40, v=4096)
    targets[:skipped] = IGNORE
    scored = 40 - skipped
    (expected,) = torch.autograd.grad(linear_logprob(hidden, weight, targets, backend="torch").logprob.sum(), weight)

    def kept_rows(keep):
        options = dict(backend=backend, keep_logits_bytes=keep)
        (found,) = gradients_after_the_weight_changed(linear_logprob, [hidden], weight, targets, weight, **options)
        right = (found - expected).abs().amax(1) <= 1e-4
        count = int(right.sum())
        assert right[:count].all(), "the first words of the vocabulary are kept"
        return count

    assert kept_rows(0) == 0
    assert kept_rows(ALL) == 4096
    half = float32_bytes(scored * 4096, backend) // 2
    assert 0 < kept_rows(half) <= 2048, "no more than there is room for"
    assert kept_rows(half) >= 2048 - 1024, "all tiles that there is room for, of 1,024 words at most"


def test_both_branches_share_the_bytes_and_one_that_is_not_trained_gets_none(backend):
    raw, noisy, weight, targets = inputs(n=6, v=4096)
    room = float32_bytes(6 * 4096, backend) + 6 * 64 * 4 + 16  # of one branch: logits, tiles, alignment
    options = dict(backend=backend, keep_logits_bytes=room)
    plain = linear_branch_stats(raw, noisy, weight, targets, backend=backend)
    (expected,) = torch.autograd.grad(plain.logprob_q.sum(), noisy)

    def found(result, trained):
        for x in (raw, noisy):
            x.requires_grad_(x is trained or trained is None)
        wanted = noisy if trained is None else trained
        args = linear_branch_stats, [raw, noisy], weight, targets, wanted, result
        return gradients_after_the_weight_changed(*args, **options)[0]

    # ∂H = ∂L W: with −W only the sign changes if all of ∂L is that of W.
    torch.testing.assert_close(found(1, trained=noisy), -expected)
    assert (found(1, trained=None) + expected).abs().max() > 1e-2


def test_a_divergence_of_a_kept_and_a_new_branch_has_the_gradient_of_two_new_ones(backend):
    raw, noisy, weight, targets = inputs(n=5, v=1500)
    bias = torch.randn(1500)
    raw = raw.detach()

    def gradient(**options):
        stats = linear_branch_stats(raw, noisy, weight, targets, bias, backend=backend, **options)
        return torch.autograd.grad(stats.symmetric_kl.sum() + stats.kl_pq.sum(), (noisy, weight))

    torch.testing.assert_close(gradient(keep_logits_bytes=ALL), gradient())


def test_nothing_is_kept_where_no_gradient_can_flow(backend):
    n = 60 if backend == "triton" else 600
    raw, noisy, weight, targets = inputs(n=n, d=4, v=20011)
    frozen = [x.detach() for x in (raw, noisy, weight)]
    everything = float32_bytes(n * 20011, backend)

    def allocated(*tensors):
        return largest_allocation(
            lambda: linear_branch_stats(*tensors, targets, backend=backend, keep_logits_bytes=ALL)
        )

    allocated(raw, noisy, weight)  # what is made once
    assert allocated(raw, noisy, weight) >= everything
    assert allocated(*frozen) <= everything / 10
    with torch.no_grad():
        assert allocated(raw, noisy, weight) <= everything / 10


@pytest.mark.parametrize("keep", [10_000, 100_000, 1_000_000])
def test_no_more_bytes_are_kept_than_were_given(keep, backend):
    raw, _, weight, targets = inputs(n=50, v=2000)
    kept = torch.ops.vogue.linear_logprob(raw, weight, targets, None, 1.0, backend, [keep])[-1]
    assert kept.nbytes <= min(keep, float32_bytes(50 * 2000, backend) * 1.07)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype, coded", [(torch.bfloat16, 1), (torch.float32, 2.5)], ids=["bf16", "f32"])
def test_how_much_memory_all_logits_take(softcap, dtype, coded, backend):
    n, vocab = 40, 4101
    hidden, _, weight, targets = inputs(n=n, v=vocab, dtype=dtype)
    saved = linear_logprob(hidden, weight, targets, softcap=softcap, backend=backend).logprob
    (expected,) = torch.autograd.grad(saved.sum(), weight)
    buffer = torch.ops.vogue.linear_logprob(hidden, weight, targets, None, 1.0, backend, [ALL], softcap)[-1]
    logit = coded if backend == "cpu" and softcap is None else dtype.itemsize
    assert buffer.nbytes <= n * vocab * logit * 1.07
    options = dict(softcap=softcap, backend=backend, keep_logits_bytes=buffer.nbytes)
    (found,) = gradients_after_the_weight_changed(linear_logprob, [hidden], weight, targets, weight, **options)
    # With −W the gradient of a word's logit would have another p, and so another row of ∂W.
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)


def test_one_product_less_is_computed_where_all_logits_are_kept():
    raw, _, weight, targets = inputs()
    logprob = linear_logprob(raw, weight, targets, backend="torch", keep_logits_bytes=ALL).logprob
    assert count_matrix_products(logprob.sum().backward) == 2  # ∂H and ∂W


@pytest.mark.parametrize("keep", [3000, ALL])
def test_the_operators_pass_opcheck_and_compile_when_they_keep(keep, backend):
    raw, noisy, weight, targets = inputs(v=1100)
    bias = torch.randn(1100, requires_grad=True)
    torch.library.opcheck(torch.ops.vogue.linear_logprob.default, (raw, weight, targets, bias, 0.7, backend, [keep]))
    both = (raw, noisy, weight, targets, bias, 0.7, backend, [0, keep])
    torch.library.opcheck(torch.ops.vogue.linear_branch_stats.default, both)

    def gradients(operator):
        return torch.autograd.grad(operator(raw, weight, targets).sum(), (raw, weight))

    def logprob(hidden, weight, targets):
        return linear_logprob(hidden, weight, targets, backend=backend, keep_logits_bytes=keep).logprob

    compiled = torch.compile(logprob, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(gradients(compiled), gradients(logprob))


def test_a_second_backward_pass_finds_what_the_first_one_did(backend):
    raw, _, weight, targets = inputs(v=1100)
    total = linear_logprob(raw, weight, targets, backend=backend, keep_logits_bytes=ALL).logprob.sum()
    first = torch.autograd.grad(total, (raw, weight), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(total, (raw, weight)), first))


@pytest.mark.parametrize("n", [0, 3])
def test_no_token_to_score_gives_zero_gradients(n, backend):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    stats = linear_logprob(hidden, weight, torch.full((n,), IGNORE), backend=backend, keep_logits_bytes=ALL)
    stats.logprob.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(n, 8)) and torch.equal(weight.grad, torch.zeros(50, 8))


def test_a_negative_number_of_bytes_is_refused():
    raw, _, weight, targets = inputs()
    with pytest.raises(ValueError, match="keep_logits_bytes must not be negative, got -1"):
        linear_logprob(raw, weight, targets, keep_logits_bytes=-1)
