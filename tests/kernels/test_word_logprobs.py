"""Log-probabilities of given words against float64, by the rule of test_linear_stats.py."""

import oracle
import pytest
import torch
from test_linear_stats import Case, assert_as_exact_as_plain
from test_operator import largest_allocation

from vogue_kernels import IGNORE, linear_logprob, linear_logprob_of, word_logprobs

CASES = [
    Case("normal", 7, 96, 32003, "f32"),
    Case("normal", 37, 72, 1500, "bf16", 1.3, True),
    Case("normal", 37, 72, 1500, "f16"),
    *(Case(rows, 33, 72, 2051, dtype) for rows in ("peaked", "flat", "onehot", "huge") for dtype in ("f32", "bf16")),
]


def some_words(targets, v, k=5):
    """(N, K): the target at a place that differs, two words again and again, others, and places without a word."""
    generator = torch.Generator(targets.device).manual_seed(2)
    chosen = torch.randint(v, (len(targets), k), generator=generator)
    chosen[:, 0], chosen[:, 1] = v - 1, 3
    chosen[torch.arange(len(targets)), torch.arange(len(targets)) % k] = targets
    chosen[1, 2:], chosen[-1, 0] = IGNORE, IGNORE
    return chosen


def plain(hidden, weight, chosen, bias, temperature):
    logp = oracle.logits(hidden, weight, bias, temperature).log_softmax(-1)
    return torch.where(chosen == IGNORE, 0.0, logp.gather(1, chosen.clamp(min=0)))


def evaluate(function, hidden, weight, chosen, bias, temperature, dtype=None):
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    result = function(leaves[0], leaves[1], chosen, leaves[2] if bias is not None else None, temperature)
    upstream = torch.randn(chosen.shape, generator=torch.Generator(chosen.device).manual_seed(1)).to(result.dtype)
    return [result.detach().double()], [x.double() for x in torch.autograd.grad(result, leaves, upstream)]


@pytest.mark.parametrize("chunk", [1 << 22, 200], ids=["one-chunk", "chunks-within-a-word"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_given_words_and_their_gradients_are_as_exact_as_plain_pytorch(case, chunk, backend, monkeypatch):
    monkeypatch.setattr(word_logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, _, weight, targets, bias = case.inputs()
    args = hidden, weight, some_words(targets, case.v), bias, case.temperature
    truth, naive = evaluate(plain, *args, dtype=torch.float64), evaluate(plain, *args)
    found = evaluate(lambda *a: linear_logprob_of(*a, backend), *args)
    values, gradients = zip(found, naive, truth, strict=True)
    assert (found[0][0] <= 0).all()
    assert_as_exact_as_plain(*values, ["log p"])
    assert_as_exact_as_plain(*gradients, ["grad hidden", "grad weight", "grad bias"])


@pytest.mark.parametrize("softcap", [3.0, 30.0])
def test_capped_logits_of_given_words_are_those_of_the_capped_softmax(softcap, backend):
    hidden, _, weight, targets, bias = Case("normal", 9, 48, 700, "f32", 1.3, True).inputs()
    chosen = some_words(targets, 700)

    def capped(hidden, weight, chosen, bias, temperature):
        logits = softcap * ((hidden @ weight.T + bias) / softcap).tanh() / temperature
        return torch.where(chosen == IGNORE, 0.0, logits.log_softmax(-1).gather(1, chosen.clamp(min=0)))

    args = hidden, weight, chosen, bias, 1.3
    truth = evaluate(capped, *args, dtype=torch.float64)
    found = evaluate(lambda *a: linear_logprob_of(*a, backend, softcap=softcap), *args)
    for values, expected in zip(found, truth, strict=True):
        for value, true in zip(values, expected, strict=True):
            assert (value - true).abs().max() <= 2e-6 * true.abs().max()


def test_a_flat_softmax_gives_every_word_its_share(backend):
    shape = torch.zeros(2, 3, 4), torch.zeros(8, 4), torch.tensor([[[0, 7], [3, 3], [5, IGNORE]], [[IGNORE] * 2] * 3])
    found = linear_logprob_of(*shape, backend=backend)
    third = -torch.log(torch.tensor(8.0))
    expected = [[[third, third], [third, third], [third, 0]], [[0, 0]] * 3]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_word_that_is_nearly_certain_is_in_doubt_by_as_much_as_it_should(backend):
    """log p = −log(1 + e^−10 + e^−64) = −4.5e-5, where a logit of 64 has an ulp of 8e-6."""
    hidden, weight = torch.tensor([[64.0]]), torch.tensor([[1.0], [54 / 64], [0.0]])
    found = linear_logprob_of(hidden, weight, torch.tensor([[2, 1, 0]]), backend=backend)
    logits = torch.tensor([0.0, 54.0, 64.0], dtype=torch.float64)
    expected = logits - 64 - torch.log1p(torch.exp(logits[:2] - 64).sum())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=6e-8)


def test_only_the_gradients_asked_for_are_computed(backend):
    hidden, weight, bias = torch.randn(4, 6), torch.randn(9, 6), torch.randn(9).requires_grad_()
    found = linear_logprob_of(hidden.requires_grad_(), weight, torch.randint(9, (4, 3)), bias, backend=backend)
    found.sum().backward()
    assert hidden.grad is not None and bias.grad is not None and weight.grad is None


def test_float64_stays_and_logits_can_be_kept():
    hidden, weight = torch.randn(4, 6).double().requires_grad_(), torch.randn(9, 6).double()
    chosen = torch.randint(9, (4, 3))
    found = linear_logprob_of(hidden, weight, chosen, temperature=0.5, keep_logits_bytes=1 << 20)
    expected = (hidden @ weight.T / 0.5).log_softmax(-1).gather(1, chosen)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(x.exp().sum(), hidden)[0] for x in (found, expected)))


