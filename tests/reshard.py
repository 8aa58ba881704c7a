"""A few weights trained by DeepSpeed on the ranks that this is launched on: what is saved of them, and resumed.

    reshard.py FOLDER SETUP …         FOLDER/SETUP-R has what training goes on with after three updates on R ranks,
                                      FOLDER/SETUP-R.pt what DeepSpeed itself tells of it, and after one more update
    reshard.py FOLDER SETUP=NAME …    FOLDER/NAME is resumed, and FOLDER/SETUP-R=NAME.pt tells the same of that

A setup is a stage of ZeRO and a dtype, `3-bfloat16`, with `-offload` behind them for the optimizer's state on the host.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from vogue import distributed
from vogue.config import load_config
from vogue.model import optimizer_state
from vogue.model.optimizer import deepspeed_settings, start_deepspeed

INFINITE = float("inf")


class Weights(nn.Module):
    """Weights of odd sizes, so that parts of them are padded and end anywhere; one is tied and one frozen."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {
            "first": (7, 3),
            "second": (5,),
            "third": (2, 3, 11),
            "one": (1,),
            "frozen": (4, 4),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.tied = self.first
        self.frozen.requires_grad_(False)

    def forward(self, x):
        """Each weight's gradient is its place in `x` times a row of numbers."""
        weights = (self.first, self.second, self.third, self.one)
        rows = (torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype).view_as(weight) for weight in weights)
        return sum(scale * (weight * row).sum() for scale, weight, row in zip(x, weights, rows, strict=True))


def engine_of(setup):
    stage, dtype, *offload = setup.split("-")
    given = ["model.path=some/model", f"model.dtype={dtype}", "optimizer.lr=1e-2", "optimizer.warmup_steps=9"]
    given += [f"trainer.deepspeed.zero_optimization.stage={stage}", "trainer.offload_optimizer=true"][
        : 1 + len(offload)
    ]
    if stage == "3":  # some weights stay whole, as small ones do, and several groups are updated in turns
        given += ["trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=6"]
        given += ["trainer.deepspeed.zero_optimization.sub_group_size=30"]
    if stage == "0" and dtype == "bfloat16":
        given += ["trainer.grad_accum_dtype=bfloat16"]
    distributed.start()
    config = load_config(None, given)
    model = Weights(getattr(torch, config.model.dtype))
    if stage == "3":
        deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_settings(config))
    return start_deepspeed(model, config)


def update(engine, *scales):
    """One update by two micro-batches."""
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    for i, sign in enumerate((1, 0.5)):
        engine.set_gradient_accumulation_boundary(i == 1)
        engine.backward(engine(sign * torch.tensor(scales, dtype=dtype)))
    engine.step()


def told(engine):
    """What DeepSpeed tells of every trained weight by its own means, of counts and of the rate."""
    found = {}
    for name, weight in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([weight]):
            found[name] = weight.detach().clone()
        if weight.requires_grad and engine.zero_optimization_stage():
            found[f"{name} master"] = safe_get_full_fp32_param(weight).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                if any(state for state in engine.basic_optimizer.state.values() if "step" in state):
                    found[f"{name} {key}"] = state_of(engine, weight, key)
    found["steps"] = {int(state["step"]) for state in engine.basic_optimizer.state.values()}
    found["rate"], found["skipped"], found["all"] = engine.get_lr(), engine.skipped_steps, engine.global_steps
    return found


def state_of(engine, weight, key):
    if engine.zero_optimization_stage() < 3 and not engine.optimizer._hp_optimizer_states_linked:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # which DeepSpeed does after an update
    return safe_get_full_optimizer_state(weight, key).clone()


def skips(setup):
    """Whether an update that isn't finite is skipped, which torch's own AdamW doesn't do."""
    return not setup.startswith("0-float32")


def write(folder, setup):
    engine = engine_of(setup)
    update(engine, 1.0, -2.0, 0.5, 3.0)
    if skips(setup):
        update(engine, INFINITE, 1.0, 1.0, 1.0)
    update(engine, -1.0, 0.25, 2.0, 1.0)
    _keep(engine, folder, f"{setup}-{dist.get_world_size()}")


def _keep(engine, folder, name):
    (folder / name).mkdir(exist_ok=True)
    index, _ = optimizer_state.write(engine, folder / name, dist.get_rank())
    parts = distributed.gather(index, optimizer_state.Stored, optimizer_state.Place)
    if dist.get_rank() == 0:
        optimizer_state.finish(engine, parts, folder / name)
    _tell(engine, folder / f"{name}.pt")


def read(folder, setup, name):
    engine = engine_of(setup)
    optimizer_state.read(engine, folder / name)
    _tell(engine, folder / f"{setup}-{dist.get_world_size()}={name}.pt")


def _tell(engine, path):
    before = told(engine)
    update(engine, 0.5, 1.0, -1.0, 2.0)
    after = told(engine)
    if dist.get_rank() == 0:
        torch.save({"before": before, "after": after}, path)
    dist.barrier()  # else a rank would read what another one still writes


if __name__ == "__main__":
    root, *wanted = sys.argv[1:]
    for one in wanted:
        (read if "=" in one else write)(Path(root), *one.split("="))
    distributed.leave(0)
