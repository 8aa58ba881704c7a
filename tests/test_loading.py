"""The model that is partitioned as it is loaded, against the one that `from_pretrained` makes by itself."""

import json

import deepspeed
import pytest
import torch
from ranks import launch
from safetensors.torch import load_file, save_file
from test_families import random_model
from transformers import AutoModelForImageTextToText

from vogue import distributed
from vogue.config import load_config
from vogue.families import FAMILIES
from vogue.model.loading import load_model
from vogue.model.lora import saved_buffers
from vogue.model.optimizer import deepspeed_settings
from vogue.model.weights import gathered_weights
from vogue.settings import ConfigError

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
    buffers, saved = dict(whole.named_buffers()), saved_buffers(whole)
    weights = dict(whole.named_parameters()) | saved
    for name, weight in gathered_weights(model):
        expected = weights.pop(name)
        assert weight.dtype == expected.dtype == (torch.float32 if name in saved else getattr(torch, dtype)), name
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
    assert deepspeed_settings(plain)["zero_optimization"]["stage"] == 1
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
STAGES = ["trainer.deepspeed.zero_optimization.stage=3", "trainer.deepspeed.zero_optimization.stage=0"]


def edit(folder, **changes):
    """Save the model's weights again, some of them changed, or dropped where they become None."""
    weights = load_file(folder / "model.safetensors") | {name.replace("__", "."): w for name, w in changes.items()}
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder, name, index):
    weight = load_file(folder / "model.safetensors")[name]
    weight.view(-1)[index] = float("nan")
    return {name.replace(".", "__"): weight}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model__norm__weight": torch.ones(63)}, f"of config.json: {NORM} [63], not [64]"),
        ({"model__norm__weight": None}, f"the checkpoint lacks {NORM}"),
        ({"model__extra__lora_A": torch.ones(3)}, "has no place for: model.language_model.extra.lora_A"),
        ({"model__norm__weight": torch.full((64,), float("inf"))}, f"NaN or infinity in {NORM}"),
        ({"lm_head__weight": torch.ones(320, 64)}, "lm_head.weight differs from it: set tie_word_embeddings=false"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_is_refused_with_the_weights_name(change, told, stage, new_model, tmp_path):
    distributed.start()
    new_model().save_pretrained(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ConfigError) as error:
        load_model(settings(tmp_path, stage), CPU)
    assert str(error.value).startswith(f"model.path={tmp_path}: ")
    assert str(error.value).endswith(told)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "visual.patch_embed.proj.weight"])
def test_one_element_that_is_nan_is_found_in_trained_and_frozen_weights(name, index, stage, new_model, tmp_path):
    distributed.start()
    new_model().save_pretrained(tmp_path)
    edit(tmp_path, **with_nan(tmp_path, name, index))
    with pytest.raises(ConfigError, match=f"NaN or infinity in model.*{name.partition('.')[2]}$"):
        load_model(settings(tmp_path, stage, "model.freeze_vision=true"), CPU)


def test_of_many_missing_weights_a_few_are_named_and_the_others_counted(new_model, tmp_path):
    distributed.start()
    new_model().save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "layers.0" in name]
    edit(tmp_path, **{name.replace(".", "__"): None for name in names})
    with pytest.raises(ConfigError, match=f", .*, .* and {len(names) - 3} more$"):
        load_model(settings(tmp_path), CPU)


RANKS_NAN = """
import sys
from vogue import distributed
from vogue.config import load_config
from vogue.model.loading import load_model
from vogue.settings import ConfigError

(folder,) = [text for text in sys.argv[1:] if not text.startswith("--")]
rank, _, device = distributed.start()
try:
    load_model(load_config(None, [f"model.path={folder}", "model.dtype=float32"]), device)
except ConfigError as error:
    print(f"rank {rank}: {error}", flush=True)
distributed.leave(0)
"""


@pytest.mark.long
def test_all_ranks_refuse_what_one_of_them_holds_and_none_the_padding_of_its_share(new_model, tmp_path):
    script, folder = tmp_path / "nan.py", tmp_path / "model"
    script.write_text(RANKS_NAN)
    new_model().save_pretrained(folder)
    assert "NaN" not in launch(3, script, folder)  # 64 elements in three shares: the last one is padded
    edit(folder, **with_nan(folder, SAVED_NORM, -1))
    told = launch(3, script, folder)
    assert all(f"rank {rank}: model.path={folder}: NaN or infinity in {NORM}" in told for rank in range(3))


PEAK = """
import sys, torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
from transformers import AutoModelForImageTextToText
from vogue import distributed
from vogue.model.weights import gathered_weights
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
