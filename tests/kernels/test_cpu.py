"""The C++ backend: its instruction sets and products, its threads, and what happens where it wasn't compiled."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from vogue_kernels import available_backends, backends, cpu, linear_branch_stats, linear_logprob

FOLDER = Path(__file__).parent
needs_library = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the library isn't compiled")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.long), 12])
@pytest.mark.parametrize(
    "setting, expected",
    [
        ("ATEN_CPU_CAPABILITY=default", "portable"),
        pytest.param("VOGUE_CPU_PRODUCTS=f32", "\n", marks=pytest.mark.long),
        # What a processor with such products takes anyway.
        pytest.param("VOGUE_CPU_PRODUCTS=bf16", ", products of bfloat16\n", marks=pytest.mark.long),
        pytest.param("VOGUE_CPU_PRODUCTS=amx", " by AMX\n", marks=pytest.mark.long),
    ],
)
def test_every_kernel_test_passes_without_vector_instructions_and_by_each_product_of_bfloat16(setting, expected, every):
    name, value = setting.split("=")
    environment = {
        **os.environ,
        name: value,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VOGUE_EVERY_NTH_CASE": str(every),
    }
    said = "from vogue_kernels import cpu, available_backends as a; a(); print(cpu.description())"
    done = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True)
    assert expected in done.stdout, done.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER, "-m", "not slow", "-k", "cpu"]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def stats_and_gradients(dtype, n=100, d=72, v=3001):
    generator = torch.Generator().manual_seed(0)
    raw, noisy, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((n, d), (n, d), (v, d), (v,))
    )
    targets = torch.randint(v, (n,), generator=generator)
    stats = linear_branch_stats(raw, noisy, weight, targets, bias, 8.0, backend="cpu")
    return [*stats, *torch.autograd.grad(sum(result.sum() for result in stats), (raw, noisy, weight, bias))]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_results_by_no_more_than_their_rounding(dtype, threads):
    threads(1)
    expected = stats_and_gradients(dtype)
    for count in (1, 2, 4):
        threads(count)
        for x, y in zip(stats_and_gradients(dtype), expected):
            if count == 1:
                assert torch.equal(x, y)
            else:
                # Chunks of the vocabulary, and with them the places where sums are split, depend on the threads.
                assert (x - y).abs().max() <= 4 * torch.finfo(y.dtype).eps * y.abs().max()


@needs_library
@pytest.mark.parametrize("count", [1, 3])
def test_the_vocabulary_is_shared_among_the_threads_of_torch(count, threads):
    threads(count)
    nothing_kept = [torch.empty(0, dtype=torch.uint8)]
    arguments = [torch.randn(4, 8)], [torch.randn(2000, 8)], torch.randint(2000, (4,)), [None], 1.0, 0.0, nothing_kept
    partial, _ = torch.ops.vogue_cpu.forward(*arguments)
    assert partial.shape == (1, 3, count, 4)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1500, 3001, 9000], ids=["one batch", "two", "five"])
def test_the_backward_pass_adds_up_all_batches_of_tokens(tokens, dtype, threads):
    threads(2)
    vocab = 1030  # a chunk is 1,024 of it: of its logits' gradient, 2^21 elements exist at a time, of 2,048 tokens
    hidden, weight = (torch.randn(n, 3).to(dtype).requires_grad_() for n in (tokens, vocab))
    bias = torch.randn(vocab, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    results = []
    for backend in ("cpu", "torch"):
        loss = linear_logprob(hidden, weight, targets, bias, backend=backend).logprob.sum()
        results.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(*results, **tolerance)


@needs_library
def test_a_token_that_is_not_a_number_spoils_no_other_token(threads):
    threads(2)
    tokens, vocab = 3000, 1030  # two batches of tokens; the second chunk of the vocabulary has 6 words
    hidden, weight = torch.randn(tokens, 3), torch.randn(vocab, 3)
    hidden[2500] = torch.nan
    stats = linear_logprob(hidden.requires_grad_(), weight, torch.randint(vocab, (tokens,)), backend="cpu")
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), hidden)
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [2500]


@needs_library
def test_auto_takes_it_for_all_but_float64():
    for dtype, expected in ((torch.float32, cpu), (torch.bfloat16, cpu), (torch.float16, cpu)):
        assert backends.implementation("auto", torch.zeros(2, 2, dtype=dtype)) is expected
    assert backends.implementation("auto", torch.zeros(2, 2, dtype=torch.float64)).__name__.endswith("reference")
    with pytest.raises(ValueError, match=r"backend 'cpu' can't run: .* use torch for torch.float64"):
        backends.implementation("cpu", torch.zeros(2, 2, dtype=torch.float64))


@pytest.fixture
def library(monkeypatch):
    """Where the library is looked for."""

    def place(path):
        monkeypatch.setattr(cpu, "LIBRARY", path)
        cpu.why_not.cache_clear()
        backends._warn_of_reference.cache_clear()

    yield place
    cpu.why_not.cache_clear()


def test_without_the_library_the_reference_runs_with_one_warning(library, tmp_path):
    library(tmp_path / "_C.so")
    assert "wasn't compiled" in available_backends()["cpu"]
    arguments = torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0])
    with pytest.warns(UserWarning, match="PyTorch operators, not with compiled kernels: its library wasn't compiled"):
        linear_logprob(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_logprob(*arguments)
        linear_logprob(*arguments, backend="torch")


def test_a_library_that_cannot_be_loaded_says_why(library, tmp_path):
    (tmp_path / "_C.so").write_text("nonsense")
    library(tmp_path / "_C.so")
    assert "compiled for another torch or system" in available_backends()["cpu"]
