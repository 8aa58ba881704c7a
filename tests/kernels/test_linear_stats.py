"""Values and gradients of the operators against float64.

The rule: error ≤ 2 × the error of the plain same-dtype version, + 4 ulp for where the plain one happens to be exact.
The ulp is float32's at the largest true value; for a KL at Σ p |log p − log q|, the size of the terms that cancel in
it; for a gradient, in which these terms are multiplied by the weight or the hidden states, at that product if larger.
"""

from dataclasses import dataclass
from functools import partial

import oracle
import pytest
import torch

from vogue_kernels import IGNORE, BranchStats, LogprobStats, linear_branch_stats, linear_logprob, reference
from vogue_kernels.branches import Head

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
GRADIENTS = ("grad weight", "grad bias")


@dataclass(frozen=True)
class Case:
    rows: str
    n: int
    d: int
    v: int
    dtype: str
    temperature: float = 1.0
    bias: bool = False

    def __str__(self):
        name = f"{self.rows}-N{self.n}-D{self.d}-V{self.v}-{self.dtype}"
        return name + (f"-T{self.temperature}" if self.temperature != 1 else "") + ("-bias" if self.bias else "")

    def inputs(self):
        """(hidden_p, hidden_q, weight, targets, bias), of a model's scale unless `rows` says otherwise."""
        generator = torch.Generator(torch.get_default_device()).manual_seed(self.n * self.v + self.d)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        raw, weight = normal(self.n, self.d), normal(self.v, self.d) / self.d**0.5
        noisy = raw + 0.3 * normal(self.n, self.d)
        targets = torch.randint(self.v, (self.n,), generator=generator)
        edges = torch.tensor([self.v - 1, 0, 1024, 1023])[: self.n]  # of the vocabulary and of tiles
        targets[: len(edges)] = edges % self.v
        if self.rows == "flat":
            raw, noisy = 1e-4 * raw, 1e-4 * noisy
        elif self.rows == "peaked":
            raw, noisy = 8 * raw, 8 * noisy
        elif self.rows == "onehot":  # hidden = 200 × a row of unit norm: that entry leads by some 100 nats
            weight = weight / weight.norm(dim=1, keepdim=True)
            raw = 200 * weight[targets]
            noisy = 200 * weight[targets.roll(1)]
        elif self.rows == "negative":  # a tail masked with 0 instead of −inf would win here
            raw, noisy, weight = raw.abs() + 3, noisy.abs() + 3, -weight.abs() - 0.2
        elif self.rows == "rising":  # along the vocabulary, not equally in both branches: each tile moves both maxima
            raw[:, 0], noisy[:, 0], weight[:, 0] = 12, 7, torch.linspace(0, 1, self.v)
        elif self.rows == "huge":
            scale = 1e4 / (raw @ weight.t()).abs().max()
            raw, noisy = scale * raw, scale * noisy
        bias = normal(self.v) if self.bias else None
        dtype = DTYPES[self.dtype]
        return raw.to(dtype), noisy.to(dtype), weight.to(dtype), targets, bias if bias is None else bias.to(dtype)


CASES = [
    Case("normal", 7, 96, 32003, "f32"),
    Case("normal", 7, 96, 32003, "bf16"),
    Case("normal", 7, 96, 32003, "f16"),
    Case("normal", 1, 100, 32003, "f32"),
    Case("normal", 3, 33, 151936, "f32"),
    Case("normal", 3, 16, 152063, "bf16"),
    Case("normal", 2, 16, 152064, "f32"),
    Case("normal", 1100, 24, 515, "f32", 0.7, True),
    Case("normal", 37, 72, 1500, "bf16", 1.3, True),
    Case("normal", 70, 37, 1003, "bf16"),  # pairs of elements, and one without a partner
    *(Case(rows, 33, 72, 2051, "f32") for rows in ("flat", "peaked", "onehot", "negative", "rising", "huge")),
    *(Case(rows, 33, 72, 2051, "bf16") for rows in ("flat", "peaked", "onehot", "negative", "rising", "huge")),
]


