"""What is told of `trainer.deepspeed` before DeepSpeed starts."""

import pytest

from vogue.config import load_config
from vogue.model.deepspeed_check import deepspeed_problems
from vogue.model.optimizer import own_settings


def problems(*overrides, settings=()):
    given = [f"trainer.deepspeed.{text}" for text in overrides]
    config = load_config(None, ["model.path=some/model", *settings, *given])
    return deepspeed_problems(config.trainer.deepspeed, own_settings(config))


@pytest.mark.parametrize(
    "override",
    [
        "zero_optimization.stage=3",
        "zero_optimization.stage3_param_persistence_threshold=0",
        "zero_optimization.offload_optimizer.device=none",
        "wall_clock_breakdown=true",
        "flops_profiler.enabled=true",
        "activation_checkpointing.partition_activations=true",
        "data_types.grad_accum_dtype=fp32",
        "communication_data_type=bf16",
        "gradient_clipping=1.0",  # as vogue sets it
    ],
)
def test_what_deepspeed_knows_is_fine(override):
    assert problems(override) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "zero_optimisation.stage=3",
            "zero_optimisation: DeepSpeed has no such setting; did you mean zero_optimization?",
        ),
        ("frobnicate=3", "frobnicate: DeepSpeed has no such setting"),
        (
            "zero_optimization.stagee=3",
            "zero_optimization.stagee: DeepSpeed has no such setting; did you mean stage?",
        ),
        (
            "zero_optimization.stage3_max_live_parameter=1",
            "zero_optimization.stage3_max_live_parameter: DeepSpeed has no such setting; did you mean "
            "stage3_max_live_parameters?",
        ),
        ("zero_optimization.offload_param.devise=cpu", "zero_optimization.offload_param.devise: DeepSpeed has no such"),
        ("zero_optimization.stage=9", "zero_optimization.stage=9: input should be one of 0, 1, 2, 3"),
        ("zero_optimization.stage=three", "zero_optimization.stage='three': input should be one of 0, 1, 2, 3"),
        ("zero_optimization.offload_param.device=gpu", "zero_optimization.offload_param.device='gpu': input should be"),
        ("zero_optimization=3", "zero_optimization=3: must be a section"),
        (
            "flops_profiler.enabledd=true",
            "flops_profiler.enabledd: DeepSpeed has no such setting; did you mean enabled?",
        ),
        ("data_types.grad_accum_dtyp=fp32", "data_types.grad_accum_dtyp: DeepSpeed has no such setting; did you mean"),
        ("bf16.enable=true", "bf16.enable: DeepSpeed has no such setting; did you mean enabled?"),
        ("prescale_gradients=maybe", "prescale_gradients='maybe': must be of the kind of its default, False"),
        ("bf16.enabled=false", "bf16.enabled=False: vogue sets that itself; its own setting is model.dtype"),
        ("fp16.enabled=true", "fp16={'enabled': True}: vogue sets that itself; its own setting is model.dtype"),
        (
            "gradient_clipping=2",
            "gradient_clipping=2: vogue sets that itself; its own setting is optimizer.max_grad_norm",
        ),
        ("optimizer.type=Adam", "optimizer={'type': 'Adam'}: vogue sets that itself; its own setting is optimizer.lr"),
        (
            "data_types.grad_accum_dtype=bf16",
            "data_types.grad_accum_dtype=bf16: vogue sets that itself; its own setting is trainer.grad_accum_dtype",
        ),
        (
            "zero_optimization.offload_optimizer.device=cpu",
            "zero_optimization.offload_optimizer.device=cpu: set trainer.offload_optimizer=true, which this may only",
        ),
        (
            "zero_optimization.offload_param.device=nvme",
            "zero_optimization.offload_param.device=nvme: set trainer.offload_params=true, which this may only refine",
        ),
        (
            "zero_optimization.offload_optimizer.device=nvme",
            "zero_optimization.offload_optimizer.device=nvme: no checkpoint can be written of what lies there",
        ),
        ("train_batch_size=8", "train_batch_size=8: vogue sets that itself; its own setting is rollout.prompts"),
    ],
)
def test_what_deepspeed_would_ignore_or_refuse_is_one_sentence(override, told):
    (problem,) = problems(override)
    assert problem.startswith(f"trainer.deepspeed.{told}")
    assert "\n" not in problem


def test_all_misspelt_settings_are_told_at_once():
    assert len(problems("zero_optimisation.stage=3", "wall_clock_brakedown=true", "flops_profiler.enabledd=true")) == 3
    refused = problems("zero_optimization.stage=9", "zero_optimization.stagee=3", "wall_clock_brakedown=true")
    assert [text.split(":")[0].removeprefix("trainer.deepspeed.") for text in refused] == [
        "zero_optimization.stage=9",
        "zero_optimization.stagee",
        "wall_clock_brakedown",
    ]


def test_what_deepspeed_has_dropped_is_told_in_its_own_words():
    (problem,) = problems("nebula.enabled=true")
    assert "Nebula checkpointing has been removed" in problem


OFFLOADED = "trainer.offload_optimizer=true", "trainer.offload_params=true"


def test_what_is_offloaded_may_be_refined():
    zero = "zero_optimization"
    assert problems(settings=OFFLOADED) == []
    assert problems(f"{zero}.offload_optimizer.ratio=0.5", f"{zero}.stage=3", settings=OFFLOADED) == []
    assert problems(f"{zero}.stage=2", settings=OFFLOADED[:1]) == []


@pytest.mark.parametrize(
    ("setting", "stage", "told"),
    [
        ("trainer.offload_params=true", 2, "trainer.offload_params=true needs 3"),
        ("trainer.offload_optimizer=true", 0, "trainer.offload_optimizer=true needs 1, 2 or 3"),
        ("trainer.grad_accum_dtype=float32", 0, "trainer.grad_accum_dtype=float32 needs 1, 2 or 3 with model.dtype="),
    ],
)
def test_what_zeros_stage_cannot_do_is_told(setting, stage, told):
    (problem,) = problems(f"zero_optimization.stage={stage}", settings=[setting])
    assert problem.startswith(f"trainer.deepspeed.zero_optimization.stage={stage}: {told}")


def test_without_a_setting_the_sums_are_float32_where_deepspeed_can():
    assert problems("zero_optimization.stage=0") == []
    assert problems("zero_optimization.stage=0", settings=["model.dtype=float32"]) == []
    assert (
        problems("zero_optimization.stage=0", settings=["model.dtype=float32", "trainer.grad_accum_dtype=float32"])
        == []
    )