def test_under_autocast_words_are_scored_as_by_the_operator(backend):
    hidden, weight, bias = torch.randn(4, 60), torch.randn(90, 60), torch.randn(90)
    chosen = torch.randint(90, (4, 3))
    with torch.autocast(weight.device.type, dtype=torch.bfloat16):
        found = linear_logprob_of(hidden, weight, chosen, bias, backend=backend)
        one_by_one = [linear_logprob(hidden, weight, x, bias, backend=backend).logprob for x in chosen.unbind(1)]
    torch.testing.assert_close(found, torch.stack(one_by_one, dim=1), rtol=1e-5, atol=1e-5)


def test_no_allocation_is_of_tokens_times_words_times_width(monkeypatch):
    n, k, d = 200, 64, 256
    monkeypatch.setattr(word_logprobs, "CHUNK_ELEMENTS", 1 << 14)
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(50, d, requires_grad=True)
    chosen = torch.randint(50, (n, k))
    assert largest_allocation(lambda: weight[chosen]) >= n * k * d * 4  # it does see one

    def step():
        linear_logprob_of(hidden, weight, chosen).sum().backward()

    assert largest_allocation(step) <= n * k * d * 4 / 10


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(words=torch.tensor([[0, 1], [2, 50]])), ValueError, r"words\[1, 1\] = 50 is outside \[0, 50\)"),
        (dict(words=torch.tensor([[0, -1], [2, 3]])), ValueError, r"words\[0, 1\] = -1 is outside .* only -100 marks"),
        (dict(words=torch.zeros(2, 0, dtype=torch.int64)), ValueError, r"at least one place for a word, got \(2, 0\)"),
        (dict(words=torch.zeros(2, 3)), TypeError, "must be integers, got torch.float32"),
        (dict(words=torch.zeros(3, 3, dtype=torch.int64)), ValueError, r"hidden must be \(3, 'D'\), got \(2, 8\)"),
        (dict(hidden=torch.zeros(2, 7)), ValueError, r"hidden must be \(0, 8\), got \(0, 7\), with weight \(50, 8\)"),
        (dict(bias=torch.zeros(49)), ValueError, r"bias must be \(50,\), got \(49,\)"),
        (dict(weight=torch.zeros(0)), ValueError, "under ZeRO-3 call the operator inside the forward of the module"),
        (dict(temperature=0), ValueError, "temperature must be positive"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_told(change, error, message):
    given = dict(hidden=torch.zeros(2, 8), weight=torch.zeros(50, 8), words=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(error, match=message):
        linear_logprob_of(**given | change)
