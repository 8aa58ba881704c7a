"""vogue.trl: TRL's trainer with VOGUE's draws and advantages, beside TRL's own and beside plain float64."""

import copy

import deepspeed
import pytest
import ranks
import torch
from datasets import Dataset
from test_families import config_of, llava_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("trl", reason="trl isn't installed")

from trl import GRPOConfig, GRPOTrainer

from vogue import distributed
from vogue.trl import OtherView, VogueConfig, VogueTrainer, add_branch_head

GROUP, TOKENS = 4, 12
PARTITIONED = """
import sys

import torch
from datasets import Dataset
from transformers import AutoProcessor

from vogue import distributed
from vogue.data.digits import digits_samples
from vogue.trl import VogueConfig, VogueTrainer

distributed.start()  # by gloo, where there is no GPU
folder, out = sys.argv[-2:]
rows = [
    {"prompt": [{"role": "user", "content": s.problem.removeprefix("<image>")}], "image": s.load_images()[0]}
    for s in digits_samples("train", 4, seed=0)
]
batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 2}
auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
zero = {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True} | dict.fromkeys(auto, "auto")
config = VogueConfig(
    output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, max_completion_length=8, seed=3,
    logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", branch_probability=0.5, deepspeed=zero,
    **batches,
)
trainer = VogueTrainer(
    model=folder,
    reward_funcs=[lambda completions, **_: [float(len(c[0]["content"]) % 5) for c in completions]],
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoProcessor.from_pretrained(folder),
)
trainer.train()
if trainer.accelerator.is_main_process:
    print("paid", *(log["paid_share"] for log in trainer.state.log_history if "loss" in log))
"""


def by_length(completions, **_):
    """A reward that differs within a group of random completions."""
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


@pytest.fixture
def rows(samples):
    return [
        {"prompt": [{"role": "user", "content": s.problem.removeprefix("<image>")}], "image": s.load_images()[0]}
        for s in samples[:4]
    ]


