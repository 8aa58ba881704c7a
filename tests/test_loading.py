"""The model that is partitioned as it is loaded, against the one that `from_pretrained` makes by itself."""

import json

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engines import launch
from test_families import random_model
from transformers import AutoModelForImageTextToText

from vogue import distributed
from vogue.config import load_config
from vogue.families import FAMILIES
from vogue.model.checkpoint import gathered_weights
from vogue.model.loading import load_model
from vogue.model.optimizer import deepspeed_settings

CPU = torch.device("cpu")


def settings(folder, *overrides):
    stage = "trainer.deepspeed.zero_optimization.stage=3"  # which a single rank has to ask for
    return load_config(None, [f"model.path={folder}", "model.dtype=float32", stage, *overrides])


def is_partitioned(model):
    (found,) = {hasattr(parameter, "ds_id") for parameter in model.parameters()}
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_partitioned_model_has_the_weights_and_buffers_of_a_whole_one(kind, dtype, tmp_path):
    distributed.start()
    random_model(kind, torch.float32).save_pretrained(tmp_path)
    model = load_model(settings(tmp_path, f"model.dtype={dtype}"), CPU)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa")
    assert is_partitioned(model)
    assert not is_partitioned(whole)  # nor would a rollout engine's model be
    weights, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
    for name, weight in gathered_weights(model):
        expected = weights.pop(name)
        assert weight.dtype == expected.dtype == getattr(torch, dtype), name
        assert torch.equal(weight, expected), name
    assert not weights
    assert any(buffer.dtype == torch.float32 for buffer in buffers.values())  # the rotary frequencies, in bfloat16 too
    for name, buffer in model.named_buffers():
        expected = buffers.pop(name)
        assert buffer.dtype == expected.dtype, name
        assert torch.equal(buffer, expected), name
    assert not buffers
    assert model.config.to_dict() == whole.config.to_dict()
    assert not model.training


def test_a_layer_rounds_alike_with_and_without_gradient(new_model, tmp_path):
    distributed.start()
    new_model().save_pretrained(tmp_path)
    model = load_model(settings(tmp_path, "model.dtype=bfloat16"), CPU)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    # Three dimensions: here a fused bias is rounded once, an added one twice.
    inputs = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0):
        layer.bias.data.normal_(0, 3)
        with_gradient = layer(inputs)
        with torch.no_grad():
            assert torch.equal(layer(inputs), with_gradient)
        whole = torch.nn.Linear(64, layer.out_features, dtype=torch.bfloat16)
        whole.load_state_dict(layer.state_dict())
        assert not torch.equal(whole(inputs), with_gradient)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(new_model, tmp_path):
    distributed.start()
    tied = new_model()
    tied.save_pretrained(tmp_path / "tied")
    tied.config.tie_word_embeddings = tied.config.text_config.tie_word_embeddings = False
    untied = type(tied)(tied.config)
    untied.save_pretrained(tmp_path / "untied")
    for name, expected in {"tied": True, "untied": False}.items():
        model = load_model(settings(tmp_path / name), CPU)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == expected
    assert torch.equal(dict(gathered_weights(model))["lm_head.weight"], untied.lm_head.weight)


def test_a_single_rank_partitions_nothing_unless_it_asks_for_it(new_model, tmp_path):
    distributed.start()
    new_model().save_pretrained(tmp_path)
    plain = load_config(None, [f"model.path={tmp_path}", "model.dtype=float32"])
    assert not is_partitioned(load_model(plain, CPU))
    assert deepspeed_settings(plain)["zero_optimization"] == {"stage": 1}
    offload = "trainer.deepspeed.zero_optimization.offload_param.device=cpu"
    asking = load_config(None, [f"model.path={tmp_path}", offload])
    assert deepspeed_settings(asking)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("stage", [0, 2])
def test_a_model_of_another_stage_is_whole(stage, new_model, tmp_path):
    distributed.start()
    new_model().save_pretrained(tmp_path)
    config = settings(tmp_path, f"trainer.deepspeed.zero_optimization.stage={stage}")
    assert not is_partitioned(load_model(config, CPU))


NORM, SAVED_NORM = "model.language_model.norm.weight", "model.norm.weight"  # here, and as Qwen2.5-VL's files have it


def test_a_weight_of_another_shape_is_refused_with_its_name(new_model, tmp_path, caplog):
    distributed.start()
    new_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {SAVED_NORM: torch.ones(63)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_model(settings(tmp_path), CPU)
    assert f"{NORM} | MISMATCH" in caplog.text


def test_a_missing_weight_is_initialised_and_told(new_model, tmp_path, caplog):
    distributed.start()
    expected = new_model()
    expected.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[SAVED_NORM]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = dict(gathered_weights(load_model(settings(tmp_path), CPU)))
    assert f"{NORM} | MISSING" in caplog.text
    assert torch.equal(loaded.pop(NORM), torch.ones(64))
    assert all(torch.equal(weight, expected.get_parameter(name)) for name, weight in loaded.items())


PEAK = """
import sys, torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
from transformers import AutoModelForImageTextToText
from vogue import distributed
from vogue.model.checkpoint import gathered_weights
from vogue.config import load_config
from vogue.model.loading import load_model

# argv: the model's folder
(folder,) = [text for text in sys.argv[1:] if not text.startswith("--")]

def resident(which):  # bytes, mapped files included
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows[which].split()[0]) * 1024

rank, _, device = distributed.start()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = resident("VmRSS")
model = load_model(load_config(None, [f"model.path={folder}", "model.dtype=float32"]), device)
size = 4 * sum(p.ds_numel for p in model.parameters())
shares = distributed.gather((resident("VmHWM") - before) / size)
assert size > 200e6, size
expected = dict(AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").named_parameters())
for name, weight in gathered_weights(model):
    assert torch.equal(weight, expected.pop(name)), name
assert not expected
if rank == 0:
    print("shares held:", shares)
distributed.leave(0)
"""


@pytest.mark.slow
def test_each_of_two_ranks_holds_little_more_than_its_half_while_loading(new_model, tmp_path, monkeypatch):
    new_model(hidden_size=1024, layers=5).save_pretrained(tmp_path / "model", max_shard_size="20MB")
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")  # what was freed goes back to the system and isn't counted
    (line,) = [line for line in launch(2, script, tmp_path / "model").splitlines() if "shares held:" in line]
    shares = json.loads(line.partition("held:")[2])
    assert len(shares) == 2
    # Half the model, and some 80 MB that loading takes whatever its size; whoever held it whole would be above 1.
    assert all(0.4 < share < 1 for share in shares), shares
