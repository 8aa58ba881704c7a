"""The plugin of verl, in the installed verl: its own head, forwards and losses beside ours, and float64."""

import subprocess
import sys

import oracle
import pytest
import torch

pytest.importorskip("verl", reason="verl isn't installed")

import verl.utils.experimental.torch_functional as torch_functional
from tensordict import TensorDict
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from verl.models.transformers import monkey_patch
from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils import losses

from vogue_kernels import GuidanceConfig
from vogue_kernels.integrations.verl import vogue_policy_loss

V, D, TEMPERATURE = 96, 32, 0.8
IMAGE = 90  # the token of an image
PROMPT, LENGTHS = 7, (12, 10)  # tokens of each prompt, and of each sequence

register_policy_loss("no_bonus")(vogue_policy_loss(GuidanceConfig(alpha_out=0.0, alpha_per=0.0)))


@pytest.fixture
def new_model():
    """A function: a tiny Qwen2.5-VL of random weights with one of verl's fused forwards."""

    def build(backend, use_fused_kernels=True):
        class Tiny(Qwen2_5_VLForConditionalGeneration):  # verl patches the class
            pass

        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 2, 4]}
        text = {"vocab_size": V, "hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": 2}
        text |= {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
        }
        vision = {"depth": 1, "hidden_size": D, "intermediate_size": D, "num_heads": 2, "out_hidden_size": D}
        tokens = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
        vision |= {"fullatt_block_indexes": [0]}
        model = Tiny(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)  # fresh weights predict every token alike
        monkey_patch.patch_forward_with_backends(model, use_fused_kernels, backend)
        return model

    return build


