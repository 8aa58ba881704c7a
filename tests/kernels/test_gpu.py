"""The Triton backend where there may be no GPU: the other tests of this folder in Triton's interpreter, the choice of
the backend, and what the kernels compile to."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_linear_stats import Case, assert_branch_stats_as_exact_as_plain

from vogue_kernels import available_backends, backends, linear_logprob

FOLDER = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this is the child")
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.long), 12])
def test_every_kernel_test_of_a_small_vocabulary_passes_in_the_interpreter(every):
    """In a process of its own: triton must be told before its first import, and other tests compile with it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", FOLDER, FOLDER]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VOGUE_EVERY_NTH_CASE": str(every),
    }
    small = "not (V32003 or V151936 or V152)"
    command += ["-k", f"(triton or test_gpu) and {small} and not compile_to"]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter")
@pytest.mark.parametrize(
    "case", [Case("normal", 37, 72, 1500, "bf16", 1.3, True), Case("peaked", 33, 72, 2051, "f32")], ids=str
)
def test_triton_in_many_batches_chunks_and_shares_is_as_exact_as_plain_pytorch(case, monkeypatch):
    for name, value in {"MOST_TOKENS": 16, "CHUNK_ELEMENTS": 1 << 13, "MOST_TILES": 1}.items():
        monkeypatch.setattr(f"vogue_kernels.gpu.{name}", value)
    assert_branch_stats_as_exact_as_plain(case, "triton")


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter")
@pytest.mark.parametrize(
    "case", [Case("rising", 5, 72, 1500, "bf16", 1.3, True), Case("rising", 5, 72, 1500, "f32")], ids=str
)
def test_the_sums_follow_the_maximum_from_tile_to_tile_of_a_share(case, monkeypatch):
    gpu = importlib.import_module("vogue_kernels.gpu")
    monkeypatch.setattr(gpu, "INTERPRETER_TILE", gpu.Tile(16, 128, 32, 1, 1))
    monkeypatch.setattr(gpu, "_processors", lambda weight: 2)
    assert gpu.share_size(blocks=1, tiles=12, processors=2) == 6
    assert_branch_stats_as_exact_as_plain(case, "triton")


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter")
@pytest.mark.parametrize(
    "case, described",
    [  # 80 elements: the interpreter of triton 3.4 demands a multiple of 16 of them, where a GPU does of bytes
        (Case("normal", 37, 80, 1500, "bf16", 1.3, True), True),
        (Case("negative", 33, 80, 2051, "bf16"), True),  # what is read as 0 outside the matrices would win
        (Case("negative", 33, 80, 2051, "f32"), True),
        (Case("normal", 37, 33, 515, "bf16"), False),  # rows of 66 bytes
    ],
    ids=str,
)
def test_loads_through_tensor_descriptors_are_as_exact_as_plain_pytorch(case, described, monkeypatch):
    gpu = importlib.import_module("vogue_kernels.gpu")
    monkeypatch.setattr(gpu, "INTERPRETER_TILE", gpu.INTERPRETER_TILE._replace(tma=True))
    descriptors, make = [], gpu.TensorDescriptor
    monkeypatch.setattr(gpu, "TensorDescriptor", lambda *given: descriptors.append(given) or make(*given))
    assert_branch_stats_as_exact_as_plain(case, "triton")
    assert bool(descriptors) == described


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter")
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_the_weights_gradient_is_the_sum_over_all_batches_of_tokens(batches, monkeypatch):
    monkeypatch.setattr("vogue_kernels.gpu.MOST_TOKENS", -(-30 // batches))
    leaves = {name: torch.randn(*shape) for name, shape in {"hidden": (30, 16), "weight": (40, 16)}.items()}
    targets, given, gradients = torch.randint(40, (30,)), torch.randn(30), []
    for backend in ("triton", "torch"):
        weight = leaves["weight"].clone().requires_grad_()
        logprob = linear_logprob(leaves["hidden"], weight, targets, backend=backend).logprob
        gradients += torch.autograd.grad((given * logprob).sum(), weight)
    torch.testing.assert_close(*gradients)


def test_auto_leaves_the_interpreter_to_those_who_ask_for_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available_backends()["triton"] is None
    assert backends.implementation("auto", torch.zeros(1, 1)).__name__ != "vogue_kernels.gpu"


def test_tensors_on_the_cpu_are_refused_though_there_is_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="backend 'triton' can't run: the tensors are on cpu"):
        linear_logprob(torch.zeros(1, 8), torch.zeros(50, 8), torch.tensor([0]), backend="triton")
    linear_logprob(torch.zeros(1, 8), torch.zeros(50, 8), torch.tensor([0]))


def test_float64_is_refused_where_it_would_be_computed_in_float32(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, weight = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(50, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="it computes in float32; use torch"):
        linear_logprob(hidden, weight, torch.tensor([0]), backend="triton")


@pytest.mark.parametrize(
    "blocks, tiles, processors, expected",
    [
        (1, 1187, 132, 9),  # one token block: 132 shares, one for each processor, rather than 2 × 5 tiles
        (1, 3, 132, 1),  # fewer tiles than processors
        (132, 10, 132, 10),  # a whole wave already
    ],
)
def test_shares_of_the_vocabulary_fill_the_processors(blocks, tiles, processors, expected):
    assert importlib.import_module("vogue_kernels.gpu").share_size(blocks, tiles, processors) == expected


@pytest.mark.parametrize("vocab, tokens, columns", [(152064, 8192, 8192), (152064, 4096, 15360), (50, 3, 256)])
def test_chunks_of_the_vocabulary_are_of_like_size(vocab, tokens, columns):
    assert importlib.import_module("vogue_kernels.gpu").chunk_size(vocab, tokens) == columns


def test_an_architecture_without_a_row_takes_the_nearest_and_few_tokens_a_tile_of_64():
    gpu = importlib.import_module("vogue_kernels.gpu")
    tiles = [gpu.pick_tile("forward", torch.bfloat16, name, 1024) for name in ("sm_80", "sm_89", "sm_120", "sm_103")]
    assert tiles == [gpu.TILES[name]["forward"] for name in ("sm_80", "sm_80", "sm_80", "sm_100")]
    assert gpu.pick_tile("forward", torch.bfloat16, "sm_75", 1024) == gpu.DEFAULT_TILE
    assert [gpu.pick_tile("forward", torch.bfloat16, "sm_90", n).tokens for n in (1, 64, 65)] == [64, 64, 128]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, instructions, all_variants",
    [
        ("sm_90", {"wgmma.mma_async", "cp.async.bulk.tensor"}, False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("sm_90", {"wgmma.mma_async", "cp.async.bulk.tensor"}, True),
                ("sm_80", {"mma.sync"}, False),
                ("sm_100", {"tcgen05.mma", "cp.async.bulk.tensor"}, False),
                ("sm_120", {"mma.sync"}, False),  # as sm_86 and sm_89: sm_80's tiles in 99 KB of shared memory
                ("gfx942", {"v_mfma_f32"}, False),
            )
        ),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # a set prints in any order
)
def test_what_the_kernels_compile_to(architecture, instructions, all_variants, tmp_path):
    script = FOLDER.parent.parent / "bench" / "gpu_static.py"
    command = [sys.executable, script, "--arch", architecture, "--json", tmp_path / "static.json"]
    if not all_variants:  # what matters most
        command += ["--dtype", "bf16", "--tokens", "many"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = json.loads((tmp_path / "static.json").read_text())["compiled"]
    # Eleven variants, thrice or once, six with a softcap or two heads, and three kernels without a product.
    assert len(compiled) == (42 if all_variants else 20)
    for row in compiled:
        assert row["spills_among_products"] == 0, row
        # But for these forward kernels some bytes a tile may be spilled, outside of the loop over D.
        whole = row["dtype"] == "bf16" and "forward" in row["kernel"] and "kept" not in row["kernel"]
        # The slopes of a softcap take as many registers again as the logits.
        assert row["local_bytes"] <= (0 if whole else 2048 if "softcap" in row["kernel"] else 512), row
        assert row["programs_per_sm"] >= 1, row
        assert row["dtype"] == "f32" or set(row["instructions"]) == instructions, row
        if "gradient" in row["kernel"] and architecture != "gfx942":
            assert row["wide_stores"] > 0 and row["narrow_stores"] == 0, row
        if row["kernel"].startswith("forward both") and "softcap" not in row["kernel"]:  # a tanh has a sign
            assert row["negations"] == 0, row  # of a product: equal branches would diverge by its rounding error
