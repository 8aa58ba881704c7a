"""A head of its own for the second branch: values and gradients against float64, distillation, cost, refusals."""

import oracle
import pytest
import torch
from test_linear_stats import DTYPES, assert_as_exact_as_plain
from test_operator import count_matrix_products

from vogue_kernels import IGNORE, BranchStats, linear_branch_stats

ALL = 1 << 40  # bytes, more than there are


def heads(n=37, d=72, d_q=40, v=1503, dtype=torch.float32, biases=(True, True)):
    """(tensors by name, targets): hidden states and heads of two models that agree somewhat."""
    normal = torch.randn
    hidden, weight = normal(n, d), normal(v, d) / d**0.5
    tensors = {"hidden_p": hidden, "hidden_q": normal(n, d_q), "weight": weight, "weight_q": normal(v, d_q) / d_q**0.5}
    tensors |= {name: normal(v) for name, there in zip(("bias", "bias_q"), biases) if there}
    targets = torch.randint(v, (n,))
    targets[1] = IGNORE
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}, targets


def evaluate(operator, tensors, targets, results, dtype=None, **options):
    """(results, gradients of all tensors for fixed upstream gradients of some results), float64."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    stats = operator(**leaves, targets=targets, temperature=0.7, **options)
    upstream = torch.randn(len(stats), len(targets), generator=torch.Generator(targets.device).manual_seed(1))
    total = sum((stats[i] * upstream[i].to(stats[i].dtype)).sum() for i in results)
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return [x.detach().double() for x in stats], [x.double() for x in gradients]


EVERYTHING, NO_DIVERGENCE, OF_Q_ALONE = range(9), range(4), (1,)


@pytest.mark.parametrize(
    "dtype, results, softcap, keep",
    [
        ("f32", EVERYTHING, None, 0),
        ("bf16", EVERYTHING, 12.0, 0),
        ("f16", EVERYTHING, None, 0),
        ("f32", NO_DIVERGENCE, 12.0, 150_000),
        ("bf16", NO_DIVERGENCE, 12.0, 150_000),
        ("f16", NO_DIVERGENCE, None, 150_000),
        ("bf16", OF_Q_ALONE, None, 150_000),
        ("f32", OF_Q_ALONE, 12.0, 0),
    ],
)
def test_two_heads_are_as_exact_as_plain_pytorch(dtype, results, softcap, keep, backend):
    biases = (dtype != "f16", dtype != "bf16")
    tensors, targets = heads(dtype=DTYPES[dtype], biases=biases)
    args = tensors, targets, results
    truth = evaluate(oracle.linear_branch_stats, *args, dtype=torch.float64, softcap=softcap)
    plain = evaluate(oracle.linear_branch_stats, *args, softcap=softcap)
    options = dict(softcap=softcap, backend=backend, keep_logits_bytes=keep)
    actual = evaluate(linear_branch_stats, *args, **options)
    given = [tensors.get(name) for name in ("hidden_p", "hidden_q", "weight", "bias")]
    heads_q = tensors["weight_q"], tensors.get("bias_q")
    terms = oracle.divergence_terms(*given, 0.7, softcap, *heads_q).max().detach()
    values, gradients = zip(actual, plain, truth, strict=True)
    assert_as_exact_as_plain(*values, BranchStats._fields, lambda name, true: terms if "kl" in name else true)
    assert_as_exact_as_plain(*gradients, list(tensors), lambda name, true: max(true, terms))


@pytest.mark.parametrize("result", range(9), ids=BranchStats._fields[:9])
def test_each_gradient_of_two_heads_equals_finite_differences(result, monkeypatch):
    monkeypatch.setattr("vogue_kernels.reference.VOCAB_TILE", 7)
    tensors, targets = heads(5, 3, 4, 17, torch.float64)

    def scored(*leaves):
        named = dict(zip(tensors, leaves, strict=True))
        return linear_branch_stats(**named, targets=targets, temperature=0.7, backend="torch")[result]

    assert torch.autograd.gradcheck(scored, tuple(tensors.values()))


def test_one_head_given_twice_is_one_head(backend):
    tensors, targets = heads(d_q=72)
    hiddens, weight, bias = (tensors["hidden_p"], tensors["hidden_q"]), tensors["weight"], tensors["bias"]
    leaves = [*hiddens, weight, bias]
    found, expected = (
        linear_branch_stats(*hiddens, weight, targets, bias, backend=backend, **own)
        for own in (dict(weight_q=weight, bias_q=bias), {})
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    gradients = [torch.autograd.grad(sum(x.sum() for x in stats), leaves) for stats in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ["kl_pq", "kl_qp"], ids=["reverse", "forward"])
def test_distillation_has_the_gradients_of_float64_and_pays_for_the_student_alone(divergence, backend):
    tensors, targets = heads()
    for name in ("hidden_q", "weight_q", "bias_q"):
        tensors[name].requires_grad_(False)
    student = [tensors[name] for name in ("hidden_p", "weight", "bias")]
    loss = getattr(linear_branch_stats(**tensors, targets=targets, backend=backend), divergence).sum()
    found = torch.autograd.grad(loss, student)
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    log_p = (doubles["hidden_p"] @ doubles["weight"].T + doubles["bias"]).log_softmax(-1)
    log_q = (doubles["hidden_q"] @ doubles["weight_q"].T + doubles["bias_q"]).log_softmax(-1)
    kl = {"kl_pq": log_p.exp() * (log_p - log_q), "kl_qp": log_q.exp() * (log_q - log_p)}[divergence]
    expected = torch.autograd.grad(kl[targets != IGNORE].sum(), [doubles[n] for n in ("hidden_p", "weight", "bias")])
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "result, trained, expected",
    [
        ("kl_pq", "hidden_p weight", 4),  # both logits again, the student's two gradients
        ("kl_pq", "hidden_p hidden_q weight weight_q", 6),
        ("logprob_p", "hidden_p weight", 3),
        ("logprob_p", "hidden_q weight_q", 0),  # it doesn't depend on the other head
        ("logprob_q", "weight_q", 2),
    ],
)
def test_only_the_gradients_of_two_heads_that_are_asked_for_are_paid_for(result, trained, expected):
    tensors, targets = heads(v=900, biases=(False, False))  # one tile
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained.split())
    scored = getattr(linear_branch_stats(**tensors, targets=targets, backend="torch"), result).sum()
    assert count_matrix_products(scored.backward) == expected
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name in trained.split())


def test_a_head_that_no_result_depends_on_has_zero_gradients(backend):
    tensors, targets = heads()
    stats = linear_branch_stats(**tensors, targets=targets, backend=backend)
    gradients = torch.autograd.grad(stats.logprob_p.sum(), list(tensors.values()))
    for name, gradient in zip(tensors, gradients, strict=True):
        assert bool(gradient.any()) == (name in ("hidden_p", "weight", "bias")), name


def test_a_frozen_teachers_logits_are_not_kept(backend):
    tensors, targets = heads(n=9, v=4096)
    for name in ("hidden_q", "weight_q", "bias_q"):
        tensors[name].requires_grad_(False)
    everything = 9 * 4096 * 4
    # Without W in the backward pass, ∂W = ∂Lᵀ H is right only where ∂L comes from what was kept.
    stats = linear_branch_stats(**tensors, targets=targets, backend=backend, keep_logits_bytes=2 * everything)
    plain = linear_branch_stats(**tensors, targets=targets, backend=backend)
    (expected,) = torch.autograd.grad(plain.logprob_p.sum(), tensors["weight"])
    tensors["weight"].data = -tensors["weight"].data
    (found,) = torch.autograd.grad(stats.logprob_p.sum(), tensors["weight"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_reads_the_second_weight_anew(backend):
    tensors, targets = heads(biases=(False, False))
    stats = linear_branch_stats(**tensors, targets=targets, backend=backend)
    tensors["weight_q"].data = torch.zeros_like(tensors["weight_q"])  # as ZeRO-3 exchanges it
    (gradient,) = torch.autograd.grad(stats.logprob_q.sum(), tensors["hidden_q"])
    assert not gradient.any()


@pytest.mark.parametrize("keep", [[0, 0], [3000, ALL]], ids=["", "kept"])
def test_the_operator_passes_opcheck_and_compiles_with_two_heads(keep, backend):
    tensors, targets = heads(n=6, v=1100)
    p, q, w, w_q, b, b_q = tensors.values()
    torch.library.opcheck(
        torch.ops.vogue.linear_branch_stats.default, (p, q, w, targets, b, 0.7, backend, keep, 3.0, w_q, b_q)
    )
    torch.library.opcheck(
        torch.ops.vogue.linear_branch_stats.default, (p, q, w, targets, None, 0.7, backend, keep, None, w_q)
    )

    def loss(*leaves):
        stats = linear_branch_stats(**dict(zip(tensors, leaves)), targets=targets, backend=backend)
        return stats.symmetric_kl.sum() + stats.logprob_q.sum()

    leaves = list(tensors.values())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


def test_autocast_casts_both_heads(backend):
    tensors, targets = heads(n=9)
    tensors["weight_q"] = tensors["weight_q"].detach().bfloat16()  # beside a float32 weight, which autocast casts too
    with torch.autocast(targets.device.type, torch.bfloat16):
        stats = linear_branch_stats(**tensors, targets=targets, backend=backend)
    rounded = {name: x.detach().bfloat16().double() for name, x in tensors.items()}
    truth = oracle.linear_branch_stats(**rounded, targets=targets)
    torch.testing.assert_close(stats.kl_qp.double(), truth.kl_qp, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(weight_q=None), ValueError, "bias_q needs weight_q"),
        (dict(weight_q=torch.zeros(49, 6)), ValueError, r"weight_q must have the vocabulary of weight, 50 words, got"),
        (
            dict(weight_q=torch.zeros(0)),
            ValueError,
            r"weight_q must be \(V, D\) and not empty, got \(0,\); under ZeRO-3",
        ),
        (dict(weight_q=torch.zeros(50, 6).bfloat16()), TypeError, "weight_q must have the dtype of weight.*; cast one"),
        (dict(weight_q=torch.zeros(50, 6, device="meta")), ValueError, "weight_q must be on the device of weight, cpu"),
        (
            dict(weight_q=torch.zeros(50, 5)),
            ValueError,
            r"hidden_q must be \(3, 5\), got \(3, 6\), with weight_q \(50, 5\)",
        ),
        (
            dict(hidden_p=torch.zeros(3, 6)),
            ValueError,
            r"hidden_p must be \(3, 8\), got \(3, 6\), with weight \(50, 8\)",
        ),
        (dict(bias_q=torch.zeros(49)), ValueError, r"bias_q must be \(50,\), got \(49,\), with weight_q \(50, 6\)"),
        (dict(bias_q=torch.zeros(50).double()), TypeError, "bias_q must have the dtype of weight"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_second_head_that_does_not_fit_is_named(change, error, message):
    good = dict(hidden_p=torch.zeros(3, 8), hidden_q=torch.zeros(3, 6), weight=torch.zeros(50, 8))
    good |= dict(weight_q=torch.zeros(50, 6), bias_q=torch.zeros(50), targets=torch.tensor([0, 49, IGNORE]))
    linear_branch_stats(**good)
    with pytest.raises(error, match=message):
        linear_branch_stats(**good | change)