@pytest.fixture
def batch():
    """The inputs of a forward as verl's FSDP engine makes them of padded sequences, with two images a sequence."""
    ids = torch.randint(80, (len(LENGTHS), max(LENGTHS)))
    ids[:, 1:3] = torch.tensor([92, IMAGE])
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    pixels = torch.randn(4 * len(LENGTHS), 3 * 2 * 14 * 14)
    inputs = {
        **{"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "pixel_values": pixels},
        "image_grid_thw": torch.tensor([[1, 2, 2]] * len(LENGTHS)),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "position_ids": torch.arange(max(LENGTHS)).expand(4, len(LENGTHS), -1),
    }
    return inputs | {"temperature": TEMPERATURE, "return_dict": True, "use_cache": False}


def jagged(rows):
    return torch.nested.nested_tensor(list(rows), layout=torch.jagged)


def micro_batch(inputs):
    """What the loss is given beside the model's output."""
    ids = [row[:length] for row, length in zip(inputs["input_ids"], LENGTHS)]
    generator = torch.Generator().manual_seed(2)

    def tokens(scale, shift):
        return jagged(scale * torch.randn(n - PROMPT, generator=generator) + shift for n in LENGTHS)

    data = TensorDict(
        {
            "input_ids": jagged(ids),
            "prompts": jagged(row[:PROMPT] for row in ids),
            "responses": jagged(row[PROMPT:] for row in ids),
            "response_mask": jagged(torch.ones(n - PROMPT, dtype=torch.long) for n in LENGTHS),
            "old_log_probs": tokens(1.0, -4.0),
            "advantages": tokens(1.0, 0.0),
        },
        batch_size=len(LENGTHS),
    )
    told = {"dp_size": 1, "batch_num_tokens": sum(LENGTHS) - 2 * PROMPT, "global_batch_size": 2}
    return tensordict_utils.assign_non_tensor(data, **told)


def engine_output(output):
    """What verl's FSDP engine makes of a fused forward of padded sequences."""
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return {
        name: torch.nested.nested_tensor_from_jagged(getattr(output, name)[mask], offsets)
        for name in ("log_probs", "entropy")
    }


def actor(loss_mode, **settings):
    policy_loss = PolicyLossConfig(loss_mode=loss_mode)
    micro = {"ppo_micro_batch_size_per_gpu": 1, "rollout_n": 2}
    return ActorConfig(strategy="fsdp", policy_loss=policy_loss, **micro, **settings)


@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("shape", [(9,), (2, 5)])
def test_the_heads_values_and_gradients_are_verls(shape, backend):
    if backend == "liger":
        pytest.importorskip("liger_kernel")
    hidden, weight = torch.randn(*shape, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    ids, weights = torch.randint(V, shape), torch.randn(2, *shape)
    found = []
    for name in ("vogue", backend):
        results = torch_functional.FusedLinearForPPO(impl_backend=name).forward(hidden, weight, ids, TEMPERATURE)
        loss = sum((w * x).sum() for w, x in zip(weights, results))
        found.append([*results, *torch.autograd.grad(loss, [hidden, weight])])
    for ours, theirs in zip(*found):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_head_doesnt_round_as_verls_does():
    hidden, weight, ids = torch.randn(9, D).bfloat16(), torch.randn(V, D).bfloat16(), torch.randint(V, (9,))
    exact = oracle.linear_logprob(hidden.double(), weight.double(), ids, temperature=TEMPERATURE)

    def error(backend):
        head = torch_functional.FusedLinearForPPO(impl_backend=backend)
        results = head.forward(hidden, weight, ids, TEMPERATURE)
        return max((x - y).abs().max().item() for x, y in zip(results, exact))

    assert error("vogue") < 1e-5 < 1e-3 < error("torch")


def test_a_models_forward_gives_what_it_gives_with_verls_own_backend(new_model, batch):
    expected, found = (new_model(backend)(**batch) for backend in ("torch", "vogue"))
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    labels = batch["input_ids"].roll(-1, 1)  # as the engine gives them for packed sequences
    again = new_model("vogue")(**batch, shift_labels=labels)
    assert torch.equal(again.log_probs, found.log_probs)


def loss_of(model, inputs, config):
    data = micro_batch(inputs)
    loss, metrics = losses.ppo_loss(config, engine_output(model(**inputs)), data)
    model.zero_grad()
    loss.backward()
    return loss.detach(), metrics, model.lm_head.weight.grad


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_without_bonuses_loss_and_gradient_are_vanillas(loss_agg_mode, new_model, batch):
    config = {"loss_agg_mode": loss_agg_mode, "entropy_coeff": 0.01}
    expected, _, expected_gradient = loss_of(new_model("torch"), batch, actor("vanilla", **config))
    loss, _, gradient = loss_of(new_model("vogue"), batch, actor("no_bonus", **config))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5 * expected_gradient.abs().max().item())


def test_the_loss_of_two_images_is_vogues_by_the_models_own_logits(new_model, batch):
    other = batch["pixel_values"] + torch.randn(batch["pixel_values"].shape)
    other[:4] = batch["pixel_values"][:4]  # the first sequence isn't drawn
    plain = new_model(None, use_fused_kernels=False).double()
    inputs = {k: v for k, v in batch.items() if k not in ("temperature", "return_dict")}
    logp, logq = (
        (plain(**inputs | {"pixel_values": pixels.double()}).logits / TEMPERATURE).log_softmax(-1)
        for pixels in (batch["pixel_values"], other)
    )
    data = micro_batch(batch)
    expected, u_pers = 0.0, []
    for i, length in enumerate(LENGTHS):
        where = slice(PROMPT - 1, length - 1)
        p, q, tokens = logp[i, where], logq[i, where].detach(), batch["input_ids"][i, PROMPT:length]
        advantage = data["advantages"][i].double()
        u_out, u_per = -(p.exp() * p).sum(-1).detach(), ((p.exp() - q.exp()) * (p - q)).sum(-1).detach() / 2
        u_pers.append(u_per)
        cap = advantage.abs() / 2
        shaped = advantage + torch.minimum(cap, 0.4 * u_out) + torch.minimum(cap, u_per)
        ratio = (p.gather(1, tokens[:, None])[:, 0] - data["old_log_probs"][i]).exp()
        per_token = -torch.minimum(ratio * shaped, ratio.clamp(0.8, 1.2) * shaped)
        per_token = torch.where(shaped < 0, torch.minimum(per_token, -3 * shaped), per_token)  # dual clipping
        expected = expected + per_token.sum() / (sum(LENGTHS) - 2 * PROMPT)
    expected_gradient = torch.autograd.grad(expected, plain.lm_head.weight)[0]

    loss, metrics, gradient = loss_of(new_model("vogue"), batch | {"other_pixel_values": other}, actor("vogue"))
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    size = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4 * size)
    assert not u_pers[0].any() and u_pers[1].mean() > 1e-3
    assert metrics["actor/u_per"].values[0] == pytest.approx(torch.cat(u_pers).mean().item(), rel=1e-3)


def test_old_logprobs_read_one_image_and_a_loss_that_lacks_something_says_what(new_model, batch):
    model, data = new_model("vogue"), micro_batch(batch)
    with torch.no_grad():
        output = engine_output(model(**batch, other_pixel_values=batch["pixel_values"]))
    with pytest.raises(ValueError, match="other_pixel_values among the multi_modal_inputs"):
        losses.ppo_loss(actor("vogue"), output, data)
    loss, _ = losses.ppo_loss(actor("vogue_entropy"), output, data)
    assert loss.isfinite()
    with pytest.raises(ValueError, match="calculate_entropy=true"):
        losses.ppo_loss(actor("vogue_entropy"), {"log_probs": output["log_probs"]}, data)
    with pytest.raises(RuntimeError, match="outside of"):
        get_policy_loss_fn("vogue")(None, None, None, None)


@pytest.mark.slow
def test_verl_finds_the_plugin_by_its_entry_point(tmp_path):
    metadata = tmp_path / "plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[verl.plugins]\nvogue = vogue_kernels.integrations.verl\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from verl.workers.utils.losses import ppo_loss\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as losses\n"
        "print('vogue' in losses, ppo_loss.func.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True vogue_kernels.integrations.verl"
