"""What some families of models have that others don't: experts, tokens around images, images that see both ways."""

import copy
from pathlib import Path

import kinds
import peft
import pytest
import torch
from kinds import processor_of, save_as_published
from partitioned import loss
from PIL import Image
from ranks import launch
from safetensors.torch import load_file
from test_families import assert_equal_to_separate_rows, random_model, row_of

from vogue import distributed
from vogue.config import load_config
from vogue.config.training_sections import LoraConfig
from vogue.data import Sample
from vogue.inputs import Preprocessor
from vogue.model import lora
from vogue.model.attention import layer_masks
from vogue.model.files import check_experts, read_checkpoint
from vogue.model.loading import load_model
from vogue.model.packing import collate
from vogue.model.policy import Policy
from vogue.model.weights import gathered_weights
from vogue.rollout.engine import media_token_ids
from vogue.run.memory import check_images
from vogue.settings import ConfigError

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------------ prompts


@pytest.fixture
def own_processor(processor):
    """A function: a family's own processor."""
    return lambda kind: processor_of(kind, copy.deepcopy(processor.tokenizer), processor.chat_template)


@pytest.mark.parametrize("kind", ["internvl", "gemma3", "glm4v"])
@pytest.mark.parametrize("sizes", [[(28, 28)], [(60, 130)], [(130, 60), (28, 28)]], ids=str)
def test_prompts_have_the_tokens_and_pixels_of_the_familys_own_processor(kind, sizes, own_processor):
    own = own_processor(kind)
    images = [Image.effect_noise((width, height), 90).convert("RGB") for height, width in sizes]
    sample = Sample("Is <image> in it?" * len(images), "no", tuple(images))
    preprocessor = Preprocessor(own, "Think.", 512)
    view = preprocessor.view(images)
    prompt = preprocessor.prompt(sample, view)
    user = [part for _ in images for part in (text("Is "), {"type": "image"}, text(" in it?"))]
    messages = [{"role": "system", "content": [text("Think.")]}, {"role": "user", "content": user}]
    written = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = own(images=[images], text=[written], return_tensors="pt")
    assert prompt.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(view.pixel_values, theirs["pixel_values"])
    assert preprocessor.family.pixel_counts(view.sizes).sum() == len(view.pixel_values)
    assert preprocessor.lengths([sample]) == [len(prompt.token_ids)]
    assert [int(prompt.token_types[a : a + n].sum()) for a, n in prompt.image_spans] == [
        n for _, n in prompt.image_spans
    ]
    assert prompt.token_types.sum() == sum(n for _, n in prompt.image_spans) == sum(preprocessor.image_tokens(sample))


def text(content):
    return {"type": "text", "text": content}


@pytest.mark.parametrize("kind", ["internvl", "gemma3", "glm4v"])
def test_a_question_that_spells_an_images_token_shows_no_image(kind, own_processor):
    own = own_processor(kind)
    preprocessor = Preprocessor(own, "", 512)
    spelt = f"What is {own.image_token}?"
    view = preprocessor.view([Image.new("RGB", (28, 28))])
    prompt = preprocessor.prompt(Sample(spelt, "a token", view.images), view)
    assert len(prompt.image_spans) == 1
    assert spelt in own.tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("internvl", {"<img>", "</img>", "<IMG_CONTEXT>", "<video>"}),
        ("gemma3", {"<start_of_image>", "<end_of_image>", "<image_soft_token>"}),
        ("glm4v", {"<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>"}),
    ],
)
def test_no_token_of_an_image_is_sampled(kind, tokens, own_processor):
    own = own_processor(kind)
    assert tokens <= {*own.tokenizer.convert_ids_to_tokens(media_token_ids(own))}


def test_a_processor_of_no_family_is_refused_by_name(own_processor):
    with pytest.raises(ValueError, match=r"^Tokenizer is of no family known here; their processors are: Qwen2VLProc"):
        Preprocessor(type("Tokenizer", (), {"tokenizer": own_processor("glm4v").tokenizer})(), "", 512)


# ------------------------------------------------------------------------------------ Gemma 3: windows, and both ways


