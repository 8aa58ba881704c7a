"""What is told of `trainer.deepspeed` before DeepSpeed starts."""

import pytest

from vogue.config import load_config
from vogue.model.deepspeed_check import deepspeed_problems
from vogue.model.optimizer import own_settings


def problems(*overrides):
    given = [f"trainer.deepspeed.{text}" for text in overrides]
    config = load_config(None, ["model.path=some/model", *given])
    return deepspeed_problems(config.trainer.deepspeed, own_settings(config))


@pytest.mark.parametrize(
    "override",
    [
        "zero_optimization.stage=3",
        "zero_optimization.stage3_param_persistence_threshold=0",
        "zero_optimization.offload_optimizer.device=cpu",
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
