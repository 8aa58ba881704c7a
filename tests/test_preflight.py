"""What `vogue train --check` finds before anything slow, and that a training does the same first."""

import json
import shutil
import subprocess

import pytest
import torch
from ranks import environment, launcher
from rich.console import Console
from safetensors.torch import load_file, save_file

from vogue.cli import main
from vogue.config import load_config
from vogue.model.files import read_checkpoint
from vogue.run import memory
from vogue.run.memory import check_engine, checkpoint_bytes, keeps_activations, sequence_bytes
from vogue.run.preflight import Preflight, show
from vogue.settings import ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEIGHTS, NORM = "model.safetensors", "model.norm.weight"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPS = "{% for m in messages if m.role != 'system' %}<|image_pad|>{{ m.content[-1].text }}{% endfor %}"


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def told(settings, folder, capsys):
    """A function: what `vogue train --check` says of the folder, with overrides; empty where it finds nothing wrong."""

    def run(*overrides):
        code = main(["train", "--check", *settings, f"model.path={folder}", "trainer.eval_every=1", *overrides])
        output = capsys.readouterr()
        assert code == (2 if output.err else 0)
        assert "Traceback" not in output.err
        return output.err.strip().removeprefix("vogue train: ").replace(f"model.path={folder}: ", "")

    return run


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def resave(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_what_is_fine_is_shown_and_nothing_is_written(settings, model_folder, capsys, tmp_path):
    assert main(["train", "--check", *settings, "rollout.engine=vllm", "trainer.eval_every=1"]) == 0
    rows = dict(line.split("│", 1) for line in capsys.readouterr().out.splitlines() if "│" in line)
    rows = {name.strip(): text.strip() for name, text in rows.items()}
    count = sum(weight.numel() for weight in load_file(model_folder / WEIGHTS).values())
    assert rows["model"] == f"qwen2_5_vl, {count / 1e6:.3g} million weights, float32; head: tied"
    assert rows["tokens"] == "at most 140 with the completion; the model has 4096 positions"
    # 2 of keys and values, 2 layers, 1 head of 32, 4 bytes: 512 bytes a token
    assert rows["engine"] == f"a longest sequence takes {140 * 512 / 1e6:.3g} MB of vLLM's 1 GB"
    assert rows["disk"].startswith(f"a checkpoint takes {16 * count / 1e6:.3g} MB; ")
    assert rows["data"] == "24 samples to train on, 6 held out"
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_wrong_is_told_at_once(settings, capsys):
    wrong = ["data.train=nowhere.parquet", "rollout.max_tokens=9000", "trainer.deepspeed.zero_optimization.stage=9"]
    for command in (["train", "--check"], ["train"]):
        assert main([*command, *settings, *wrong, "reward.function=nowhere.py:f"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith(
            "vogue train: data.max_prompt_tokens=128 and rollout.max_tokens=9000 are 9128 together"
        )
        assert "the model has 4096 positions" in lines[0]
        assert lines[1].startswith("trainer.deepspeed.zero_optimization.stage=9: input should be one of 0, 1, 2")
        assert lines[2].startswith("reward.function=nowhere.py:f: there is no file ")
        assert lines[3].startswith("nowhere.parquet: no such file")
        assert len(lines) == 4


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./model", "tests/model", "model", "runs/a/checkpoints/b", "~/model"]
)
def test_a_local_path_that_is_missing_is_not_looked_for_on_the_hub(path, told):
    assert told(f"model.path={path}") == f"model.path={path}: no such folder"


def test_a_hub_name_while_offline_and_a_file_are_one_sentence(told, folder):
    path = "someone/some-model"
    assert told(f"model.path={path}") == (
        f"model.path={path}: no such folder, and it can't be fetched from the hub: HF_HUB_OFFLINE is set"
    )
    path = folder / "config.json"
    assert told(f"model.path={path}") == f"model.path={path}: this is a file; the model's folder is wanted"


@pytest.mark.parametrize(
    "file", ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_file_that_is_missing_half_or_a_pointer_is_named(file, told, folder):
    whole = (folder / file).read_bytes()
    (folder / file).write_text(POINTER)
    assert told() == f"{file} is a git-lfs pointer, not the file itself: `git lfs pull` fetches it"
    (folder / file).write_bytes(whole[: len(whole) // 2])
    half = told()
    assert file in half or "chat template fails" in half
    assert len(half.splitlines()) == 1
    (folder / file).unlink()
    assert file in told()


@pytest.mark.parametrize("change", ["missing", "pointer", "cut", "longer"])
def test_of_several_files_of_weights_the_wrong_one_is_named(change, told, folder):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(names.values()):
        part = {name: weights[name] for name in weights if names[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert told() == ""
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes({"pointer": POINTER.encode(), "cut": content[:-1]}.get(change, content + b"x"))
    if change == "missing":
        second.unlink()
    says = {
        "missing": f"of 2 files of weights there lack {second.name}",
        "pointer": f"{second.name} is a git-lfs pointer",
    }
    assert told().startswith(says.get(change, f"{second.name} is damaged or not whole, "))


class Hostile:
    """An object that makes a file when it is read from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_refused_unread(told, folder, tmp_path):
    torch.save({NORM: Hostile(tmp_path / "hacked")}, folder / "pytorch_model.bin")
    assert told() == ""  # beside others nobody reads them
    (folder / WEIGHTS).unlink()
    assert told().startswith(f"its weights are pickled files, which could run anything: only {WEIGHTS} is read.")
    assert not (tmp_path / "hacked").exists()


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop(NORM), "the checkpoint lacks model.language_model.norm.weight"),
        (lambda w: w.update({NORM: torch.ones(63)}), "model.language_model.norm.weight [63], not [64]"),
        (lambda w: w.update({"a.lora_A": torch.ones(3)}), "has no place for: a.lora_A"),
        (lambda w: w.update({HEAD: torch.ones_like(w[EMBEDDING])}), "differs from it: set tie_word_embeddings=false"),
        (
            lambda w: w.update({HEAD: w.pop(EMBEDDING)}),
            "the checkpoint lacks embed_tokens.weight, though it has " + HEAD,
        ),
    ],
)
def test_weights_that_are_not_the_models_are_found_without_loading_it(change, says, told, folder):
    resave(folder, change)
    assert told().endswith(says)


def test_a_copy_of_a_tied_head_is_fine(told, folder):
    resave(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    assert told() == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(model_type="llama"), "config.json has model_type=llama; vogue trains qwen2_vl, qwen2_5_vl"),
        (lambda c: c["text_config"].update(num_hidden_layers="two"), "config.json: Validation error for field"),
        (lambda c: c["text_config"].update(num_attention_heads=0), "config.json: integer division or modulo by zero"),
        (lambda c: c["vision_config"].update(depth=3), "the checkpoint lacks model.visual.blocks.2."),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_one_sentence(change, says, told, folder):
    edit(folder / "config.json", change)
    assert told().startswith(says)
    assert len(told().splitlines()) == 1


def test_an_adapter_and_a_tokenizer_of_a_larger_model_are_refused(told, folder):
    edit(folder / "tokenizer.json", lambda c: c["added_tokens"].extend(
        {**c["added_tokens"][0], "id": 1000 + i, "content": f"<|{i}|>"} for i in range(100)
    ))  # fmt: skip
    assert "tokens, the model 320" in told()
    (folder / "adapter_config.json").write_text("{}")
    assert told() == "this is an adapter: model.path is its base model, and lora.adapter this folder"


def test_a_chat_template_is_tried_out(told, folder):
    file = folder / "chat_template.jinja"
    template = file.read_text()
    file.write_text(REFUSES + template)
    assert told().startswith("its chat template refuses a system message (no system role): set data.system_prompt=''")
    assert told("data.system_prompt=''") == told("data.system_prompt=") == ""
    file.write_text(DROPS)
    assert told().startswith("its chat template leaves the system prompt out: set data.system_prompt=''")
    file.write_text(template.replace("<|image_pad|>", ""))
    assert told() == "its chat template has 0 places for one image"
    file.write_text("{% for %}")
    assert told().startswith("its chat template fails: ")


def test_a_kv_cache_too_small_for_one_sequence_is_told_before_vllm_starts(told):
    # 140 tokens of 512 bytes: 71,680
    assert told("rollout.engine=vllm", "rollout.kv_cache_gb=0.0000717") == ""
    assert told("rollout.engine=vllm", "rollout.kv_cache_gb=0.0000716") == (
        "rollout.kv_cache_gb=7.16e-05 is less than one longest sequence takes, 0.0717 MB"
    )


def test_on_a_gpu_the_weights_and_one_sequence_must_fit_into_vllms_share(config, folder, monkeypatch):
    """There is none here; its memory is said to be what the weights and 140 tokens of 512 bytes take, twice."""
    model = read_checkpoint(str(folder)).model
    total = 2 * (4 * sum(weight.numel() for weight in load_file(folder / WEIGHTS).values()) + 140 * 512)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Gpu", (), {"total_memory": total}))
    assert check_engine(model, config("rollout.memory=0.5")).startswith("weights 0.7")
    with pytest.raises(ConfigError, match=r"^rollout\.memory=0\.49 of the GPU's "):
        check_engine(model, config("rollout.memory=0.49"))


def test_a_folder_of_weights_that_nobody_can_write_to_is_told(told):
    output = told("rollout.engine=server", "rollout.weight_folder=/proc/weights")
    assert "rollout.weight_folder=/proc/weights: no run can be written there: " in output


def test_a_disk_without_room_for_two_checkpoints_is_told(told, folder, monkeypatch):
    count = sum(weight.numel() for weight in load_file(folder / WEIGHTS).values())
    usage = type("Usage", (), {"free": 2 * 16 * count})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert told() == ""
    usage.free -= 1
    assert "are free there, less than two checkpoints of " in told()


def test_a_large_model_on_a_gpu_that_keeps_its_activations_is_a_warning(config):
    off, on = config("model.gradient_checkpointing=false"), config("model.gradient_checkpointing=true")
    assert keeps_activations(7_600_000_000, off, on_gpu=True).startswith(
        "model.gradient_checkpointing=false with 7.6 billion weights: a GPU keeps "
    )
    for count, chosen, on_gpu in [(7.6e9, on, True), (7.6e9, off, False), (5e8, off, True)]:
        assert keeps_activations(count, chosen, on_gpu) is None


def test_warnings_are_shown_beside_what_is_fine(capsys):
    found = Preflight(warnings=["model.path: odd"], fine={"model": "known"})
    show(found, Console())
    assert "warning: model.path: odd" in (told := capsys.readouterr().out) and "known" in told


def test_liger_without_a_gpu_is_a_problem(told, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert told("model.liger=true") == "model.liger=true: Triton's kernels need a GPU"


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 3)])
def test_a_checkpoint_takes_what_was_reckoned(dtype, stage, new_trainer):
    settings = [f"model.dtype={dtype}", f"trainer.deepspeed.zero_optimization.stage={stage}"]
    trainer = new_trainer(*settings, "model.freeze_vision=true")
    trainer.run_step()
    trainer.save()
    files = (trainer.checkpoints / "step_000001").rglob("*")
    size = sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".pt"))
    reckoned = checkpoint_bytes(read_checkpoint(trainer.config.model.path).model, trainer.config)
    assert 0.9 < size / reckoned < 1.1


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("max_num_seq=8", "max_num_seq=8: vLLM has no such argument; did you mean max_num_seqs"),
        ("seed=8", "seed=8: vogue sets this; the setting is seed"),
        ("gpu_memory_utilization=0.5", "gpu_memory_utilization=0.5: vogue sets this; the setting is rollout.memory"),
        ("logprobs_mode=raw_logprobs", "logprobs_mode=raw_logprobs: vogue sets this; the setting is none"),
        ("tensor_parallel_size=2", "tensor_parallel_size=2: vogue sets this"),
    ],
)
def test_arguments_that_vllm_does_not_know_or_vogue_decides_are_refused(argument, told, config):
    from vogue.rollout.vllm import check_engine_args

    with pytest.raises(ConfigError) as error:
        check_engine_args(config("rollout.engine=vllm", f"rollout.engine_args.{argument}"))
    assert str(error.value).startswith(f"rollout.engine_args.{told}")
    check_engine_args(config("rollout.engine=vllm", "rollout.engine_args.max_num_seqs=8"))
    with pytest.raises(ConfigError, match=r"^rollout.engine_args are vLLM's, but rollout.engine=hf"):
        config(f"rollout.engine_args.{argument}")


def test_layers_with_linear_attention_keep_no_keys_and_values():
    text = type("Text", (), {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_key_value_heads": 2})
    text.head_dim = 256
    config = load_config(None, ["model.path=a/b", "data.max_prompt_tokens=90", "rollout.max_tokens=10"])
    assert sequence_bytes(text, config) == 100 * 2 * 2 * 256 * 2


def test_sizes_are_shown_in_their_own_unit():
    assert [memory.shown(size) for size in (71_680, 5e8, 16.4e9)] == ["0.0717 MB", "0.5 GB", "16.4 GB"]


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_an_evaluation_refuses_the_same_model(engine, settings, folder, capsys):
    chosen = [*settings, f"model.path={folder}", f"rollout.engine={engine}"]
    resave(folder, lambda weights: weights[NORM][3:4].fill_(float("nan")))
    assert main(["eval", *chosen]) == 2
    assert capsys.readouterr().err.strip() == f"vogue eval: model.path={folder}: NaN or infinity in {NORM}"
    resave(folder, lambda weights: weights.pop(NORM))
    assert main(["eval", *chosen]) == 2
    assert "the checkpoint lacks model.language_model.norm.weight" in capsys.readouterr().err


@pytest.mark.long
def test_of_two_ranks_one_speaks_and_both_end_with_2(settings, folder):
    (folder / WEIGHTS).write_text(POINTER)
    command = [*launcher(2), "--module", "vogue.train", *settings, f"model.path={folder}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("is a git-lfs pointer") == 1
    assert (done.stdout + done.stderr).count("exits with return code = 2") == 1
    assert "Traceback" not in done.stderr
