"""`vogue plan`: memory by arithmetic, against numbers worked out by hand, what autograd keeps, and a process's own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from ranks import environment

from vogue.cli import main
from vogue.config import load_config
from vogue.model.files import configured_model
from vogue.model.packing import Row, collate
from vogue.model.policy import Policy
from vogue.rollout.engine import Completion
from vogue.run.memory import check_engine, sequence_bytes
from vogue.run.model_sizes import Blocks, Layout, Sizes, sizes_of
from vogue.run.phase_memory import kept_bytes, phases
from vogue.run.plan import adapted, layout_of, make_plan, most, problems_of
from vogue.settings import ConfigError

ROOT = Path(__file__).parents[1]
BLOCK = Blocks(
    **{"layers": 10, "attending": 10, "hidden": 1000, "query": 1000, "key": 200, "key_heads": 4, "inner": 3000},
    **{"gated": True, "rms": True, "head_norms": False},
)
SIZES = Sizes(
    **{"weights": 8 * 10**9, "trained": 8 * 10**9, "vision_trained": True, "adapters": 0, "largest": 10**8},
    **{"vocabulary": 10**5, "text": BLOCK, "tower": replace(BLOCK, layers=1, gated=False, rms=False)},
    **{"patches": 4, "patch": 100, "token_pixels": 784, "token_cache": 1000, "checkpoint": 1, "saved": 16 * 10**9},
)
RUN = Layout(
    **{"ranks": 8, "nodes": 1, "on_gpu": True, "memory": 80e9, "item": 2, "grad_item": 2, "stage": 3},
    **{"offload_optimizer": False, "offload_params": False, "adapters": False, "save_merged": False},
    **{"checkpointing": False, "repeats_keys": False, "liger": False, "kept_logits": 0.0},
    **{"engine": "vllm", "engine_share": 0.4, "kv_cache": 1e9, "tensor_parallel": 1, "sleep": False},
    **{"prompts": 4, "updates": 1, "n": 4, "compares": True, "prompt": 200, "image": 100, "completion": 200},
    **{"budget": 1000, "shared_prefix": True, "steps": 10, "keep": 2, "sub_group": 10**9, "replayed": 0},
)
LORA = replace(SIZES, adapters=10**8, trained=10**8, vision_trained=False)


def parts(sizes, run, phase):
    (found,) = (item for item in phases(sizes, run) if item.name == phase)
    return found.parts


def held(sizes, run, phase="training"):
    """GB of what is held throughout."""
    found = parts(sizes, run, phase)
    return {name: found[name] / 1e9 for name in ("weights", "optimizer", "gradients") if name in found}


# ------------------------------------------------------------------------------------------------- held throughout


def test_zero_3_shares_sixteen_bytes_a_weight_over_the_ranks():
    # 8e9 weights, 2 + 12 + 2 bytes, by 8
    assert held(SIZES, RUN) == {"weights": 2, "optimizer": 12, "gradients": 2}
    assert held(SIZES, replace(RUN, grad_item=4)) == {"weights": 2, "optimizer": 12, "gradients": 4}
    assert held(SIZES, RUN, "rollout") == held(SIZES, RUN)


def test_with_zero_1_weights_are_whole_and_gradients_of_its_dtype_exist_in_training_alone():
    run = replace(RUN, stage=1)
    # 2 x 8e9 whole, and a rank's eighth of them twice, their sum and a copy
    assert held(SIZES, run) == {"weights": 16, "optimizer": 12, "gradients": 20}
    assert held(SIZES, run, "update") == {"weights": 16, "optimizer": 12, "gradients": 4}
    assert held(SIZES, run, "rollout") == {"weights": 16, "optimizer": 12}
    assert held(SIZES, replace(run, grad_item=4), "rollout") == {
        "weights": 16,
        "optimizer": 12,
        "gradients": 4,
    }  # a sum
    assert parts(SIZES, run, "sync")["gathered"] == 0


def test_adapters_alone_have_gradients_and_moments():
    run = replace(RUN, adapters=True)
    assert held(LORA, run) == pytest.approx({"weights": 2.025, "optimizer": 0.15, "gradients": 0.025})


def test_what_is_offloaded_is_in_the_nodes_memory():
    run = replace(RUN, offload_optimizer=True, offload_params=True)
    assert held(SIZES, run) == {}
    (training,) = (phase for phase in phases(SIZES, run) if phase.name == "training")
    # float32 master, two moments and a gradient, and the accumulated one: 18 bytes; weights 2, of all 8 ranks
    assert training.host == {"optimizer": 18 * 8e9, "weights": 2 * 8e9}
    half = next(phase for phase in phases(SIZES, replace(run, nodes=2)) if phase.name == "training")
    assert half.on_host == training.on_host / 2
    assert parts(SIZES, run, "update")["working"] == 0


def test_an_update_takes_a_float32_gradient_and_a_temporary_of_at_most_a_sub_group():
    assert parts(SIZES, RUN, "update")["working"] == 8e9  # 8 bytes of 1e9, the share of a rank
    assert parts(SIZES, replace(RUN, sub_group=10**8), "update")["working"] == 8e8


# --------------------------------------------------------------------------------------------------------- engine


def test_vllm_has_its_share_in_every_phase_unless_it_sleeps():
    assert {item.parts["engine"] for item in phases(SIZES, RUN)} == {32e9}
    engine = {item.name: item.parts.get("engine", 0) for item in phases(SIZES, replace(RUN, sleep=True))}
    asleep = {"training": 0, "update": 0, "save": 0, "sync": 16e9}  # of its weights alone in a sync
    assert engine == {"start": 32e9, "rollout": 32e9, **asleep}


def test_tensor_parallel_divides_the_engines_weights_and_keys_and_values():
    large = replace(SIZES, weights=20 * 10**9, trained=10**8)
    (told,) = problems_of(large, RUN)
    assert told == (
        "rollout.memory gives vLLM 32 GB, less than 40 GB for weights of 40 GB and one longest sequence of 0.4 MB"
    )
    assert problems_of(large, replace(RUN, tensor_parallel=2)) == []
    asleep = replace(RUN, tensor_parallel=4, sleep=True)
    assert parts(large, asleep, "sync")["engine"] == 10e9


def test_without_a_gpu_vllm_takes_its_weights_and_its_cache():
    run = replace(RUN, on_gpu=False, ranks=1, stage=1)
    assert parts(SIZES, run, "rollout")["engine"] == 17e9
    (told, _) = problems_of(SIZES, replace(run, kv_cache=1e5))
    assert told == "rollout.kv_cache_gb gives vLLM 0.1 MB, less than 0.4 MB for one longest sequence of 0.4 MB"


# ------------------------------------------------------------------------------------------------------ activations


def test_the_largest_micro_batch_holds_rows_of_the_longest_prompt_and_completions():
    assert (RUN.rows, RUN.tokens, RUN.predicted) == ((1, 4), 1000, 800)  # 200 + 4 x 200
    assert replace(RUN, budget=2500).rows == (2, 4)
    assert replace(RUN, budget=10**6).rows == (4, 4)  # a rank has no more
    assert replace(RUN, budget=10**6, updates=2).rows == (2, 4)
    assert replace(RUN, budget=700).rows == (1, 2)  # the prompt and as many completions as fit
    assert replace(RUN, budget=100).tokens == 400  # one is never cut
    assert replace(RUN, shared_prefix=False).rows == (2, 1)
    assert replace(RUN, budget=10**6, replayed=2).rows == (4, 6)  # which are trained on as the others


def test_what_autograd_keeps_of_a_token_in_one_layer():
    # bfloat16: norms 2 (4 + 2 + 2) 1000, attention 2 (2 x 1000 + 2 x 200), MLP 2 x 4 x 3000
    assert kept_bytes(BLOCK, RUN, trained=True) == 16_000 + 4_800 + 24_000
    assert kept_bytes(BLOCK, replace(RUN, repeats_keys=True), trained=True) == 16_000 + 8_000 + 24_000
    # Without a gradient for their weights norms keep 4 + 2; Liger's keep 2 + 2, and its MLP three of four
    assert kept_bytes(BLOCK, replace(RUN, adapters=True), trained=True) == 12_000 + 4_800 + 24_000
    assert kept_bytes(BLOCK, replace(RUN, liger=True), trained=True) == 8_000 + 4_800 + 18_000
    # float32, LayerNorm and an MLP without a gate: 2 (4 + 4) 1000, 4 x 2400, 4 x 2 x 3000
    assert kept_bytes(SIZES.tower, replace(RUN, item=4), trained=True) == 16_000 + 9_600 + 24_000


def test_checkpointing_keeps_the_layers_inputs_and_one_layer():
    tower = 8_000 + 4_800 + 12_000  # bytes a patch; a row has 100 tokens of images, 4 patches each
    whole = parts(SIZES, RUN, "training")["activations"]
    assert whole == 10 * 44_800 * 1000 + tower * 400
    run = replace(RUN, checkpointing=True)
    assert parts(SIZES, run, "training")["activations"] == 2 * 1000 * (10 * 1000 + 400) + 44_800 * 1000
    frozen = replace(SIZES, vision_trained=False)
    assert parts(frozen, run, "training")["activations"] == 2 * 1000 * 10 * 1000 + 44_800 * 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("freeze", [False, True])
def test_autograd_keeps_what_is_planned(dtype, freeze, config, new_model, preprocessor, samples):
    chosen = config(
        f"model.dtype={dtype}", f"model.freeze_vision={str(freeze).lower()}", "rollout.n=8", "rollout.prompts=1"
    )
    model = new_model(hidden_size=128, layers=6).to(getattr(torch, dtype))
    sizes = sizes_of(model, chosen)
    if freeze:
        model.model.visual.requires_grad_(False)
    policy = Policy(model, 1.0)
    view = preprocessor.view(samples[0].load_images())
    prompt = preprocessor.prompt(samples[0], view)
    completions = tuple(Completion(tuple(range(60, 90)), (0.0,) * 30, "", False) for _ in range(8))
    batch = collate([Row(prompt, {"raw": view}, "raw", completions, (torch.zeros(30),) * 8)], 0, token_mean=True)
    own, kept = {parameter.data_ptr() for parameter in policy.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch)
    images = sum(token == model.config.image_token_id for token in prompt.token_ids.tolist())
    run = replace(
        layout_of(chosen, sizes, 1, 1e9, on_gpu=False),
        **{"prompt": len(prompt.token_ids), "image": images, "completion": 29},
    )
    assert run.tokens == batch.input_ids.numel()
    assert parts(sizes, run, "training")["activations"] == pytest.approx(sum(kept.values()), rel=0.1)


def test_the_engines_room_is_reckoned_as_the_check_before_a_run_does(config, new_model):
    model = new_model()
    for settings, fits in (((), True), (("data.max_prompt_tokens=200", "rollout.max_tokens=312"), True), ((), False)):
        exact = sequence_bytes(model.config.get_text_config(), config(*settings)) / 1e9
        given = exact * (1.001 if fits else 0.999)
        chosen = config("rollout.engine=vllm", *settings, f"rollout.kv_cache_gb={given}")
        sizes = sizes_of(model, chosen)
        told = problems_of(sizes, layout_of(chosen, sizes, 1, 1e12, on_gpu=False))
        if fits:
            assert not told and check_engine(model, chosen)
            continue
        assert len(told) == 1 and told[0].startswith("rollout.kv_cache_gb gives vLLM")
        with pytest.raises(ConfigError, match=r"^rollout\.kv_cache_gb="):
            check_engine(model, chosen)


def test_a_reference_beside_the_policy_takes_its_weights_and_none_below_adapters(config, new_model):
    model = new_model()
    alone = sizes_of(model, config())
    beside, below = (sizes_of(model, config("kl.coef=0.1", *more)) for more in ((), ("lora.rank=4",)))
    assert (alone.reference, below.reference) == (0, 0)
    assert beside.reference == alone.weights
    assert held(replace(SIZES, reference=4 * 10**9), RUN)["weights"] == 3  # 2 bytes of 8e9 and 4e9, by 8


# --------------------------------------------------------------------------------------------------------- examples

SHAPES = {  # hidden size, layers, heads, heads of keys, width of the MLP, vocabulary, tied; and weights in 1e9
    "3B": ((2048, 36, 16, 2, 11008, 151936, True), 3.75),
    "7B": ((3584, 28, 28, 4, 18944, 152064, False), 8.29),
    "32B": ((5120, 64, 40, 8, 27648, 152064, False), 33.45),
}
VISION = {
    **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3},
    **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112},
    "fullatt_block_indexes": [7, 15, 23, 31],
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function: a folder with the config.json of Qwen2.5-VL-3B, 7B or 32B, and nothing else."""

    def write(name):
        hidden, layers, heads, keys, inner, vocabulary, tied = SHAPES[name][0]
        content = {
            **{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
            **{"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads},
            **{"num_key_value_heads": keys, "intermediate_size": inner, "vocab_size": vocabulary},
            **{"tie_word_embeddings": tied, "max_position_embeddings": 128000},
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": VISION | {"out_hidden_size": hidden},
        }
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_counted_from_the_configuration_alone(name, folder_of):
    model = configured_model(str(folder_of(name)))
    sizes = sizes_of(model, load_config(None, ["model.path=none"]))
    (hidden, layers, heads, keys, inner, vocabulary, _), billions = SHAPES[name]
    assert sizes.weights / 1e9 == pytest.approx(billions, abs=0.01)
    assert sizes.largest == vocabulary * hidden
    assert (sizes.text.layers, sizes.text.query, sizes.text.key) == (layers, 128 * heads, 128 * keys)
    assert (sizes.text.inner, sizes.tower.hidden, sizes.tower.gated, sizes.text.rms) == (inner, 1280, True, True)
    assert sizes.token_cache == 2 * layers * 128 * keys * 2


@pytest.mark.parametrize(
    ("kind", "attending", "tower"),  # of the text model's layers; width and MLP of the tower, and whether it is gated
    [
        (transformers.Qwen2VLConfig, 80, (1280, 4 * 1280, False)),
        (transformers.Qwen3VLConfig, 32, (1152, 4304, False)),
        (transformers.Qwen3_5Config, 8, (1152, 4304, False)),
        (transformers.LlavaOnevisionConfig, 32, (1152, 4304, False)),
        (transformers.Qwen3VLMoeConfig, 24, (1152, 4304, False)),
        (transformers.InternVLConfig, 32, (1024, 4096, False)),
        (transformers.Gemma3Config, 26, (768, 3072, False)),
        (transformers.Glm4vConfig, 40, (1536, 4096, True)),
        (transformers.Glm4vMoeConfig, 46, (1536, 4096, True)),
    ],
)
def test_every_family_has_sizes(kind, attending, tower):
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(kind())
    config = load_config(None, ["model.path=none"])
    sizes = sizes_of(model, config)
    assert sizes.text.attending == attending
    assert (sizes.tower.hidden, sizes.tower.inner, sizes.tower.gated) == tower
    run = layout_of(config, sizes, 8, 80e9, on_gpu=True)
    assert run.shared_prefix == (attending == sizes.text.layers)  # linear attention can't share a prompt
    assert all(phase.total > 0 for phase in phases(sizes, run))


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
PUBLISHED = {  # billions of weights, and those of one MLP that a token goes through, with its copies for experts
    "qwen3_vl_30b_a3b": (
        transformers.Qwen3VLMoeConfig(
            text_config={
                **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
                **{"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            },
            vision_config={"out_hidden_size": 2048},
        ),
        (31.07, 8 * 768, 8),
    ),
    "internvl3_8b": (
        transformers.InternVLConfig(
            text_config={
                **{"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
                **{"intermediate_size": 18944, "vocab_size": 151674, "model_type": "qwen2"},
            },
            tie_word_embeddings=False,
        ),
        (7.94, 18944, 0),
    ),
    "gemma3_4b": (
        transformers.Gemma3Config(
            text_config={"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
            vision_config=SO400M | {"image_size": 896, "patch_size": 14, "vision_use_head": False},
        ),
        (4.30, 10240, 0),
    ),
    "glm4_1v_9b": (transformers.Glm4vConfig(text_config={"tie_word_embeddings": False}), (10.29, 13696, 0)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_weights_as_they_are_said_to(name):
    config, (billions, inner, routed) = PUBLISHED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    settings = load_config(None, ["model.path=none"])
    sizes = sizes_of(model, settings)
    assert sizes.weights / 1e9 == pytest.approx(billions, abs=0.02)
    assert (sizes.text.inner, sizes.text.routed, sizes.text.gated) == (inner, routed, True)
    assert sizes.text.norms == (4 if name.startswith(("gemma", "glm")) else 2)
    # Tokens of one image of 448 x 448: 16 pixels a patch and 2 x 2 patches, or a square.
    small = layout_of(load_config(None, ["model.path=none", f"data.max_pixels={448**2}"]), sizes, 8, 80e9, on_gpu=True)
    assert small.image == {"qwen3": 196, "inter": 256, "gemma": 256, "glm4_": 256}[name[:5]]


def test_without_recomputed_activations_experts_stay_gathered():
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(PUBLISHED["qwen3_vl_30b_a3b"][0])
    found = []
    for recomputed in ("true", "false"):
        given = ["model.path=none", "trainer.updates=2", f"model.gradient_checkpointing={recomputed}"]
        config = load_config(None, given)
        sizes = sizes_of(model, config)
        run = layout_of(config, sizes, 8, 80e9, on_gpu=True)
        found.append([parts(sizes, run, name)["gathered"] / 1e9 for name in ("training", "old")])
    # In bfloat16: DeepSpeed's 10^9 weights at a time, or all 31.07e9 of them in the pass that keeps what it computes.
    assert found == [[2.0, 2.0], [pytest.approx(62.1, abs=0.1), 2.0]]


@pytest.mark.parametrize(
    ("example", "name", "ranks", "memory", "largest"),
    [
        ("qwen2_5_vl_3b_lora", "3B", 1, 24, 23.3),
        ("qwen2_5_vl", "7B", 8, 80, 65.1),
        ("qwen2_5_vl_32b_lora", "32B", 8, 80, 66.0),
    ],
)
def test_the_examples_fit_where_they_say(example, name, ranks, memory, largest, folder_of):
    config = load_config(ROOT / f"examples/{example}.yaml", [f"model.path={folder_of(name)}"])
    sizes = sizes_of(adapted(config), config)
    run = layout_of(config, sizes, ranks, memory * 1e9, on_gpu=True)
    assert problems_of(sizes, run) == []
    highest = max(phases(sizes, run), key=lambda phase: phase.total)
    assert highest.name == "training"
    assert highest.total / 1e9 == pytest.approx(largest, abs=0.05)
    assert f"{memory} GB" in (ROOT / f"examples/{example}.yaml").read_text()


def test_a_7b_on_one_gpu_is_told_that_adapters_would_fit(folder_of, capsys):
    command = ["plan", str(ROOT / "examples/qwen2_5_vl.yaml"), f"model.path={folder_of('7B')}", "--gpus", "1"]
    assert main([*command, "--memory", "80"]) == 1
    told = capsys.readouterr().out
    assert "it doesn't fit: update takes " in told
    assert "lora.rank=32: it fits, " in told
    assert "a checkpoint: 116 GB" in told  # 8.29e9 x (2 + 12)
    assert main([*command, "--memory", "80", "lora.rank=32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["updates"] == 400
    assert found["sizes"]["adapters"] == found["sizes"]["trained"] < 2e8


# ----------------------------------------------------------------------------------------------------- what is said


def test_the_most_that_fits_is_found():
    assert [most(start, 100, lambda n: n <= 37) for start in (1, 37, 38, 100, 200)] == [37] * 5
    assert most(3, 100, lambda n: True) == 100
    assert most(3, 100, lambda n: False) is None
    assert most(50, 100, lambda n: 20 <= n <= 60) == 60  # though fewer than 20 don't fit


def test_the_longest_completion_fits_and_one_more_token_does_not(folder_of):
    overrides = [f"model.path={folder_of('7B')}", "data.train=none"]
    config = load_config(ROOT / "examples/qwen2_5_vl.yaml", overrides)
    plan = make_plan(config, 8, 80e9, on_gpu=True)
    n = plan.longest_completion
    assert problems_of(plan.sizes, replace(plan.run, completion=n)) == []
    assert problems_of(plan.sizes, replace(plan.run, completion=n + 1)) != []
    m = plan.largest_micro_batch
    assert problems_of(plan.sizes, replace(plan.run, budget=m)) == []
    assert problems_of(plan.sizes, replace(plan.run, budget=m + 1)) != []


def test_a_cpu_run_is_planned_against_this_machines_memory(settings, capsys):
    assert main(["plan", *settings]) == 0
    told = capsys.readouterr().out
    assert "it fits: " in told
    assert "ZeRO-1 on 1 rank of CPUs" in " ".join(told.split())
    assert main(["train", "--check", *settings]) == 0
    assert "takes most, about " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["model.path=no/model"], "model.path=no/model: no such folder, and its config.json isn't in the hub"),
        (["model.path=/nowhere"], "model.path=/nowhere: no such folder"),
        (["--gpus", "8"], "--gpus 8: there is no GPU here; --memory says how many GB each of them has"),
        (["rollout.max_tokens=9000"], "data.max_prompt_tokens=128 and rollout.max_tokens=9000 are 9128 together"),
    ],
)
def test_what_can_not_be_planned_is_said(given, told, settings, capsys):
    assert main(["plan", *settings, *given]) == 2
    assert capsys.readouterr().err.startswith(f"vogue plan: {told}")


# ------------------------------------------------------------------------------------------------------ measurements


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_takes_what_was_planned(dtype):
    command = [sys.executable, ROOT / "bench/plan.py", "--hidden", "448", "--dtype", dtype]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    ratios = {line.split()[3]: float(line.split()[-1]) for line in done.stdout.splitlines()[1:]}
    assert ratios.keys() == {"rollout", "training", "update", "sync", "save"}
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios
