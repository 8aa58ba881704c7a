"""The engine on transformers: whose weights it generates with, in which state it leaves them, and its cache."""

import json
from dataclasses import replace

import pytest
import torch
from steps import batches_of, generated
from test_engine_families import both_logprobs, trainer_of
from test_families import config_of
from transformers import AutoModelForImageTextToText, DynamicCache

from vogue.cli import main
from vogue.families import FAMILIES
from vogue.model import lora
from vogue.rollout import cache


def disagreement(trainer):
    """Largest difference (nats) between the policy's log-probabilities of fresh tokens and its engine's."""
    groups = [replace(group, advantages=(1.0,) * len(group.completions)) for group in generated(trainer)]
    with torch.no_grad():
        pairs = [(trainer.policy(batch).logprob, batch.engine_logprob) for batch in batches_of(trainer, groups)]
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def places(model):
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_the_engine_has_no_weights_but_the_policys_where_they_are_whole(new_trainer):
    trainer = new_trainer()
    assert places(trainer.engine.model) == places(trainer.policy.model)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter.mul_(1.1)
    assert disagreement(trainer) < 1e-4  # without a sync
    trainer.step += 1
    trainer.sync()
    assert trainer.engine.version == 1


def test_the_engine_generates_with_adapters_as_they_are(new_trainer):
    trainer = new_trainer("lora.rank=2", "lora.alpha=64", "lora.vision=true")
    assert places(trainer.engine.model) == places(trainer.policy.model)
    before = generated(trainer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(trainer.policy.model).values():
            parameter.normal_(std=0.1)
    assert disagreement(trainer) < 1e-4
    assert [g.completions for g in generated(trainer)] != [g.completions for g in before]


def test_generating_leaves_the_policy_as_it_was_and_does_not_depend_on_how_it_trains(new_trainer):
    plain, trainer = new_trainer(), new_trainer("model.gradient_checkpointing=true")
    model = trainer.policy.model
    model.model.visual.eval()
    modes = [module.training for module in trainer.policy.modules()]
    assert 0 < sum(modes) < len(modes)
    attention = model.config.text_config._attn_implementation
    assert [g.completions for g in generated(trainer)] == [g.completions for g in generated(plain)]
    assert [module.training for module in trainer.policy.modules()] == modes
    assert model.config.text_config._attn_implementation == attention == trainer.policy.attention != "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_engine_and_policy_agree_in_every_family_on_prompts_with_and_without_images(kind, processor, tmp_path):
    trainer = trainer_of(kind, processor, tmp_path, "rollout.engine=hf")
    ours, theirs = both_logprobs(trainer)
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.slow
def test_a_partitioned_policys_engine_has_a_model_of_its_own_that_follows(new_trainer):
    # One rank's ZeRO-3 partitions all the same.
    trainer = new_trainer("trainer.deepspeed.zero_optimization.stage=3")
    assert not places(trainer.engine.model) & places(trainer.policy.model)
    trainer.run_step()
    assert disagreement(trainer) < 1e-4


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_as_if_it_had_not(settings, tmp_path):
    def train(name, *overrides):
        run = tmp_path / name
        common = ["branch.probability=0.5", f"trainer.output_dir={run}", "rollout.n=4", "perturb.sigma=0.8"]
        assert main(["train", *settings, *common, *overrides]) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        told = ("time/", "throughput/", "memory_gb")
        return [{name: value for name, value in row.items() if not name.startswith(told)} for row in rows]

    train("stopped", "trainer.steps=1")
    straight = train("straight", "trainer.steps=3")
    assert len(straight) == 3
    assert all(row["grad_norm"] > 1e-3 and row["mismatch/logprob"] < 1e-4 for row in straight)
    assert train("stopped", "trainer.steps=3", "--resume") == straight


# -------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(request.param)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@torch.no_grad()
def hidden_states(model, kept):
    """Of two prompts of different lengths, three times each, and of seven tokens of every one."""
    ids = torch.randint(10, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    further = torch.randint(10, 60, (6, 7), generator=torch.Generator().manual_seed(1))
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    at = (real.cumsum(1) - 1).clamp(min=0)
    found = [model.model(input_ids=ids, attention_mask=real, position_ids=at, past_key_values=kept, use_cache=True)]
    kept.reorder_cache(torch.arange(2).repeat_interleave(3))
    real, at = real.repeat_interleave(3, dim=0), at[:, -1:].repeat_interleave(3, dim=0)
    for token in further.split(1, dim=1):
        real, at = torch.cat([real, torch.ones_like(token)], dim=1), at + 1
        given = {"input_ids": token, "attention_mask": real, "position_ids": at}
        found.append(model.model(past_key_values=kept, use_cache=True, **given))
    return [output.last_hidden_state for output in found]


@pytest.mark.parametrize("room", [1, 3, 256])
def test_the_cache_gives_what_transformers_own_does_in_every_family(model, room, monkeypatch):
    monkeypatch.setattr(cache, "ROOM", room)
    expected = hidden_states(model, DynamicCache(config=model.config))
    assert expected[-1].std() > 0.1
    found = hidden_states(model, cache.roomy_cache(model.config))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_cache_copies_what_it_holds_once_in_so_many_tokens(monkeypatch):
    monkeypatch.setattr(cache, "ROOM", 4)
    layer, moved = cache.RoomyLayer(), []
    token = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(12):
        keys, values = layer.update(token, -token)
        moved.append(keys.data_ptr())
    assert len(set(moved)) == 3  # 1 + 4, then 6 + 4, then 11 + 4 tokens
    assert torch.equal(keys, token.expand(2, 1, 12, 8)) and torch.equal(values, -keys)
    assert layer.get_seq_length() == 12
