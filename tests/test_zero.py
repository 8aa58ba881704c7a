"""What DeepSpeed makes of vogue's own settings: in what gradients are summed, and where the optimizer's state is.

`start_deepspeed` takes any module; here one whose gradient is what it is given.
"""

import pytest
import torch
from deepspeed.ops.op_builder import OpBuilder
from safetensors.torch import load_file
from torch import nn

from vogue import distributed
from vogue.cli import main
from vogue.config import load_config
from vogue.model import optimizer_state
from vogue.model.optimizer import start_deepspeed
from vogue.settings import ConfigError


class Weights(nn.Module):
    """weights x, so that the gradient is x."""

    def __init__(self, dtype, count=6):
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(-1, 1, count).to(dtype))

    def forward(self, x):
        return (self.weights * x).sum()


def engine_of(*overrides, stage):
    distributed.start()
    given = ["model.path=some/model", "optimizer.max_grad_norm=1e6", "optimizer.lr=1e-2", *overrides]
    config = load_config(None, [*given, f"trainer.deepspeed.zero_optimization.stage={stage}"])
    return start_deepspeed(Weights(getattr(torch, config.model.dtype)), config)


def update(engine, gradients):
    """One update by the sum of the gradients, each of a micro-batch."""
    for i, gradient in enumerate(gradients):
        engine.set_gradient_accumulation_boundary(i == len(gradients) - 1)
        engine.backward(engine(gradient))
    engine.step()


def first_moment(engine):
    states = engine.optimizer.optimizer.state.values()
    return torch.cat([state["exp_avg"].flatten() for state in states])[:6].float()


def weights_of(engine):
    with torch.no_grad():
        return torch.cat([engine(one).reshape(1) for one in torch.eye(6, dtype=engine.module.weights.dtype)])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "total"), [(None, 1.125), ("float32", 1.125), ("bfloat16", 1.0)])
def test_small_gradients_count_beside_a_large_one(stage, dtype, total):
    engine = engine_of(*([f"trainer.grad_accum_dtype={dtype}"] if dtype else []), stage=stage)
    # bfloat16 has 8 bits: to 1 it adds nothing below 2^-8.
    large, small = torch.ones(6, dtype=torch.bfloat16), torch.full((6,), 2.0**-9, dtype=torch.bfloat16)
    update(engine, [large, *[small] * 64])
    torch.testing.assert_close(first_moment(engine), torch.full((6,), 0.1 * total), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        *((1, False), (3, False)),
        pytest.param(1, True, marks=pytest.mark.long),
        pytest.param(3, True, marks=pytest.mark.long),
    ],
)
def test_an_update_that_is_not_finite_is_skipped_with_sums_in_float32(stage, offload):
    engine = engine_of(f"trainer.offload_optimizer={offload}", stage=stage)
    update(engine, [torch.ones(6, dtype=torch.bfloat16)])
    before = weights_of(engine)
    update(engine, [torch.full((6,), float("inf"), dtype=torch.bfloat16)])
    assert not torch.isfinite(torch.tensor(float(engine.get_global_grad_norm())))
    assert torch.equal(weights_of(engine), before)
    update(engine, [torch.ones(6, dtype=torch.bfloat16)])
    assert not torch.equal(weights_of(engine), before)


@pytest.mark.slow
def test_a_run_in_bfloat16_goes_on_as_if_it_had_not_stopped(settings, tmp_path):
    def weights(name, *steps):
        for resumed, count in enumerate(steps):
            given = [*settings, "model.dtype=bfloat16", f"trainer.output_dir={tmp_path / name}"]
            given += ["trainer.micro_batch_tokens=150", "branch.probability=0.5", f"trainer.steps={count}"]
            assert main(["train", *given, *["--resume"] * resumed]) == 0
        (file,) = (tmp_path / name).glob("checkpoints/step_000002/hf/*.safetensors")
        return load_file(file)

    straight, again = weights("straight", 2), weights("again", 1, 2)
    assert all(torch.equal(straight[name], weight) for name, weight in again.items())
    first = load_file(next((tmp_path / "again").glob("checkpoints/step_000001/hf/*.safetensors")))
    assert not all(torch.equal(first[name], weight) for name, weight in again.items())


# ------------------------------------------------------------------------------------------------------- offloading

GRADIENTS = [[torch.randn(6, generator=torch.Generator().manual_seed(2 * i + j)) for j in (0, 1)] for i in range(4)]


OFFLOADED = ["trainer.offload_optimizer=true"]
PARAMS = [*OFFLOADED, "trainer.offload_params=true"]


@pytest.mark.long  # DeepSpeed compiles its CPUAdam for minutes, once a machine
@pytest.mark.parametrize(
    ("stage", "first", "then"),
    [(1, OFFLOADED, OFFLOADED), (3, OFFLOADED, OFFLOADED), (3, PARAMS, PARAMS), (1, [], OFFLOADED), (3, OFFLOADED, [])],
    ids=["stage-1", "stage-3", "weights-too", "offloaded-later", "no-longer-offloaded"],
)
def test_what_is_offloaded_is_updated_as_torch_does_and_resumed(stage, first, then, tmp_path):
    engine = engine_of("model.dtype=float32", *first, stage=stage)
    begin = Weights(torch.float32).weights.detach()
    weights = nn.Parameter(begin.clone())
    optimizer = torch.optim.AdamW([weights], 1e-2, weight_decay=0.01)
    for i, gradients in enumerate(GRADIENTS):
        update(engine, gradients)
        weights.grad = gradients[0] + gradients[1]
        optimizer.step()
        torch.testing.assert_close(weights_of(engine), weights.detach(), rtol=0, atol=1e-6)
        if i == 1:
            optimizer_state.finish(engine, [optimizer_state.write(engine, tmp_path, 0)[0]], tmp_path)
    again = engine_of("model.dtype=float32", *then, stage=stage)
    optimizer_state.read(again, tmp_path)
    for gradients in GRADIENTS[2:]:
        update(again, gradients)
    # Not the same bits: CPUAdam multiplies beta^t up from step to step, and computes it anew after a resumption.
    torch.testing.assert_close(weights_of(again), weights_of(engine), rtol=0, atol=1e-6)
    assert (weights_of(engine) - begin).abs().min() > 1e-3


def test_a_machine_that_cannot_compile_deepspeeds_optimizer_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})  # where another test has compiled it
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # neither a compiler nor ninja
    with pytest.raises(ConfigError, match=r"trainer\.offload_optimizer=true: DeepSpeed can't compile its CPUAdam"):
        engine_of("trainer.offload_optimizer=true", stage=1)
