import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vogue.model import checkpoint
from vogue.model.checkpoint import complete, latest
from vogue.settings import ConfigError


def write(root, name, step, ranks=1):
    (root / name).mkdir(parents=True)
    (root / name / "state.json").write_text(json.dumps({"step": step, "ranks": ranks}))


def test_the_newest_whole_checkpoint_is_found_and_a_partial_one_ignored(tmp_path):
    write(tmp_path, "step_000002", 2)
    write(tmp_path, "step_000010", 10)
    write(tmp_path, ".step_000012.partial", 12)  # stopped before it was renamed
    (tmp_path / "step_000014").mkdir()  # no state: not whole
    assert [path.name for path in complete(tmp_path)] == ["step_000002", "step_000010"]
    assert latest(tmp_path, ranks=1) == (tmp_path / "step_000010", 10)


def test_nothing_to_resume_is_told_with_the_folder(tmp_path):
    with pytest.raises(ConfigError, match=f"--resume: there is no checkpoint in {tmp_path}/checkpoints"):
        latest(tmp_path / "checkpoints", ranks=1)


def test_another_number_of_ranks_is_told_with_both_numbers(tmp_path):
    write(tmp_path, "step_000002", 2, ranks=4)
    with pytest.raises(ConfigError, match=r"step_000002 was written by 4 ranks, this run has 2"):
        latest(tmp_path, ranks=2)


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
