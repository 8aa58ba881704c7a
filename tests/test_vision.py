"""The vision tower: windows in few calls of attention, against a mask, and patches as one product, against Conv3d."""

import copy

import pytest
import torch
from test_families import random_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from vogue.families import FAMILIES
from vogue.model import vision
from vogue.model.vision import WINDOWS, PatchProjection, prepare_tower, windows_attention

TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v")
# In patches. In windows of 8 x 8, as Qwen2.5-VL's: of 64, 16, 64 and 8 patches.
SIZES = torch.tensor([[1, 10, 8], [1, 8, 8], [1, 2, 4]])


def features(model):
    """What the tower makes of `SIZES`, one after the other."""
    patch = model.config.vision_config.patch_size
    pixels = torch.rand(int(SIZES.prod(1).sum()), 3 * 2 * patch**2, generator=torch.Generator().manual_seed(0))
    found = model.model.get_image_features(pixels.to(model.dtype), SIZES, return_dict=True)
    return torch.cat(list(found.pooler_output))


def prepared(model):
    twin = copy.deepcopy(model)
    prepare_tower(twin, FAMILIES[model.config.model_type])
    return twin


@pytest.mark.parametrize("lengths", [[4, 4, 4], [6, 2, 6, 1], [7]], ids=str)
def test_windows_attend_to_themselves_alone(lengths):
    generator = torch.Generator().manual_seed(0)
    query, key, value = inputs = [
        torch.randn(1, 2, sum(lengths), 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)
    ]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ours, _ = windows_attention(nn.Module(), *inputs, None, 0.3, cu_seq_lens_q=ends, max_length_q=max(lengths))
    window = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    mask = window[:, None] == window
    whole = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert (ours - whole).abs().max() < 1e-12
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((weights * output).sum(), inputs) for output in (ours, whole))):
        assert (a - b).norm() < 1e-12 * b.norm()


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_computes_what_it_did(kind):
    plain = random_model(kind)
    ours = prepared(plain)
    assert ours.config.vision_config._attn_implementation == WINDOWS
    assert ours.config.text_config._attn_implementation == plain.config.text_config._attn_implementation
    assert [(name, p.shape) for name, p in ours.named_parameters()] == [
        (name, p.shape) for name, p in plain.named_parameters()
    ]
    outputs = [features(model) for model in (plain, ours)]
    # The tower's rotations are float32 in a float64 model too.
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for output in outputs:
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = 0
    for (name, a), b in zip(plain.named_parameters(), ours.parameters()):
        if a.grad is not None:
            found += 1
            assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm() + 1e-9, name
    assert found > 10


def test_a_tower_makes_a_call_for_each_length_of_a_window_and_layer():
    plain = random_model("qwen2_5_vl", torch.float32)  # a layer of windows, and one of whole images

    def calls(model):
        with profile(activities=[ProfilerActivity.CPU]) as profiled, torch.no_grad():
            features(model)
        return sum(
            event.count for event in profiled.key_averages() if event.key == "aten::scaled_dot_product_attention"
        )

    assert calls(plain) == 4 + 3
    assert calls(prepared(plain)) == 3 + 3


def test_recomputed_layers_take_the_plans_of_their_forward():
    model = prepared(random_model("qwen2_5_vl", torch.float32)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = []
    model.model.visual.blocks[0].mlp.register_forward_pre_hook(lambda *_: layers.append(1))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        features(model).sum().backward()
    assert len(layers) == 2
    assert sum(event.count for event in profiled.key_averages() if event.key == "aten::_unique2") == 2  # not 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_is_embedded_with_no_more_than_twice_the_convolutions_error(bias):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Conv3d(3, 40, (2, 14, 14), (2, 14, 14), bias=bias, dtype=torch.bfloat16)
    ours = copy.deepcopy(plain)
    ours.__class__ = PatchProjection
    patches = torch.randn(50, 3, 2, 14, 14, generator=generator).bfloat16()
    exact = copy.deepcopy(plain).double()(patches.double())
    assert ours(patches).shape == exact.shape
    assert (ours(patches) - exact).norm() <= 2 * (plain(patches) - exact).norm()
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_a_tower_that_was_loaded_with_another_attention_keeps_it():
    model = random_model("qwen2_5_vl", torch.float32)
    model.set_attn_implementation({"vision_config": "eager"})
    assert prepared(model).config.vision_config._attn_implementation == "eager"


def test_a_tower_of_whole_squares_is_left_alone():
    model = random_model("llava_onevision", torch.float32)
    before = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in prepared(model).named_modules()} == before
    assert prepared(model).config.vision_config._attn_implementation == "sdpa"


def test_torch_takes_the_one_call_as_it_is_made_on_a_gpu(monkeypatch):
    monkeypatch.setattr(vision, "why_not_flash", lambda *_: None)  # as on an H100
    with FakeTensorMode():  # shapes alone: torch checks and binds the arguments of tensors that no GPU holds
        shape = (1, 2, 24, 80)
        inputs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        output, _ = windows_attention(nn.Module(), *inputs, None, 0.1, cu_seq_lens_q=ends, max_length_q=16)
    assert (output.shape, output.device.type) == ((1, 24, 2, 80), "cuda")


def test_dropout_is_refused():
    query, ends = torch.randn(1, 1, 3, 4), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1"):
        windows_attention(nn.Module(), query, query, query, None, 1.0, 0.1, cu_seq_lens_q=ends, max_length_q=3)