def test_a_token_sees_its_image_its_window_and_no_other_completion():
    # A prompt of a text token, an image's two and a text token; completions of two and one; a pad.
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1]])
    types = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]])
    found = layer_masks("sdpa", segments, types, positions, window=3)
    full = [
        "1.......",
        "111.....",  # the image's first token sees its second
        "111.....",
        "1111....",
        "11111...",
        "111111..",
        "1111..1.",  # the second completion sees the prompt and itself
        ".......1",
    ]
    near = [
        "1.......",
        "111.....",
        "111.....",
        ".111....",
        "..111...",  # at position 4: from 2 on
        "...111..",
        "..11..1.",  # at position 4 too
        ".......1",
    ]
    for name, expected in (("full_attention", full), ("sliding_attention", near)):
        assert ["".join(".1"[value] for value in row) for row in found[name][0, 0].int().tolist()] == expected


def test_two_images_side_by_side_with_text_between_do_not_see_each_other():
    types = torch.tensor([[1, 1, 0, 1, 1]])
    segments = torch.zeros_like(types)
    found = layer_masks("sdpa", segments, types, torch.arange(5)[None], window=9)["full_attention"][0, 0]
    assert found.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1] * 5, [1] * 5]


@pytest.mark.parametrize("window", [2, 3, 8])
def test_windows_that_cut_images_and_prompts_change_no_logprob(window, monkeypatch, no_float32):
    monkeypatch.setattr(kinds, "WINDOW", window)
    assert_equal_to_separate_rows("gemma3", torch.float64, 1e-9)


def test_attention_without_masks_is_refused_where_images_see_both_ways():
    for attention in ("flash_attention_2", "shared_prefix"):
        with pytest.raises(ConfigError, match=rf"^model\.attention={attention}: it takes no mask"):
            Policy(random_model("gemma3", torch.float32), 1.0, attention=attention)
    policy = assert_equal_to_separate_rows("gemma3", torch.float32, 1e-5, attention="eager")
    assert policy.why_separate == "eager attention takes no mask of that kind"


def test_a_gemma_that_caps_its_logits_is_refused(tmp_path):
    model = random_model("gemma3", torch.float32)
    model.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match=r"final_logit_softcapping=30\.0 isn't supported"):
        Policy(copy.deepcopy(model), 1.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: final_logit_softcapping=30\.0"):
        read_checkpoint(str(tmp_path))


def test_vllm_on_a_cpu_is_refused_for_images_that_see_both_ways():
    if torch.cuda.is_available():
        pytest.skip("a GPU's attention does it")
    for kind in ("gemma3", "internvl"):
        family = Policy(random_model(kind, torch.float32), 1.0).family
        if kind == "gemma3":
            with pytest.raises(ConfigError, match=r"^rollout\.engine=vllm: on a CPU .*set rollout\.engine=hf$"):
                check_images(family)
        else:
            check_images(family)


# ------------------------------------------------------------------------------------------------------------ experts


@pytest.fixture
def experts_folder(tmp_path):
    """A Qwen3-VL-MoE as those on the hub lie."""
    save_as_published("qwen3_vl_moe", random_model("qwen3_vl_moe", torch.float32), tmp_path)
    return tmp_path


def config_for(folder, *overrides):
    return load_config(None, [f"model.path={folder}", "model.dtype=float32", *overrides])


@pytest.mark.parametrize("stage", [0, 3])
def test_experts_are_written_as_they_lie_on_the_hub_partitioned_or_not(stage, experts_folder, tmp_path):
    distributed.start()
    model = load_model(config_for(experts_folder, f"trainer.deepspeed.zero_optimization.stage={stage}"), CPU)
    model.save_pretrained(tmp_path / "again", state_dict={name: w.clone() for name, w in gathered_weights(model)})
    before, after = (load_file(folder / "model.safetensors") for folder in (experts_folder, tmp_path / "again"))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert before[name].shape == (4, 64, 2 * 96)  # (experts, in, out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_experts_that_lie_as_transformers_holds_them_are_refused_for_vllm(experts_folder, tmp_path):
    check_experts(read_checkpoint(str(experts_folder)))
    random_model("qwen3_vl_moe", torch.float32).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"mlp\.experts\.down_proj.* and 3 more lie as .*\(experts, in, out\)"):
        check_experts(read_checkpoint(str(tmp_path / "other")))


