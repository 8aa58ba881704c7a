"""Adapters: what they train, what the engine and a checkpoint get of them, and what is refused."""

import json

import peft
import pytest
import torch
from ranks import launch, vogue
from safetensors.torch import load_file, save_file

from vogue.cli import main
from vogue.config import load_config
from vogue.config.training_sections import LoraConfig
from vogue.model import lora
from vogue.model.files import read_checkpoint
from vogue.model.weights import gathered_weights
from vogue.run.memory import checkpoint_bytes
from vogue.settings import ConfigError


def adapted(model, **settings):
    lora.add_adapters(model, LoraConfig(**({"rank": 2, "alpha": 8.0} | settings)), seed=0)
    return model


def filled(model, seed=1):
    """The model with adapters that change something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter.normal_(std=0.1)
    return model


def test_new_adapters_change_nothing_and_are_all_that_is_trained(new_model):
    plain, model = new_model(), adapted(new_model())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and "visual" not in name for name in trained)
    again = adapted(new_model())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))  # on every rank


def test_merged_weights_are_the_models_by_its_own_names(new_model):
    model = filled(adapted(new_model(), vision=True))
    merged = dict(gathered_weights(model))
    plain = new_model()
    assert merged.keys() == dict(plain.named_parameters()).keys()
    name = "model.language_model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    by_hand = layer.base_layer.weight + 8 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged[f"{name}.weight"], by_hand)
    assert not torch.equal(merged[f"{name}.weight"], dict(plain.named_parameters())[f"{name}.weight"])
    plain.load_state_dict(merged, strict=False)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vision", [False, True])
def test_layers_are_chosen_by_their_last_name(new_model, vision):
    model = adapted(new_model(), target_modules=["q_proj", "down_proj"], vision=vision)
    found = {name.removeprefix(lora.PREFIX).rpartition(".lora_")[0] for name in lora.adapter_parameters(model)}
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "down_proj"}
    assert any("visual" in name for name in found) == vision
    with pytest.raises(ConfigError, match=r"^lora\.target_modules: no layer is called query; there are .*q_proj"):
        adapted(new_model(), target_modules=["query"])


def test_settings_of_adapters_that_nobody_asked_for_are_refused(config):
    assert not config().lora.on
    with pytest.raises(ConfigError, match=r"^lora\.alpha=64\.0: without lora\.rank the model itself is trained$"):
        config("lora.alpha=64")
    with pytest.raises(ConfigError, match=r"^lora\.target_modules=\[\]: no layer would have an adapter$"):
        config("lora.rank=4", "lora.target_modules=[]")


def saved(model, folder, base="some/base"):
    weights = {name: parameter.detach() for name, parameter in lora.adapter_parameters(model).items()}
    lora.save_adapter(weights, model, base, folder)
    return folder


def test_peft_reads_what_is_written_and_we_read_what_peft_writes(new_model, tmp_path):
    model = filled(adapted(new_model()))
    ids = torch.arange(20)[None]
    theirs = peft.PeftModel.from_pretrained(new_model(), saved(model, tmp_path / "ours"))
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = adapted(new_model(), rank=0, adapter=tmp_path / "theirs")
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_that_does_not_fit_is_refused(new_model, tmp_path):
    folder = saved(filled(adapted(new_model())), tmp_path / "adapter")

    def told(model, **settings):
        with pytest.raises(ConfigError) as error:
            adapted(model, **({"rank": 0, "adapter": folder} | settings))
        return str(error.value)

    assert told(new_model(), rank=4) == f"lora.rank=4, but lora.adapter={folder} has rank 2"
    assert told(new_model(), adapter=tmp_path) == f"lora.adapter={tmp_path}: no adapter_config.json is there"
    assert "it isn't of this model" in told(new_model(layers=1))
    weights = load_file(folder / lora.WEIGHTS)
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, folder / lora.WEIGHTS)
    assert f"{name} is [2, 127], not [2, 128]" in told(new_model())
    save_file(weights, folder / lora.WEIGHTS)
    values = json.loads((folder / "adapter_config.json").read_text())
    for change, text in (
        ({"use_dora": True}, "has use_dora, which isn't supported"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights"),
        ({"peft_type": "IA3"}, "of kind IA3, not LORA"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(values | change))
        assert text in told(new_model())
    (folder / "adapter_config.json").write_text("{")
    assert "can't be read" in told(new_model())


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def train(settings, mixed_data, tmp_path):
    """A function: train with adapters on this many ranks in a folder of its own; returns the folder."""

    def run(ranks, name, *overrides, start=None):
        folder = tmp_path / name
        chosen = [*settings, "lora.rank=4", "lora.alpha=64", "lora.vision=true", "branch.probability=0.5", *overrides]
        chosen += [
            f"data.train={mixed_data}",
            f"trainer.output_dir={folder}",
            "rollout.n=4",
            "perturb.sigma=0.8",
            "trainer.measure_every=1",
        ]
        if start:
            code, told = start("train", *chosen)
            assert code == 0, told
        elif ranks == 1:
            assert main(["train", *chosen]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *chosen)
        return folder

    return run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SUFFIXES = (".safetensors", ".pt")
CURVES = ("reward", "format", "loss", "entropy", "measured/u_per", "grad_norm", "tokens")


@pytest.mark.slow
def test_two_ranks_train_adapters_as_one_does_and_go_on_as_if_they_had_not_stopped(train):
    one = train(1, "one", "trainer.steps=3", "lora.save_merged=true")
    train(2, "two", "trainer.steps=1")
    two = train(2, "two", "trainer.steps=3", "--resume")
    assert len(metrics(one)) == len(metrics(two)) == 3
    for a, b in zip(metrics(one), metrics(two)):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=1e-3)
        assert a["grad_norm"] > 1e-3
        # Of the engine's log-probabilities, after each sync.
        assert max(a["mismatch/logprob"], b["mismatch/logprob"]) < 1e-3
    found = [load_file(folder / "checkpoints/step_000003/adapter" / lora.WEIGHTS) for folder in (one, two)]
    assert found[0].keys() == found[1].keys()
    # AdamW's step is lr times a sign where a gradient is all rounding.
    apart = [(a - found[1][name]).abs() for name, a in found[0].items()]
    assert torch.cat([x.flatten() for x in apart]).gt(1e-4).float().mean() < 0.02
    assert not (two / "checkpoints/step_000003/hf").exists()
    size = sum(f.stat().st_size for f in (one / "checkpoints/step_000003").rglob("*") if f.suffix in SUFFIXES)
    config = load_config(one / "config.yaml", [])
    model = read_checkpoint(config.model.path).model
    lora.add_adapters(model, config.lora, 0)
    assert 0.85 < size / checkpoint_bytes(model, config) < 1.15
    assert (one / "checkpoints/step_000003/hf/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.long)])
def test_a_merged_model_and_the_adapter_beside_its_base_answer_alike(train, settings, tmp_path, engine):
    chosen = [f"rollout.engine={engine}", "rollout.kv_cache_gb=0.1", "trainer.eval_temperature=0"]
    run = train(1, "run", *chosen, "trainer.steps=2", "trainer.eval_samples=1", start=vogue)
    assert all(row["mismatch/logprob"] < 1e-3 for row in metrics(run))
    adapter, merged = run / "checkpoints/step_000002/adapter", tmp_path / "merged"
    assert vogue("merge", str(adapter), "--out", str(merged))[0] == 0
    answers = []
    for name, weights in {
        "adapter": [f"lora.adapter={adapter}"],
        "merged": [f"model.path={merged}"],
        "base": [],
    }.items():
        out = tmp_path / f"{name}.jsonl"
        code, told = vogue("eval", *settings, *chosen, *weights, "--samples", "1", "--out", str(out))
        assert code == 0
        named = "checkpoints/step_000002/adapter:1completionaproblem" in "".join(told.split())  # the title is broken
        assert named == (name == "adapter")
        answers.append([json.loads(line)["completion"] for line in out.read_text().splitlines()])
    assert answers[0] == answers[1] != answers[2]
    code, told = vogue("merge", str(adapter), "--out", str(merged))
    assert code == 2 and "isn't empty" in told
