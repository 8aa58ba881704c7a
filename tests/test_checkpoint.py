import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vogue import distributed
from vogue.model import checkpoint
from vogue.model.checkpoint import checkpoints, clear, find
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


def test_another_number_of_ranks_is_told_with_both_numbers(tmp_path):
    distributed.start()
    (tmp_path / "step_000002").mkdir()
    (tmp_path / "step_000002" / "state.json").write_text('{"step": 2, "ranks": 4, "sums": {}}')
    with pytest.raises(ConfigError, match=r"step_000002 was written by 4 ranks, this run has 1"):
        find(tmp_path, "")


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


def test_gathered_weights_come_once_each_in_chunks_of_any_size(new_trainer):
    model = new_trainer().policy.model
    whole = dict(checkpoint.gathered_weights(model))
    assert whole.keys() == dict(model.named_parameters()).keys()
    for budget in (1, 10_000):
        pieces = list(checkpoint.gathered_weights(model, byte_budget=budget))
        assert [name for name, _ in pieces] == list(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in pieces)