def test_experts_whose_sides_cannot_be_told_apart_are_refused(tmp_path):
    model = random_model("qwen3_vl_moe", torch.float32)
    model.config.text_config.moe_intermediate_size = 32  # 2 x 32 is hidden_size
    with pytest.raises(ConfigError, match="hidden_size=64 and moe_intermediate_size=32 make experts' weights square"):
        Policy(model, 1.0)


def test_adapters_are_of_linear_layers_and_experts_stay_as_they_are(tmp_path):
    model = random_model("qwen3_vl_moe", torch.float32)
    expected = dict(model.named_parameters())
    lora.add_adapters(model, LoraConfig(rank=2, alpha=4.0), seed=0)
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in lora.adapter_parameters(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    merged = {whole.name: whole.merged() for whole in lora.whole_parameters(model)}
    assert merged.keys() == expected.keys()
    assert torch.equal(merged[f"{EXPERTS}.down_proj"], expected[f"{EXPERTS}.down_proj"])
    with pytest.raises(ConfigError, match=r"no layer is called gate_up_proj; there are"):
        lora.add_adapters(random_model("qwen3_vl_moe"), LoraConfig(rank=2, target_modules=["gate_up_proj"]), seed=0)
    of_experts = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    peft.get_peft_model(random_model("qwen3_vl_moe", torch.float32), of_experts).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has target_parameters, which isn't supported"):
        lora.add_adapters(random_model("qwen3_vl_moe"), LoraConfig(adapter=tmp_path), seed=0)


EXPERTS = "model.language_model.layers.0.mlp.experts"


def test_experts_that_no_token_visits_have_a_gradient_of_zero():
    """Else a rank of ZeRO-3 would wait for the others."""
    model = random_model("qwen3_vl_moe", torch.float32)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.gate.weight.zero_()  # all as likely: every token goes to the same two of four
    batch = collate([row_of(model, "qwen3_vl_moe", 1, [10, 11, 12])], 0, token_mean=True)
    Policy(model, 1.0)(batch).logprob.sum().backward()
    gradient = dict(model.named_parameters())[f"{EXPERTS}.down_proj"].grad
    visited = gradient.flatten(1).any(dim=1)
    assert visited.sum() == 2


KINDS = ("qwen3_vl_moe", "internvl", "gemma3", "glm4v", "glm4v_moe")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_text_model_and_tower_are_merged_into_weights_of_the_models_own_names(kind):
    plain = random_model(kind, torch.float32)
    batch = collate([row_of(plain, kind, 2, [10, 11, 12], [20, 21])], 0, token_mean=True)
    model = copy.deepcopy(plain)
    lora.add_adapters(model, LoraConfig(rank=2, alpha=4.0, vision=True), seed=0)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter.normal_(std=0.1)
    merged = {whole.name: whole.merged() for whole in lora.whole_parameters(model)}
    adapted = Policy(model, 1.0)(batch).logprob
    assert not torch.allclose(Policy(copy.deepcopy(plain), 1.0)(batch).logprob, adapted, atol=1e-2)
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(Policy(plain, 1.0)(batch).logprob, adapted, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------------------------ ZeRO-3's ranks


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [KINDS[::2], pytest.param(KINDS[1::2], marks=pytest.mark.long)], ids=" ".join)
def test_two_ranks_one_without_an_image_have_the_gradients_of_one(kinds, tmp_path):
    expected = {}
    for kind in kinds:
        model = random_model(kind, torch.float32)
        rows = [row_of(model, kind, 2, [10, 11, 12], [20, 21]), row_of(model, kind, 1, [30, 31], images=False)]
        batches = [collate([row], 0, token_mean=True) for row in rows]
        save_as_published(kind, model, tmp_path / kind / "model")
        torch.save(batches, tmp_path / kind / "batches.pt")
        policy = Policy(model, 1.0)
        (sum(loss(policy(batch).logprob) for batch in batches) / 2).backward()
        expected[kind] = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    launch(2, Path(__file__).with_name("partitioned.py"), tmp_path)
    for kind in kinds:
        found = torch.load(tmp_path / kind / "gradients.pt")
        assert found.keys() >= expected[kind].keys()
        least = 1e-2 * max(gradient.norm() for gradient in expected[kind].values())
        for name, gradient in expected[kind].items():
            assert (found[name] - gradient).norm() <= 1e-4 * max(gradient.norm(), least), (kind, name)
