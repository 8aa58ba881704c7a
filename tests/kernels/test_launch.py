"""What the Triton backend launches for tensors of a GPU, where there is none.

The tensors are on torch's meta device and say that they are on a GPU; a recorder stands where a kernel would run, and
hands the arguments to Triton's own binder, which makes of them what it would compile. All else is real.
"""

import contextlib
import importlib
import os
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vogue_kernels.branches import Head, Needs, Scaling, one_branch, two_branches

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SCALING = Scaling(temperature=0.7, softcap=None)
QWEN_3B, QWEN_7B = (2048, 151936), (3584, 152064)  # D, V of Qwen2.5-VL
KERNELS = ("forward_kernel", "logit_gradient_kernel", "merge_kernel", "kept_gradient_kernel")


class OnGpu(torch.Tensor):
    is_cuda = True


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta").as_subclass(OnGpu)


NOTHING = [tensor(0, dtype=torch.uint8)]  # is kept


class Launch(SimpleNamespace):
    """grid; arguments, types and specializations ("D": a multiple of 16) by name; options of the compiler."""


class Recorder:
    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, **kwargs):
        *_, backend, bind = self.kernel.device_caches[0]
        arguments, specialization, options = bind(*args, **kwargs)
        if hasattr(self.kernel, "_pack_args"):  # refuses unknown options; triton 3.4 has none
            self.kernel._pack_args(backend, kwargs, arguments, specialization, options)
        types, special = ({name: pair[i] for name, pair in zip(arguments, specialization)} for i in (0, 1))
        self.launches.append(
            Launch(grid=grid, arguments=arguments, types=types, specializations=special, options=options)
        )


@pytest.fixture(scope="module")
def static():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
        return importlib.import_module("gpu_static")


