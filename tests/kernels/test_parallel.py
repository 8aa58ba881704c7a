"""A vocabulary spread over two real ranks has the whole one's results and gradients, by test_linear_stats.py's rule."""

from functools import partial

import oracle
import pytest
import torch
import torch.distributed as dist
from test_linear_stats import GRADIENTS, Case, assert_as_exact_as_plain, evaluate

from vogue_kernels import IGNORE, BranchStats, LogprobStats, vocab_parallel_branch_stats, vocab_parallel_logprob

RANKS = 2
CASES = [
    Case("normal", 7, 96, 32003, "f32"),
    Case("normal", 7, 96, 32003, "bf16"),
    Case("normal", 1, 100, 2051, "f32", 0.7, True),
    Case("normal", 70, 37, 1003, "bf16", 1.3, True),
    *(Case(rows, 33, 72, 2051, "f32") for rows in ("flat", "peaked", "onehot", "negative", "rising", "huge")),
    *(Case(rows, 33, 72, 2051, "bf16") for rows in ("flat", "peaked", "onehot")),
]
BOTH, ONE = partial(vocab_parallel_branch_stats, group=None), partial(vocab_parallel_logprob, group=None)


def of_rank(rank, *tensors):
    """This rank's rows: the first has a third of the vocabulary, in which the edges of tiles lie otherwise."""
    shards = ((0, len(tensors[0]) // 3), (len(tensors[0]) // 3, len(tensors[0])))
    return [None if x is None else x[slice(*shards[rank])] for x in tensors]


def small(v=60):
    return torch.randn(6, 8), torch.randn(6, 8), torch.randn(v, 8), torch.tensor([0, 19, IGNORE, 20, 59, 33])


def cases(rank):
    found = {}
    for case in CASES:
        raw, noisy, weight, targets, bias = case.inputs()
        weight, bias = of_rank(rank, weight, bias)
        rest = weight, targets, bias, case.temperature
        found[str(case)] = evaluate(BOTH, [raw, noisy], *rest), evaluate(ONE, [raw], *rest)
    return found


def skipped(rank):
    """The same tokens in two dimensions, some of them skipped."""
    raw, noisy, weight, targets = (x.view(2, 3, -1).squeeze(-1) if len(x) == 6 else x for x in small())
    (weight,) = of_rank(rank, weight)
    leaves = [x.requires_grad_() for x in (raw, noisy, weight)]
    results = BOTH(*leaves, targets)
    gradients = torch.autograd.grad(results.kl_pq.sum() + results.logprob_p.sum(), leaves)
    shifted = ONE(raw, weight, torch.full((2, 3), 5), shift=True, ignore_index=5)
    return [x.detach() for x in results], gradients, [x.detach() for x in shifted]


def empty(rank):
    """No tokens, or none that count: gradients are there all the same."""
    raw, noisy, weight, targets = small()
    (weight,) = of_rank(rank, weight.requires_grad_())
    found = []
    for rows, words in ((slice(0), targets[:0]), (slice(None), torch.full_like(targets, IGNORE))):
        hidden = raw[rows].clone().requires_grad_()
        results = BOTH(hidden, noisy[rows], weight, words)
        found.append((results.logprob_p.shape, *torch.autograd.grad(sum(x.sum() for x in results), (hidden, weight))))
    return found


def double(rank):
    raw, noisy, weight, targets = (x.double() if x.is_floating_point() else x for x in small())
    kept = partial(BOTH, keep_logits_bytes=1 << 20)
    return evaluate(kept, [raw, noisy], *of_rank(rank, weight), targets, None, 0.7)


def equal_branches(rank):
    raw, _, weight, targets = small()
    results = BOTH(raw, raw.clone(), *of_rank(rank, weight), targets)
    return torch.stack([results.kl_pq, results.kl_qp, results.symmetric_kl])


def near_branches(rank):
    """Branches that differ by little more than rounding, where a KL of plain sums would fall below zero."""
    raw, _, weight, _ = small()
    raw = raw.repeat(200, 1) + torch.randn(1200, 8)
    near = raw + 1e-6 * torch.randn_like(raw)
    results = BOTH(raw, near, *of_rank(rank, weight), torch.zeros(1200, dtype=torch.long))
    return torch.stack([results.kl_pq, results.kl_qp, results.symmetric_kl])


def likeliest(rank):
    """Every word of the vocabulary scored at one peaked and one flat state: which is the likeliest?"""
    hidden, _, weight, _ = small()
    hidden = (hidden[:2] * torch.tensor([[4.0], [1e-3]])).repeat_interleave(60, dim=0)
    results = ONE(hidden, *of_rank(rank, weight), torch.arange(60).repeat(2))
    return (results.logprob == results.top_logprob).view(2, 60), (hidden @ weight.T)[[0, 60]].argmax(-1)


def nearly_the_likeliest(rank):
    """The first shard's two words differ by a rounding that is seen beside log 2, and not beside log 44."""
    weight = torch.full((62, 1), 0.999)
    weight[0], weight[1], weight[2:20] = 1.0, 1 - 2**-24, -100.0
    results = ONE(torch.ones(3, 1), *of_rank(rank, weight), torch.tensor([0, 1, 30]))
    return results.logprob, results.top_logprob


def refusals(rank):
    """What both ranks are told; a rank that were told nothing would wait for the other for ever."""
    raw, _, weight, targets = small()
    (shard,) = of_rank(rank, weight)
    far = torch.where(targets == 59, 60, targets)
    return [
        refusal(raw, shard, targets + rank * (targets == 33)),
        refusal(raw[rank:], shard, targets[rank:]),
        refusal(raw, shard[rank * len(shard) :], targets),
        refusal(raw, shard, far),
        refusal(raw, shard, targets.float()),
        refusal(raw, torch.ones(2, 2).requires_grad_() if rank else torch.ones(2, 3), targets),
    ]


def refusal(*args):
    try:
        ONE(*args)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


SITUATIONS = (cases, skipped, empty, double, equal_branches, near_branches, likeliest, nearly_the_likeliest, refusals)


def be_a_rank(rank, folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    found = {}
    for situation in SITUATIONS:
        torch.manual_seed(0)
        found[situation.__name__] = situation(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found, started once."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(be_a_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def whole(first, second):
    """(results, gradients with the shards' put together) of two ranks, between which nothing else may differ."""
    (results, gradients), (others, other_gradients) = first, second
    hiddens = 2 if len(results) == len(BranchStats._fields) else 1
    for one, other in zip((*results, *gradients[:hiddens]), (*others, *other_gradients[:hiddens]), strict=True):
        assert torch.equal(one, other)
    shards = zip(gradients[hiddens:], other_gradients[hiddens:], strict=True)
    return results, [*gradients[:hiddens], *(torch.cat(pair) for pair in shards)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_branches_over_two_ranks_are_as_exact_as_the_whole_vocabulary_in_plain_pytorch(case, ranks):
    raw, noisy, weight, targets, bias = case.inputs()
    args = [raw, noisy], weight, targets, bias, case.temperature
    truth = evaluate(oracle.linear_branch_stats, *args, dtype=torch.float64)
    plain = evaluate(oracle.linear_branch_stats, *args)
    values, gradients = zip(whole(*(rank["cases"][str(case)][0] for rank in ranks)), plain, truth, strict=True)
    terms = oracle.divergence_terms(raw, noisy, weight, bias, case.temperature).max()
    assert_as_exact_as_plain(*values, BranchStats._fields, lambda name, true: terms if "kl" in name else true)
    largest = {"grad weight": max(raw.abs().max(), noisy.abs().max()), "grad bias": 1}
    assert_as_exact_as_plain(
        *gradients,
        ("grad p", "grad q", *GRADIENTS),
        lambda name, true: max(true, terms * largest.get(name, weight.abs().max())),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_branch_over_two_ranks_is_as_exact_as_the_whole_vocabulary_in_plain_pytorch(case, ranks):
    raw, _, weight, targets, bias = case.inputs()
    args = [raw], weight, targets, bias, case.temperature
    truth = evaluate(oracle.linear_logprob, *args, dtype=torch.float64)
    plain = evaluate(oracle.linear_logprob, *args)
    values, gradients = zip(whole(*(rank["cases"][str(case)][1] for rank in ranks)), plain, truth, strict=True)
    assert_as_exact_as_plain(*values, LogprobStats._fields)
    assert_as_exact_as_plain(*gradients, ("grad hidden", *GRADIENTS))


def test_float64_stays_float64(ranks):
    torch.manual_seed(0)
    raw, noisy, weight, targets = (x.double() if x.is_floating_point() else x for x in small())
    truth = evaluate(oracle.linear_branch_stats, [raw, noisy], weight, targets, None, 0.7)
    found = whole(*(rank["double"] for rank in ranks))
    for actual, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(list(actual), list(expected), rtol=1e-12, atol=1e-13)


def test_skipped_tokens_are_zero_and_the_others_as_if_alone(ranks):
    torch.manual_seed(0)
    raw, noisy, weight, targets = small()
    leaves = [x.requires_grad_() for x in (raw, noisy, weight)]
    expected = oracle.linear_branch_stats(*leaves, targets)
    results, (grad_p, grad_q, _), shifted = ranks[0]["skipped"]
    for actual, true in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, true.detach().view(2, 3))
        assert actual[0, 2] == 0
    grads = torch.autograd.grad(expected.kl_pq.sum() + expected.logprob_p.sum(), leaves)
    shards = torch.cat([rank["skipped"][1][2] for rank in ranks])
    for actual, true in zip((grad_p.flatten(0, 1), grad_q.flatten(0, 1), shards), grads, strict=True):
        torch.testing.assert_close(actual, true)
    assert all(x.shape == (2, 2) and not x.any() for x in shifted)


def test_without_a_token_that_counts_every_gradient_is_zero(ranks):
    for rank in ranks:
        for n, (shape, grad_hidden, grad_weight) in zip((0, 6), rank["empty"], strict=True):
            assert shape == (n,) and grad_hidden.shape == (n, 8)
            assert not grad_hidden.any() and not grad_weight.any()


def test_equal_branches_diverge_by_nothing_and_near_ones_by_no_less(ranks):
    assert not ranks[0]["equal_branches"].any()
    assert (ranks[0]["near_branches"] >= 0).all()


def test_the_likeliest_word_of_all_shards_is_the_one_that_has_its_log_probability(ranks):
    is_top, expected = ranks[0]["likeliest"]
    assert is_top.sum(-1).tolist() == [1, 1]
    assert torch.equal(is_top.int().argmax(-1), expected)


def test_a_word_that_is_second_by_less_than_is_left_of_it_is_not_the_likeliest(ranks):
    logprob, top_logprob = ranks[0]["nearly_the_likeliest"]
    assert logprob[0] == logprob[1]
    assert (logprob == top_logprob).tolist() == [True, False, False]
    torch.testing.assert_close(top_logprob, logprob[:1].expand(3))


def test_every_rank_is_told_what_only_one_does_otherwise(ranks):
    first, second = (rank["refusals"] for rank in ranks)
    assert first == second
    checksums, counts, empty, outside, floats, widths = first
    assert "the same tokens, got targets' checksums of [" in checksums
    assert "the same tokens, got numbers of tokens of [6, 5]" in counts
    assert "a shard of the weight, got shards of [20, 0] rows" in empty
    assert outside == (
        "ValueError: targets[4] = 60 is outside [0, 60), the words of all shards; only -100 marks a position to skip"
    )
    assert floats == "TypeError: targets must be integers, got torch.float32"
    assert "got widths D of [3, 2]" in widths


def test_without_ranks_it_says_so(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # whatever other tests of this process have started
    raw, _, weight, targets = small()
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        ONE(raw, weight, targets)