@pytest.fixture
def new_trainer(model_folder, rows, tmp_path):
    """A function: a trainer on digits, two prompts of four completions a step."""

    def build(kind=VogueTrainer, model=None, processor=None, **settings):
        config = VogueConfig if kind is VogueTrainer else GRPOConfig
        known = {
            **{"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
            **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": GROUP},
            **{"max_completion_length": TOKENS, "learning_rate": 1e-3, "max_steps": 4, "seed": 3},
            **{"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True},
        }
        return kind(
            model=model or AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32),
            reward_funcs=[by_length],
            args=config(**(known | settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor or AutoProcessor.from_pretrained(model_folder),
        )

    return build


def generated(trainer, rows):
    """A batch of two groups, as TRL hands it to the loss."""
    trainer.state.max_steps = 4
    trainer.model.train()
    torch.manual_seed(0)
    return trainer._generate_and_score_completions([row for row in rows[:2] for _ in range(GROUP)])


def loss_and_gradients(trainer, batch):
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_without_bonuses_loss_and_gradients_are_those_of_trl(loss_type, new_trainer, rows):
    theirs = new_trainer(GRPOTrainer, loss_type=loss_type, entropy_coef=0.1)
    batch = generated(theirs, rows)
    # Another policy than the one that generated: the clipped surrogate has something to do.
    batch["old_per_token_logps"] = torch.randn(batch["completion_ids"].shape) - 4
    ours = new_trainer(loss_type=loss_type, entropy_coef=0.1, alpha_out=0.0, alpha_per=0.0)
    expected, expected_gradients = loss_and_gradients(theirs, batch)
    loss, gradients = loss_and_gradients(ours, batch)
    assert expected_gradients.keys() == gradients.keys() and expected.abs() > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        size = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * size, msg=name)


def log_softmax(model, batch, pixel_values):
    """(B, T, V) float64 of the completions' tokens, by the model's own logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    inputs = {name: batch[name] for name in ("image_grid_thw", "mm_token_type_ids")}
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixel_values, **inputs).logits.double()
    return logits[:, -batch["completion_ids"].shape[1] - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("rollout", ["raw", "drawn"])
def test_the_loss_is_vogues_by_the_models_own_logits(rollout, new_trainer, rows):
    trainer = new_trainer(branch_probability=1.0, branch_rollout=rollout, loss_type="grpo")
    batch = generated(trainer, rows)
    assert batch["paid"].all()
    mask, advantages = batch["completion_mask"], batch["advantages"][:, None].double()
    logp = log_softmax(trainer.model, batch, batch["pixel_values"])
    with torch.no_grad():
        logq = log_softmax(trainer.model, batch, torch.cat(batch["other_pixel_values"]))
    entropy = -(logp.exp() * logp).sum(-1).detach()
    u_per = ((logp.exp() - logq.exp()) * (logp - logq)).sum(-1).detach() / 2
    bonus = torch.minimum(advantages.abs() / 2, 0.4 * entropy) + torch.minimum(advantages.abs() / 2, u_per)
    token = logp.gather(2, batch["completion_ids"][..., None])[..., 0]
    per_token = -(token - token.detach()).exp() * (advantages + bonus)
    expected = ((per_token * mask).sum(1) / mask.sum(1)).mean() / 2  # two micro-batches a step
    expected_gradient = torch.autograd.grad(expected, trainer.model.lm_head.weight)[0]

    loss, gradients = loss_and_gradients(trainer, batch)
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-5, atol=1e-6)
    gradient = gradients["model.language_model.embed_tokens.weight"]  # tied to the head
    size = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5 * size)
    (logged,) = trainer._metrics["train"]["u_per"]
    assert logged == pytest.approx((u_per * mask).sum().item() / mask.sum().item(), rel=1e-4) and logged > 1e-3


def test_under_autocast_the_loss_is_that_of_full_precision_but_for_rounding(new_trainer, rows):
    batch = generated(new_trainer(branch_probability=1.0), rows)
    found = [loss_and_gradients(new_trainer(branch_probability=1.0, bf16=bf16), batch) for bf16 in (False, True)]
    (expected, _), (loss, gradients) = found
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert loss != expected and all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("rollout", ["raw", "drawn"])
def test_completions_are_generated_from_the_image_that_is_trained_on(rollout, new_trainer, rows, monkeypatch):
    seen = []

    def generate(self, prompt_ids, images, fields, *args, **kwargs):
        seen.append(fields["pixel_values"])
        return VogueTrainer.__base__._generate_single_turn(self, prompt_ids, images, fields, *args, **kwargs)

    monkeypatch.setattr(VogueTrainer, "_generate_single_turn", generate)
    trainer = new_trainer(branch_probability=1.0, branch_rollout=rollout)
    batch = generated(trainer, rows)
    raw = trainer.processing_class.image_processor(images=[row["image"] for row in rows[:2]], return_tensors="pt")
    raw = raw["pixel_values"].view(2, 1, -1).expand(-1, GROUP, -1).flatten()
    other = torch.cat(batch["other_pixel_values"])
    trained, other = (other, batch["pixel_values"]) if rollout == "drawn" else (batch["pixel_values"], other)
    assert torch.equal(trained.flatten(), raw)
    assert torch.equal(seen[0].flatten(), batch["pixel_values"].flatten())
    # A group shares its perturbed image, whose noise is that of the settings: clipped, but most of it.
    noise = (other.flatten() - raw).view(2, GROUP, -1) / 2  # the processor maps [0, 1] to [-1, 1]
    assert (noise == noise[:, :1]).all() and not torch.equal(noise[0], noise[1])
    assert 0.15 < noise.std() < 0.4


def test_draws_are_a_prompts_and_differ_from_step_to_step_but_not_when_asked_again(new_trainer):
    trainer = new_trainer(branch_probability=0.5)
    trainer.state.max_steps = 100
    draws = []
    for step in [*range(20), 7]:
        trainer.state.global_step = step
        draws.append(trainer._draws(8)[0].view(2, GROUP))
    assert all((z == z[:, :1]).all() for z in draws)
    assert torch.equal(draws[7], draws[-1])
    assert 8 < sum(int(z[:, 0].sum()) for z in draws[:-1]) < 32  # of 40


def test_a_row_that_isnt_paid_trains_as_in_trl_whatever_its_neighbours_are(new_trainer, rows):
    trainer = new_trainer(branch_probability=1.0, loss_type="grpo", alpha_out=0.0)
    batch = generated(trainer, rows)
    without = {name: value for name, value in batch.items() if name not in ("paid", "other_pixel_values")}
    expected, _ = loss_and_gradients(trainer, without)
    paid, _ = loss_and_gradients(trainer, batch)
    one_row_stands_in = batch | {"paid": torch.zeros(8, dtype=torch.bool)}
    loss, _ = loss_and_gradients(trainer, one_row_stands_in)
    torch.testing.assert_close(loss, expected)
    assert not torch.isclose(paid, expected)

    # Rows 1 and 6 alone are paid: the loss is between, by these two rows' shares.
    def of_rows(which):
        part = batch | {"paid": torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(which), True)}
        return loss_and_gradients(trainer, part)[0]

    torch.testing.assert_close(of_rows([1, 6]) - expected, of_rows([1]) + of_rows([6]) - 2 * expected)


@pytest.fixture
def inputs(new_model, processor):
    """A prompt with an image, as a model takes it."""
    image = processor.image_processor(images=[torch.rand(3, 28, 56)], do_rescale=False, return_tensors="pt")
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>Think.<|im_end|>\n"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    is_image = ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {"input_ids": ids, "mm_token_type_ids": is_image.long(), **image}


def test_the_head_leaves_generation_as_it_was_and_a_batch_without_labels_has_a_gradient_of_zeros(new_model, inputs):
    model, ids = new_model(), inputs["input_ids"]
    before = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    names = set(model.state_dict())
    add_branch_head(model, temperature=0.5)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=8), before)
    assert set(model.state_dict()) == names
    assert copy.deepcopy(model)(**inputs).logits.shape == (1, ids.shape[1], model.config.text_config.vocab_size)

    outputs = model(**inputs, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert outputs.log_probs.shape == (1, ids.shape[1] - 1) and not outputs.log_probs.any()
    (outputs.log_probs + outputs.entropy).sum().backward()
    assert not model.lm_head.weight.grad.any() and not model.model.visual.patch_embed.proj.weight.grad.any()


def test_under_zero3_the_head_has_its_whole_weight_forward_and_backward(new_model, inputs):
    whole, partitioned = new_model(), new_model()
    for model in (whole, partitioned):
        # The embedding would keep a weight that is tied to it whole.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        add_branch_head(model, temperature=0.5)
    distributed.start()
    # Nothing that has been gathered may linger.
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    zero = {"stage": 3} | {f"stage3_{name}": 0 for name in names}
    settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.SGD(partitioned.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=partitioned, optimizer=optimizer, config=settings)
    assert engine.module.lm_head.weight.numel() == 0

    other = OtherView([0], inputs | {"pixel_values": inputs["pixel_values"] + 0.5})
    given = inputs | {"labels": inputs["input_ids"], "fused_lm_head": True, "other": other}
    expected, found = whole(**given), engine(**given)
    assert found.symmetric_kl.max() > 1e-3
    for name in ("log_probs", "entropy", "symmetric_kl"):
        torch.testing.assert_close(found[name], expected[name])
    expected.log_probs.sum().backward()
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    engine.backward(found.log_probs.sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for (name, a), b in zip(engine.module.named_parameters(), whole.parameters(), strict=True):
            size = b.abs().max().item()
            torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.slow
def test_two_ranks_that_draw_differently_train_a_partitioned_model(model_folder, tmp_path):
    # The group of one rank is paid, that of the other isn't: unless both call the same modules, neither ends.
    (tmp_path / "train.py").write_text(PARTITIONED)
    printed = ranks.launch(2, tmp_path / "train.py", model_folder, tmp_path)
    assert "paid 1.0 0.5" in printed


def test_a_base_model_that_peft_wrapped_is_patched_and_a_head_with_an_adapter_refused(new_model, inputs):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(new_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    add_branch_head(wrapped.get_base_model(), temperature=1.0)
    outputs = wrapped(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
    expected = wrapped(**inputs).logits[0, :-1].log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    torch.testing.assert_close(outputs.log_probs[0], expected, rtol=1e-4, atol=1e-4)
    outputs.log_probs.sum().backward()
    trained = [name for name, p in wrapped.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)

    head = peft.get_peft_model(new_model(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="the head has an adapter"):
        add_branch_head(head.get_base_model(), temperature=1.0)


def test_what_cant_be_trained_is_refused(new_trainer):
    with pytest.raises(TypeError, match="must be a VogueConfig, got GRPOConfig"):
        VogueTrainer("model", [by_length], GRPOConfig(bf16=False, use_cpu=True))
    with pytest.raises(ValueError, match="branch_rollout is 'noisy'; choose one of raw, drawn"):
        new_trainer(branch_rollout="noisy")
    with pytest.raises(ValueError, match=r"branch_probability is 1\.5"):
        new_trainer(branch_probability=1.5)


def test_a_model_that_scales_its_logits_is_scored_by_the_scaled_ones(new_model, processor):
    model = new_model()
    ids = processor.tokenizer("What is the sum?", return_tensors="pt")["input_ids"]
    expected = (model(input_ids=ids).logits[0, :-1] / (8.0 * 0.5)).log_softmax(-1)
    model.config.text_config.logits_scaling = 8.0  # Granite divides by it
    add_branch_head(model, temperature=0.5)
    outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(outputs.log_probs[0], expected.gather(1, ids[0, 1:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_a_model_that_caps_its_logits_is_scored_by_the_capped_ones(new_model, processor):
    model = new_model()
    ids = processor.tokenizer("What is the sum?", return_tensors="pt")["input_ids"]
    expected = (5.0 * (model(input_ids=ids).logits[0, :-1] / 5.0).tanh() / 0.5).log_softmax(-1)
    model.config.text_config.final_logit_softcapping = 5.0  # as Gemma 2 does
    add_branch_head(model, temperature=0.5)
    outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(outputs.log_probs[0], expected.gather(1, ids[0, 1:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_a_run_on_digits_trains_logs_and_resumes_where_it_was(new_trainer, tmp_path):
    settings = {"branch_rollout": "drawn", "branch_probability": 0.75, "save_strategy": "steps", "save_steps": 2}
    whole = new_trainer(**settings)
    start = whole.model.lm_head.weight.detach().clone()
    whole.train()
    logs = [log for log in whole.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    paid = [log for log in logs if log["paid_share"]]
    assert paid and all(log["u_per"] > 0 and 0 <= log["per_capped"] <= 1 for log in paid)
    assert all(log["entropy"] > 0 and 0 <= log["out_capped"] <= 1 for log in logs)
    assert not torch.equal(whole.model.lm_head.weight, start)

    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).lm_head.weight
    resumed = new_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    # TRL samples other completions after a restart, so that only what is drawn is the same.
    assert resumed.state.global_step == 4
    shares = [[log["paid_share"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed)]
    assert shares[0] == shares[1] and len(shares[0]) == 4
    assert not torch.equal(resumed.model.lm_head.weight, saved)


def test_llava_onevision_whose_images_have_no_grid_trains_too(new_trainer, processor):
    llava = llava_processor(processor)
    config = config_of("llava_onevision")
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", llava.tokenizer.convert_tokens_to_ids(f"<{name}>"))
    config.text_config.vocab_size = len(llava.tokenizer)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    trainer = new_trainer(model=model, processor=llava, branch_probability=0.5, branch_rollout="drawn", max_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["paid_share"] for log in logs] == [1.0, 0.5] and all(log["u_per"] > 1e-3 for log in logs)