@pytest.fixture(params=["sm_80", "sm_90", "sm_100", "gfx942"])
def gpu(request, monkeypatch, static):
    """The backend on a GPU of each architecture, with 132 processors."""
    import triton

    from vogue_kernels import gpu

    amd = request.param == "gfx942"
    properties = SimpleNamespace(multi_processor_count=132, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if not amd:
        capability = divmod(int(request.param[3:]), 10)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    driver = SimpleNamespace(get_current_target=lambda: static.TARGETS[request.param])
    active = "_active" if hasattr(triton.runtime.driver, "_active") else "active"  # since triton 3.5, and before
    monkeypatch.setattr(triton.runtime.driver, active, driver)
    recorders = {name: Recorder(getattr(gpu, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(gpu, name, recorder)
        monkeypatch.setattr(
            recorder.kernel, "device_caches", type(recorder.kernel.device_caches)(recorder.kernel.create_binder)
        )
    return SimpleNamespace(module=gpu, architecture=request.param, amd=amd, recorders=recorders)


def run_logprob(gpu, n, size, bias=None, entropy=False, keep=0, **changed):
    """(launches forward, backward, of the merge, of kept logits) of a branch's log-probability, or its entropy too."""
    inputs = {"hidden": tensor(n, size[0]), "weight": tensor(size[1], size[0])} | changed
    targets, row = tensor(n, dtype=torch.int64), tensor(n, dtype=torch.float32)
    args, buffers = ([Head(inputs["weight"], bias)], targets, SCALING), [tensor(keep, dtype=torch.uint8)]
    gpu.module.forward([inputs["hidden"]], *args, buffers)
    branches = one_branch([row, row if entropy else None, None], inputs["hidden"], [row] * 3, 0.7)
    gpu.module.backward(branches, *args, Needs([True], [True], [bias is not None]), buffers)
    return [recorder.launches for recorder in gpu.recorders.values()]


def run_branches(gpu, n, size, bias=None):
    """(launches forward, backward, of the merge, of kept logits) of everything."""
    hiddens, weight = [tensor(n, size[0]) for _ in range(2)], tensor(size[1], size[0])
    args = [Head(weight, bias)], tensor(n, dtype=torch.int64), SCALING
    row = tensor(n, dtype=torch.float32)
    gpu.module.forward(hiddens, *args, NOTHING * 2)
    branches = two_branches([row] * 9, *hiddens, [row] * 8, 0.7)
    gpu.module.backward(branches, *args, Needs([True, True], [True], [bias is not None]), NOTHING * 2)
    return [recorder.launches for recorder in gpu.recorders.values()]


@pytest.mark.parametrize("n", [1, 1024])
@pytest.mark.parametrize("size", [QWEN_3B, QWEN_7B], ids=["3B", "7B"])
@pytest.mark.parametrize(
    "run, variants",
    [
        (run_logprob, ("forward", "gradient of logprob", "merge")),
        (partial(run_logprob, bias=True), ("forward, bias", "gradient of logprob, bias", "merge")),  # a training's
        (partial(run_logprob, entropy=True), ("forward", "gradient, entropy", "merge")),
        (partial(run_logprob, entropy=True, bias=True), ("forward, bias", "gradient, entropy, bias", "merge")),
        (
            partial(run_logprob, entropy=True, bias=True, keep=1 << 40),
            ("forward, bias, kept", "", "merge", "gradient of kept"),
        ),
        (run_branches, ("forward both", "gradient both", "merge both")),
        (partial(run_branches, bias=True), ("forward both, bias", "gradient both, bias", "merge both")),
    ],
    ids=lambda value: " + ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_launched_is_what_was_compiled_ahead_of_time(run, variants, size, n, gpu, static):
    if isinstance(run, partial) and "bias" in run.keywords:
        run = partial(run, bias=tensor(size[1]))
    for launches, variant in zip(run(gpu, n, size), variants):
        if not variant:  # all logits are kept
            assert not launches
            continue
        key = (static.VARIANTS | static.SMALL)[variant][2]
        tile = key and gpu.module.pick_tile(key, torch.bfloat16, gpu.architecture, n)
        types, constants, aligned = static.specialize(variant, "bf16", tile)
        assert launches
        for launch in launches:
            assert launch.types == types
            assert [name for name, special in launch.specializations.items() if "D" in str(special)] == aligned
            given = {name: launch.specializations[name] for name, kind in types.items() if kind == "constexpr"}
            whole = {"WHOLE_DEPTH": size[0] % tile.depth == 0} if tile else {}
            assert given | launch.options == constants | whole


def check_forward(launch, branches, n, size, biased):
    depth, vocab = size
    arguments = launch.arguments
    splits, tiles = arguments["splits"], arguments["tiles"]
    assert launch.grid == (-(-n // arguments["TOKENS"]) * splits,)
    assert splits * tiles * arguments["VOCAB"] >= vocab > (splits - 1) * tiles * arguments["VOCAB"]
    shapes = {
        "hidden_p": (n, depth),
        "hidden_q": (n, depth),
        "weight": size[::-1],
        "targets": (n,),
        "partial": (branches, 2 + branches, splits, n),
        "target_logits": (branches, n),
    } | ({"bias": (vocab,)} if biased else {})
    check_matrices(arguments, shapes)
    assert arguments["log2_scale"] == pytest.approx(1.4426950408889634 / 0.7, rel=1e-7)


def check_matrices(arguments, shapes):
    for name, shape in shapes.items():
        tensor = getattr(arguments[name], "base", arguments[name])
        assert (tuple(tensor.shape), tensor.is_contiguous(), tensor.is_cuda) == (shape, True, True), name
        if tensor is not arguments[name]:
            block = [arguments["VOCAB" if name == "weight" else "TOKENS"], arguments["DEPTH"]]
            descriptor = arguments[name]
            assert (tuple(descriptor.shape), tuple(descriptor.strides), descriptor.block_shape) == (
                shape,
                (shape[1], 1),
                block,
            )


def check_gradients(launches, n, size, outputs, biased):
    """The chunks are all of the vocabulary, and each output is where the kernel will write."""
    depth, vocab = size
    end = 0
    for launch in launches:
        arguments = launch.arguments
        width = arguments["width"]
        assert arguments["first"] == end
        end += width
        assert launch.grid == (-(-n // arguments["TOKENS"]) * -(-width // arguments["VOCAB"]),)
        shapes = {"hidden_a": (n, depth), "hidden_b": (n, depth), "weight": size[::-1], "targets": (n,)}
        shapes |= {"numbers_a": (7, n), "numbers_b": (7, n)} | ({"bias": (vocab,)} if biased else {})
        check_matrices(arguments, shapes)
        offsets = [arguments[name].data_ptr() for name in ("gradient_a", "gradient_b")[:outputs]]
        assert offsets == [0, 2 * n * arguments["stride"]][:outputs]
        for name in ("gradient_a", "gradient_b")[:outputs]:
            assert (tuple(arguments[name].shape), arguments[name].stride()) == ((n, width), (arguments["stride"], 1))
        assert width <= arguments["stride"]
    assert end == vocab


@pytest.mark.parametrize("n", [1, 1000])
@pytest.mark.parametrize("size", [QWEN_7B, (100, 32003)], ids=["7B", "odd"])
def test_grids_cover_the_work_and_every_argument_has_the_shape_its_kernel_takes(size, n, gpu):
    bias = tensor(size[1])
    (forward,), backward, *_ = run_logprob(gpu, n, size, bias)
    check_forward(forward, 1, n, size, biased=True)
    check_gradients(backward, n, size, 1, biased=True)
    for recorder in gpu.recorders.values():
        recorder.launches.clear()
    (forward,), backward, *_ = run_branches(gpu, n, size)
    check_forward(forward, 2, n, size, biased=False)
    check_gradients(backward, n, size, 2, biased=False)


def test_many_tokens_come_in_batches_and_a_chunk_is_finished_before_the_next(gpu):
    forward, backward, merges, _ = run_logprob(gpu, 2 * 8192 + 5, QWEN_3B)
    assert [launch.arguments["N"] for launch in forward] == [8192, 8192, 5]
    assert [(launch.arguments["N"], launch.grid) for launch in merges] == [(8192, (512,)), (8192, (512,)), (5, (1,))]
    for i, launch in enumerate(merges):  # each fills its part of the results
        assert launch.arguments["entropy_p"].storage_offset() == 8192 * i
    for launch, rows in zip(forward, (8192, 8192, 5)):
        check_forward(launch, 1, rows, QWEN_3B, biased=False)
    assert [launch.arguments["N"] for launch in backward] == [8192, 8192, 5] * (len(backward) // 3)
    for i, rows in enumerate((8192, 8192, 5)):
        check_gradients(backward[i::3], rows, QWEN_3B, 1, biased=False)


@pytest.mark.parametrize("needed", ["raw", "noisy"])
def test_a_divergence_whose_gradient_one_branch_needs_writes_that_one(needed, gpu):
    n, (depth, vocab) = 5, QWEN_3B
    args = [Head(tensor(vocab, depth), None)], tensor(n, dtype=torch.int64), Scaling(1.0, None)
    row, needs = tensor(n, dtype=torch.float32), [needed == "raw", needed == "noisy"]
    branches = two_branches([None] * 6 + [row, None, None], tensor(n, depth), tensor(n, depth), [row] * 8, 1.0)
    gradients, *others = gpu.module.backward(branches, *args, Needs(needs, [False], [False]), NOTHING * 2)
    assert [gradient is not None for gradient in gradients] == needs
    assert others == [[None], [None]]
    for launch in gpu.recorders["logit_gradient_kernel"].launches:
        arguments = launch.arguments
        assert [arguments["BOTH"], arguments["WRITE_A"], arguments["WRITE_B"]] == [True, *needs]
        for name in ("gradient_a", "gradient_b"):  # the one that isn't written must be a tensor all the same
            assert tuple(arguments[name].shape) == (n, arguments["width"])


@pytest.mark.parametrize(
    "n, vocab, strided", [(7, 1000, "hidden"), (7, 1000, "weight"), (1, 1000, "hidden"), (7, 1, "weight")]
)
def test_strided_inputs_are_launched_as_contiguous_ones(n, vocab, strided, gpu):
    """A single row is contiguous with strides (1, 1), which no descriptor could have."""
    change = {"hidden": tensor(64, n).t(), "weight": tensor(64, vocab).t()}[strided]
    (forward,), backward, *_ = run_logprob(gpu, n, (64, vocab), **{strided: change})
    check_forward(forward, 1, n, (64, vocab), biased=False)
    check_gradients(backward, n, (64, vocab), 1, biased=False)


class Operators(TorchDispatchMode):
    """Counts what torch runs by name, but for views and what allocates."""

    def __init__(self):
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name not in ("slice", "select", "split", "view", "t", "detach", "alias", "new_empty", "empty_like", "empty"):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_around_the_kernels_one_batch_is_neither_copied_nor_joined_nor_cleared(gpu):
    n, (depth, vocab) = 1024, QWEN_3B
    hidden, weight, targets = tensor(n, depth), tensor(vocab, depth), tensor(n, dtype=torch.int64)
    row = tensor(n, dtype=torch.float32)
    branches = one_branch([row, None, None], hidden, [row] * 3, 0.7)
    with Operators() as forward:
        gpu.module.forward([hidden], [Head(weight, None)], targets, SCALING, NOTHING)
    with Operators() as backward:
        needs = Needs([False], [True], [False])
        gpu.module.backward(branches, [Head(weight, None)], targets, SCALING, needs, NOTHING)
    chunks = -(-vocab // gpu.module.chunk_size(vocab, n))
    assert not forward.counts
    assert backward.counts.pop("mm") == chunks
    assert not {"cat", "new_zeros", "copy_", "clone"} & set(backward.counts)
    assert backward.counts["zeros_like"] == 1  # a row of zeros, for the numbers of a token


def test_kept_logits_and_new_ones_are_all_of_the_vocabulary(gpu):
    n, vocab = 10_000, QWEN_3B[1]  # two batches
    half = n * vocab // 2 * 2  # bytes
    forward, new, _, kept = run_logprob(gpu, n, QWEN_3B, keep=half)
    columns = forward[0].arguments["columns_p"]
    assert 0.95 * vocab / 2 < columns <= vocab // 2 and columns % 64 == 0
    for launch, rows in zip(forward, (slice(0, 8192), slice(8192, n))):
        arguments, size = launch.arguments, rows.stop - rows.start
        assert launch.arguments["KEEP_P"] and not launch.arguments["KEEP_Q"]
        assert (tuple(arguments["kept_p"].shape), arguments["kept_p"].stride()) == ((size, columns), (columns, 1))
        assert arguments["kept_p"].data_ptr() == rows.start * columns * 2
        assert (tuple(arguments["reference_p"].shape), arguments["reference_stride"]) == ((columns // 64, size), n)
    spans = [(x.arguments["N"], x.arguments["first"], x.arguments["width"]) for x in [*kept, *new]]
    for size in (8192, n - 8192):
        end = 0
        for _, first, width in sorted(span for span in spans if span[0] == size):
            assert first == end
            end += width
        assert end == vocab
    assert max(x.arguments["first"] + x.arguments["width"] for x in kept) > columns - 256
    for launch in kept:
        assert launch.grid == (-(-launch.arguments["N"] // 64), -(-launch.arguments["width"] // 64))


@pytest.mark.parametrize("version", ["2.9.1", "2.10.0"])
def test_a_torch_whose_addmm_cannot_add_to_float32_is_not_asked_to(version, gpu, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with Operators() as operators:
        run_logprob(gpu, 5, QWEN_3B)
    assert ("addmm" in operators.counts) == (version == "2.10.0" and not gpu.amd)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden": tensor(7 * 64 + 1)[1:].view(7, 64)},  # starts at byte 2
        {"weight": tensor(1000 * 64 + 4)[4:].view(1000, 64)},  # at byte 8
        {"hidden": tensor(7, 60), "weight": tensor(1000, 60)},  # rows of 120 bytes
    ],
    ids=["hidden", "weight", "rows"],
)
def test_what_tma_cannot_address_is_loaded_without_it(changed, gpu):
    for (launch,) in run_logprob(gpu, 7, (64, 1000), **changed)[:2]:
        assert not launch.arguments["TMA"]
        assert isinstance(launch.arguments["weight"], torch.Tensor)
