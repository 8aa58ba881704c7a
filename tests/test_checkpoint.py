import json
import shutil

import pytest
import torch
from kinds import save_as_published
from safetensors.torch import load_file
from test_families import FAMILIES, random_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from vogue import distributed
from vogue.model import weights
from vogue.model.files import INDEX, WEIGHTS, read_checkpoint, write_as_published
from vogue.model.resuming import find
from vogue.run.folder import FolderError
from vogue.run.kept_checkpoints import checkpoints, clear
from vogue.run.memory import shown
from vogue.settings import ConfigError


def test_checkpoints_are_in_the_order_of_their_steps_without_those_in_the_making(tmp_path):
    for name in ("step_1000000", "step_000002", "step_000010", ".step_000012.partial", ".step_000001.old", "step_x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000002", "step_000010", "step_1000000"]
    clear(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_no_checkpoint_is_found_where_there_is_none(tmp_path):
    distributed.start()
    assert find(tmp_path / "nowhere", "") is None


def test_a_checkpoint_of_deepspeeds_own_files_is_told_as_another_versions(tmp_path):
    distributed.start()
    folder = tmp_path / "step_000002"
    (folder / "hf").mkdir(parents=True)
    (folder / "state.json").write_text('{"step": 2, "ranks": 4, "sums": {}}')
    with pytest.raises(ConfigError) as error:
        find(tmp_path, "")
    assert str(error.value) == (
        f"--resume: {folder} was written by another version of vogue, whose optimizer state this one can't read. "
        f"model.path={folder}/hf with another trainer.output_dir begins a new run from its weights"
    )


def test_a_saved_checkpoint_is_a_folder_of_transformers_and_old_ones_go(new_trainer):
    trainer = new_trainer("trainer.keep=2")
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.01)
    for trainer.step in (1, 2, 3):
        trainer.save()
    assert [path.name for path in sorted(trainer.checkpoints.iterdir())] == ["step_000002", "step_000003"]
    folder = trainer.checkpoints / "step_000003" / "hf"
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    policy = dict(trainer.policy.model.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == policy.keys()
    assert all(torch.equal(parameter, policy[name]) for name, parameter in loaded.named_parameters())
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight  # tied, as it was
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.get_vocab() == trainer.processor.tokenizer.get_vocab()
    assert processor.chat_template == trainer.processor.chat_template


def test_a_disk_without_room_is_told_before_anything_is_written(new_trainer, monkeypatch):
    trainer = new_trainer()
    trainer.step = 1
    trainer.save()
    size = sum(path.stat().st_size for path in (trainer.checkpoints / "step_000001").rglob("*.safetensors"))
    usage = type("Usage", (), {"total": 10**12, "free": size // 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    trainer.step = 2
    with pytest.raises(FolderError) as error:
        trainer.save()
    told = f"the disk is full: the checkpoint after 2 steps can't be written to {trainer.checkpoints}: it takes "
    assert str(error.value).startswith(told) and str(error.value).endswith(f"{shown(size // 2)} are free")
    assert [path.name for path in trainer.checkpoints.iterdir()] == ["step_000001"]
    usage.free = size
    trainer.save()


def test_gathered_weights_come_once_each_in_chunks_of_any_size(new_trainer):
    model = new_trainer().policy.model
    whole = dict(weights.gathered_weights(model))
    assert whole.keys() == dict(model.named_parameters()).keys()
    for budget in (1, 10_000):
        pieces = list(weights.gathered_weights(model, byte_budget=budget))
        assert [name for name, _ in pieces] == list(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in pieces)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_in_several_files_is_the_model_in_one(kind, processor, tmp_path, monkeypatch):
    distributed.start()
    one, several = tmp_path / "one", tmp_path / "several"
    save_as_published(kind, random_model(kind, torch.float32), one)
    model = AutoModelForImageTextToText.from_pretrained(one)
    write_as_published(model)
    monkeypatch.setattr(weights, "LEAST", 1)
    plan, whole = weights.planned(weights.sizes_of(model), 3), dict(weights.gathered_weights(model))
    assert plan.keys() == whole.keys() and {*plan.values()} == {0, 1, 2}
    several.mkdir()
    written = []
    for number in (2, 0, 1):  # on three ranks, each of which ends when it does
        own = {name: whole[name].detach().clone() for name, place in plan.items() if place == number}
        written += weights.write(model, {number: own}, 3, several)
    weights.finish(written, several)
    expected, found = load_file(one / WEIGHTS), {}
    for name, file in json.loads((several / INDEX).read_text())["weight_map"].items():
        found[name] = load_file(several / file)[name]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    weights.write_rest(model, processor, several)
    assert [path.name for path in read_checkpoint(str(several)).files] == [
        f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")
    ]


@pytest.mark.parametrize(
    ("sizes", "ranks", "count"),
    [([10**6] * 3, 8, 1), ([10**9] * 8, 8, 8), ([10**9] * 8, 3, 3), ([10**9] * 8, 1, 2), ([10**9] * 70, 64, 64)],
)
def test_files_are_as_many_as_ranks_unless_they_were_too_small_or_too_large(sizes, ranks, count):
    plan = weights.planned({f"layers.{i}.weight": size for i, size in enumerate(sizes)}, ranks)
    assert sorted({*plan.values()}) == list(range(count))
    assert list(plan.values()) == sorted(plan.values())


def test_a_layers_weights_stay_in_one_file():
    sizes = {f"model.layers.{i}.{part}": 5 * 10**8 for i in range(4) for part in ("a.weight", "a.bias", "b.weight")}
    plan = weights.planned(sizes | {"head.weight": 10**9, "head.bias": 1}, 4)
    assert len({*plan.values()}) == 4
    for i in range(4):
        assert len({place for name, place in plan.items() if name.startswith(f"model.layers.{i}.")}) == 1
    assert plan["head.weight"] == plan["head.bias"] == 3
