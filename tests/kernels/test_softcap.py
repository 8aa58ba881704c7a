"""Logits that are capped, l = c tanh(z / c): values and gradients against float64, by hand, and what is refused."""

import math
from functools import partial

import oracle
import pytest
import torch
from test_linear_stats import Case, assert_as_exact_as_plain, assert_branch_stats_as_exact_as_plain, evaluate
from test_operator import inputs

from vogue_kernels import BranchStats, GuidanceConfig, VogueLoss, linear_branch_stats, linear_logprob

ALL = 1 << 40  # bytes, more than there are

CASES = [
    (Case("normal", 37, 72, 1500, "bf16", 1.3, True), 3.0),
    (Case("normal", 70, 37, 1003, "f16", 0.7, True), 30.0),
    *((Case(rows, 33, 72, 2051, "f32"), 30.0) for rows in ("flat", "peaked", "onehot", "rising")),
    *((Case(rows, 33, 72, 2051, "bf16"), 2.0) for rows in ("flat", "peaked")),
    (Case("negative", 33, 72, 2051, "bf16"), 30.0),
    (Case("peaked", 33, 72, 2051, "f32", 0.5, True), 2.0),
]


@pytest.mark.parametrize("case, softcap", CASES, ids=str)
def test_capped_statistics_and_gradients_are_as_exact_as_plain_pytorch(case, softcap, backend):
    assert_branch_stats_as_exact_as_plain(case, backend, softcap)


@pytest.mark.parametrize("part", [0.6, 2], ids=["some", "all"])
@pytest.mark.parametrize(
    "case, softcap",
    [
        (Case("normal", 37, 72, 1500, "bf16", 1.3, True), 21.0),
        (Case("peaked", 33, 72, 2051, "bf16"), 16.0),
        *CASES[1:4],
    ],
    ids=str,
)
def test_gradients_of_kept_capped_logits_are_as_exact_as_plain_pytorch(case, softcap, part, backend):
    raw, noisy, weight, targets, bias = case.inputs()
    keep = int(part * case.n * case.v * weight.itemsize) * 2

    def without_divergences(operator, **options):
        return lambda *leaves, **given: operator(*leaves, **given, softcap=softcap, **options)[:4]

    args = ([raw, noisy], weight, targets, bias, case.temperature)
    truth = evaluate(without_divergences(oracle.linear_branch_stats), *args, dtype=torch.float64)
    plain = evaluate(without_divergences(oracle.linear_branch_stats), *args)
    options = dict(backend=backend, keep_logits_bytes=keep)
    actual = evaluate(without_divergences(linear_branch_stats, **options), *args)
    assert_as_exact_as_plain(actual[1], plain[1], truth[1], ["grad raw", "grad noisy", "grad weight", "grad bias"])
    assert_branch_stats_as_exact_as_plain(case, backend, softcap, keep_logits_bytes=keep)


def test_with_a_small_cap_nothing_is_kept(backend):
    raw, _, weight, targets = inputs()
    sizes = []

    def noted(tensor):
        sizes.append(tensor.nbytes if tensor.dtype == torch.uint8 else 0)
        return tensor

    for softcap, found in ((15.9, 0), (16.0, 6 * 50 * 4)):
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda x: x):
            sizes.clear()
            linear_logprob(raw, weight, targets, softcap=softcap, backend=backend, keep_logits_bytes=ALL)
        assert found <= max(sizes) <= 2 * found


def test_capped_results_equal_numbers_worked_out_by_hand(backend):
    # z = (½ ln 3, 0) and c = 1: tanh(½ ln 3) = (3 − 1) / (3 + 1) = ½, so that l = (½, 0). With τ = ½ that is (1, 0):
    # p = e / (e + 1), log p = −log(1 + 1 / e), and ∂log p / ∂z = (1 − p) (1 − ½²) / τ.
    hidden = torch.tensor([[0.5 * math.log(3)]], requires_grad=True)
    weight, target = torch.tensor([[1.0], [0.0]]), torch.tensor([0])
    stats = linear_logprob(hidden, weight, target, temperature=0.5, softcap=1.0, backend=backend)
    assert stats.logprob.item() == pytest.approx(-math.log(1 + math.exp(-1)), rel=1e-6)
    assert stats.lse.item() == pytest.approx(math.log(math.e + 1), rel=1e-6)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), hidden)
    assert gradient.item() == pytest.approx(0.75 * 2 / (math.e + 1), rel=1e-6)