def evaluate(operator, hiddens, weight, targets, bias, temperature, dtype=None):
    """(results, gradients of hiddens, weight and bias for fixed upstream gradients), all float64."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (*hiddens, weight, bias) if x is not None]
    split = len(hiddens)
    results = operator(*leaves[:split], leaves[split], targets, *leaves[split + 1 :], temperature=temperature)
    generator = torch.Generator(targets.device).manual_seed(1)
    scored = [result for result in results if result.requires_grad]
    upstream = [torch.randn(len(targets), generator=generator).to(result.dtype) for result in scored]
    gradients = torch.autograd.grad(scored, leaves, upstream)
    return [result.detach().double() for result in results], [gradient.double() for gradient in gradients]


def assert_as_exact_as_plain(actual, plain, truth, names, size=lambda name, true: true):
    for ours, theirs, true, name in zip(actual, plain, truth, names, strict=False):
        assert ours.shape == true.shape
        error, plain_error = (ours - true).abs().max(), (theirs - true).abs().max()
        allowed = 2 * plain_error + 4 * torch.finfo(torch.float32).eps * size(name, true.abs().max())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, plain {plain_error:.2e}"


def assert_branch_stats_as_exact_as_plain(case, backend, softcap=None, **options):
    naive = partial(oracle.linear_branch_stats, softcap=softcap)
    options |= {"softcap": softcap}
    raw, noisy, weight, targets, bias = case.inputs()
    args = ([raw, noisy], weight, targets, bias, case.temperature)
    truth = evaluate(naive, *args, dtype=torch.float64)
    plain = evaluate(naive, *args)
    actual = evaluate(lambda *a, **k: linear_branch_stats(*a, **k, backend=backend, **options), *args)
    terms = oracle.divergence_terms(raw, noisy, weight, bias, case.temperature, softcap).max()
    values, gradients = zip(actual, plain, truth, strict=True)
    assert_as_exact_as_plain(*values, BranchStats._fields, lambda name, true: terms if "kl" in name else true)
    largest = {"grad weight": max(raw.abs().max(), noisy.abs().max()), "grad bias": 1}
    assert_as_exact_as_plain(
        *gradients,
        ("grad raw", "grad noisy", *GRADIENTS),
        lambda name, true: max(true, terms * largest.get(name, weight.abs().max())),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_branch_stats_and_gradients_are_as_exact_as_plain_pytorch(case, backend):
    assert_branch_stats_as_exact_as_plain(case, backend)


@pytest.mark.parametrize("case", CASES[:11], ids=str)
def test_logprob_and_gradients_are_as_exact_as_plain_pytorch(case, backend):
    raw, _, weight, targets, bias = case.inputs()
    args = ([raw], weight, targets, bias, case.temperature)
    truth = evaluate(oracle.linear_logprob, *args, dtype=torch.float64)
    plain = evaluate(oracle.linear_logprob, *args)
    actual = evaluate(lambda *a, **k: linear_logprob(*a, **k, backend=backend), *args)
    values, gradients = zip(actual, plain, truth, strict=True)
    assert_as_exact_as_plain(*values, LogprobStats._fields)
    assert_as_exact_as_plain(*gradients, ("grad hidden", *GRADIENTS))


@pytest.mark.parametrize("rows", ["peaked", "flat", "onehot"])
def test_single_rows_are_as_exact_as_plain_pytorch(rows, backend):
    """One token's logits are where plain PyTorch is most exact: dot products, which are summed in many short parts.

    The largest error of many draws is compared, since in one draw the plain version may be right by luck.
    """
    drawn = []
    for seed in range(40):
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        hidden, weight = torch.randn(1, 80, generator=generator), torch.randn(1000, 80, generator=generator) / 80**0.5
        targets = torch.randint(1000, (1,), generator=generator)
        if rows == "onehot":
            hidden = 60 * weight[targets]
        hidden = {"peaked": 6, "flat": 1e-4, "onehot": 1}[rows] * hidden
        truth = oracle.linear_logprob(hidden.double(), weight.double(), targets)
        plain = oracle.linear_logprob(hidden, weight, targets)
        drawn.append((linear_logprob(hidden, weight, targets, backend=backend), plain, truth))
    ours, plain, truth = ([torch.cat(parts).double() for parts in zip(*stats, strict=True)] for stats in zip(*drawn))
    assert_as_exact_as_plain(ours, plain, truth, LogprobStats._fields)


def test_results_equal_numbers_worked_out_by_hand(backend):
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), from logits log p and log q: hidden selects a row of them.
    # H(p) = ½ ln 2 + 2 · ¼ ln 4 = 1.5 ln 2. KL(p‖q) = ½ ln 2 + ¼ ln ½ + 0 = ¼ ln 2, and KL(q‖p) the same.
    weight = torch.tensor([[0.5, 0.25], [0.25, 0.5], [0.25, 0.25]]).log()
    raw, noisy = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    stats = linear_branch_stats(raw, noisy, weight, torch.tensor([1]), backend=backend)
    ln2 = 0.6931471805599453
    expected = [-2 * ln2, -ln2, 1.5 * ln2, 1.5 * ln2, ln2 / 4, ln2 / 4, ln2 / 4, 0, 0, -ln2, -ln2]
    torch.testing.assert_close(torch.cat(stats), torch.tensor(expected), rtol=0, atol=3e-7)


def test_flat_rows_have_the_entropy_of_the_uniform_distribution(backend):
    stats = linear_logprob(torch.zeros(2, 8), torch.randn(1000, 8), torch.tensor([0, 999]), backend=backend)
    ln1000 = 6.907755278982137
    torch.testing.assert_close(stats.entropy, torch.full((2,), ln1000), rtol=3e-7, atol=0)
    torch.testing.assert_close(stats.logprob, torch.full((2,), -ln1000), rtol=3e-7, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_target_is_the_likeliest_token_exactly_where_its_logprob_is_the_highest(temperature, backend):
    hidden, weight = torch.randn(200, 24), torch.randn(3001, 24)
    likeliest = (hidden @ weight.t()).argmax(1)
    targets = torch.where(torch.arange(200) % 3 == 0, likeliest, torch.randint(3001, (200,)))
    alone = linear_logprob(hidden, weight, targets, temperature=temperature, backend=backend)
    both = linear_branch_stats(hidden, hidden.flip(0), weight, targets, temperature=temperature, backend=backend)
    for logprob, top in ((alone.logprob, alone.top_logprob), (both.logprob_p, both.top_logprob_p)):
        assert torch.equal(logprob == top, targets == likeliest)
        assert not top.requires_grad


def test_the_log_of_the_sum_alone_has_the_softmax_as_its_gradient(backend):
    hidden, weight, targets = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8), torch.randint(40, (5,))
    stats = linear_logprob(hidden, weight, targets, temperature=0.5, backend=backend)
    torch.testing.assert_close(stats.lse, (hidden @ weight.t() / 0.5).logsumexp(1))
    (gradient,) = torch.autograd.grad((stats.lse**2).sum(), hidden)  # a z-loss
    probabilities = (hidden @ weight.t() / 0.5).softmax(1)
    torch.testing.assert_close(gradient, 2 * stats.lse[:, None] * (probabilities @ weight) / 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 10, 1000])
def test_identical_branches_diverge_by_exactly_zero(dtype, scale, backend):
    hidden, weight = (scale * torch.randn(9, 40)).to(DTYPES[dtype]), torch.randn(3001, 40).to(DTYPES[dtype])
    stats = linear_branch_stats(hidden, hidden.clone(), weight, torch.randint(3001, (9,)), backend=backend)
    for divergence in (stats.kl_pq, stats.kl_qp, stats.symmetric_kl):
        assert torch.equal(divergence, torch.zeros(9))
    assert torch.equal(stats.logprob_p, stats.logprob_q)


def test_divergences_and_entropies_are_never_negative(backend):
    raw, weight = torch.randn(500, 16), torch.randn(2000, 16)
    for distance in (0.0, 1e-7, 1e-6, 1e-5, 1e-4):
        noisy = raw + distance * torch.randn_like(raw)
        stats = linear_branch_stats(raw, noisy, weight, torch.randint(2000, (500,)), backend=backend)
        for result in stats[2:7]:
            assert (result >= 0).all()


def test_skipped_targets_give_zeros_and_no_gradient_even_when_their_hidden_states_are_nan(backend):
    raw, noisy, weight = torch.randn(6, 8), torch.randn(6, 8), torch.randn(50, 8)
    targets = torch.tensor([3, IGNORE, 4, 5, IGNORE, 6])
    skipped = targets == IGNORE
    raw[skipped], noisy[skipped] = torch.nan, torch.nan
    leaves = [raw.requires_grad_(), noisy.requires_grad_(), weight.requires_grad_()]
    stats = linear_branch_stats(*leaves, targets, backend=backend)
    for result in stats:
        assert torch.equal(result[skipped], torch.zeros(2))
    gradients = torch.autograd.grad(sum(result.sum() for result in stats), leaves)
    for gradient in gradients[:2]:
        assert torch.equal(gradient[skipped], torch.zeros(2, 8))

    kept = [x.detach()[~skipped].requires_grad_() for x in leaves[:2]] + [leaves[2]]
    alone = linear_branch_stats(*kept, targets[~skipped], backend=backend)
    expected = torch.autograd.grad(sum(result.sum() for result in alone), kept)
    torch.testing.assert_close(gradients[0][~skipped], expected[0])
    torch.testing.assert_close(gradients[2], expected[2])


@pytest.mark.parametrize("n", [0, 3])
def test_no_token_to_score_gives_zeros_and_zero_gradients(n, backend):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    stats = linear_logprob(hidden, weight, torch.full((n,), IGNORE), backend=backend)
    assert torch.equal(stats.logprob, torch.zeros(n))
    stats.logprob.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(n, 8)) and torch.equal(weight.grad, torch.zeros(50, 8))


def test_non_contiguous_inputs_give_the_results_of_contiguous_ones(backend):
    raw, noisy = torch.randn(8, 11).t(), torch.randn(11, 16)[:, ::2]
    weight, targets = torch.randn(8, 300).t(), torch.randint(300, (22,))[::2]
    views = [x.requires_grad_() for x in (raw, noisy, weight)]
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    stats = linear_branch_stats(*views, targets, backend=backend)
    expected = linear_branch_stats(*copies, targets.contiguous(), backend=backend)
    torch.testing.assert_close(stats, expected)
    torch.testing.assert_close(
        torch.autograd.grad(sum(r.sum() for r in stats), views),
        torch.autograd.grad(sum(r.sum() for r in expected), copies),
    )


def test_a_tied_weight_gets_the_gradients_of_both_its_uses(backend):
    tokens, targets = torch.randint(40, (6,)), torch.randint(40, (6,))
    weight = torch.randn(40, 8, requires_grad=True)
    stats = linear_logprob(weight[tokens], weight, targets, backend=backend)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), weight)
    double = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.linear_logprob(double[tokens], double, targets).logprob.sum(), double)
    torch.testing.assert_close(gradient, expected.float())


@pytest.mark.parametrize("tile", [(1 << 20, 1024), (21, 7)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("result", range(9), ids=BranchStats._fields[:9])
def test_each_gradient_equals_finite_differences(result, tile, monkeypatch):
    monkeypatch.setattr("vogue_kernels.reference.TILE_ELEMENTS", tile[0])
    monkeypatch.setattr("vogue_kernels.reference.VOCAB_TILE", tile[1])
    raw, noisy, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (5, 3), (17, 3), (17,))
    )
    targets = torch.tensor([0, 16, IGNORE, 8, 7])

    def scored(*leaves):
        return linear_branch_stats(*leaves[:3], targets, leaves[3], 0.7, backend="torch")[result]

    assert torch.autograd.gradcheck(scored, (raw, noisy, weight, bias))


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_the_references_weight_gradient_is_the_sum_over_all_batches_of_tokens(batches, monkeypatch):
    vocab, rows = 17, 6 // batches
    monkeypatch.setattr("vogue_kernels.reference.TILE_ELEMENTS", rows * vocab)
    hidden = torch.randn(6, 3, dtype=torch.float64)
    assert len(reference._blocks(torch.empty(6), [Head(torch.empty(vocab, 3), None)])) == batches
    targets, given, gradients = torch.randint(vocab, (6,)), torch.randn(6), []
    weight = torch.randn(vocab, 3, dtype=torch.float64, requires_grad=True)
    for operator in (partial(linear_logprob, backend="torch"), oracle.linear_logprob):
        logprob = operator(hidden, weight, targets).logprob
        gradients += torch.autograd.grad((given * logprob).sum(), weight)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("result", [0, 1, 2], ids=LogprobStats._fields[:3])
def test_each_gradient_of_one_branch_equals_finite_differences(result):
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (17, 3), (17,))
    )
    targets = torch.tensor([0, 16, IGNORE, 8, 7])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, targets, b, 0.7, backend="torch")[result], (hidden, weight, bias)
    )