@pytest.mark.parametrize("result", range(9), ids=BranchStats._fields[:9])
def test_each_capped_gradient_equals_finite_differences(result, monkeypatch):
    monkeypatch.setattr("vogue_kernels.reference.VOCAB_TILE", 7)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (5, 3), (17, 3), (17,))
    ]
    targets = torch.tensor([0, 16, -100, 8, 7])

    def scored(raw, noisy, weight, bias):
        return linear_branch_stats(raw, noisy, weight, targets, bias, 0.7, "torch", softcap=1.5)[result]

    assert torch.autograd.gradcheck(scored, leaves)


def test_a_scale_before_the_cap_is_another_softcap_and_temperature(backend):
    hidden, _, weight, targets = inputs()
    scaled = linear_logprob(3 * hidden, weight, targets, softcap=5.0, backend=backend)
    stats = linear_logprob(hidden, weight, targets, temperature=1 / 3, softcap=5.0 / 3, backend=backend)
    torch.testing.assert_close(stats, scaled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 10, 1000])
def test_identical_capped_branches_diverge_by_exactly_zero(scale, backend):
    hidden, weight = scale * torch.randn(9, 40), torch.randn(3001, 40)
    stats = linear_branch_stats(
        hidden, hidden.clone(), weight, torch.randint(3001, (9,)), softcap=30.0, backend=backend
    )
    for divergence in (stats.kl_pq, stats.kl_qp, stats.symmetric_kl):
        assert torch.equal(divergence, torch.zeros(9))


def test_logits_of_10000_are_the_cap(backend):
    """The few between −c and c have what rounding leaves of a float32 sum whose terms are 10,000."""
    raw, noisy, weight, targets, _ = Case("huge", 33, 72, 2051, "f32").inputs()
    stats = linear_branch_stats(raw, noisy, weight, targets, softcap=30.0, backend=backend)
    truth = oracle.linear_branch_stats(raw.double(), noisy.double(), weight.double(), targets, softcap=30.0)
    for result, true in zip(stats, truth, strict=True):
        torch.testing.assert_close(result.double(), true, rtol=1e-6, atol=0.01)


def test_a_cap_far_above_the_logits_changes_nothing_but_roundings(backend):
    hidden, noisy, weight, targets = inputs()
    capped = linear_branch_stats(hidden, noisy, weight, targets, softcap=1e6, backend=backend)
    torch.testing.assert_close(capped, linear_branch_stats(hidden, noisy, weight, targets, backend=backend))


def test_the_operators_pass_opcheck_and_compile_with_a_softcap(backend):
    raw, noisy, weight, targets = inputs()
    bias = torch.randn(50, requires_grad=True)
    rest = (weight, targets, bias, 0.7, backend)
    torch.library.opcheck(torch.ops.vogue.linear_logprob.default, (raw, *rest, [0], 3.0))
    torch.library.opcheck(torch.ops.vogue.linear_branch_stats.default, (raw, noisy, *rest, [0, 0], 3.0))

    def loss(raw, noisy, weight):
        stats = linear_branch_stats(raw, noisy, weight, targets, softcap=3.0, backend=backend)
        return stats.symmetric_kl.sum() + stats.logprob_p.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = raw, noisy, weight
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


def test_the_loss_is_that_of_capped_logits(backend):
    raw, noisy, weight, targets = inputs(dtype=torch.float32)
    advantages = torch.randn(6)
    loss_function = VogueLoss(GuidanceConfig(alpha_per=0.5), softcap=2.0, temperature=0.8, backend=backend)
    loss, metrics = loss_function(raw, weight, targets, advantages, hidden_other=noisy, noisy=True)
    doubles = [x.detach().double().requires_grad_() for x in (raw, weight)]
    stats = oracle.linear_branch_stats(doubles[0], noisy.detach().double(), doubles[1], targets, None, 0.8, 2.0)
    capped = advantages.double().abs() / 2
    shaped = advantages.double() + torch.minimum(capped, 0.4 * stats.entropy_p.detach())
    shaped = shaped + torch.minimum(capped, 0.5 * stats.symmetric_kl.detach())
    expected = torch.autograd.grad(-(shaped * stats.logprob_p).mean(), doubles)  # the ratio is 1
    assert metrics["u_per"].item() == pytest.approx(stats.symmetric_kl.mean().item(), rel=1e-5)
    found = torch.autograd.grad(loss, (raw, weight))
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, -30.0, math.nan, math.inf, 1e7])
def test_what_is_no_softcap_is_refused(softcap):
    raw, noisy, weight, targets = inputs()
    for call in (partial(linear_logprob, raw), partial(linear_branch_stats, raw, noisy)):
        with pytest.raises(ValueError, match=f"softcap must be from 1e-06 to 1e.06, got {softcap}; None leaves"):
            call(weight, targets, softcap=softcap)
