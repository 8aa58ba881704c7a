"""Section of bench/gpu.py: trainings from generation to update, of a tiny model and of one with a 3B's widths.

Two ways. vogue's own trainer on one rank, GRPO and VOGUE, `rollout.engine=hf`, where all that it imports is installed.
And, needing torch and transformers alone, a plain loop: transformers' generation, shared prompts, `VogueLoss`, AdamW.

    python bench/gpu_training.py FOLDER tiny|3b STEPS [--quick]         # the trainer's part; a JSON object a step
"""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from gpu import Report, Settings
from machines import machine_of
from shapes import qwen_config, widen

# What vogue.trainer imports besides torch and transformers. DeepSpeed is no option of it: on one rank too it starts the
# process group (vogue.distributed), holds the optimizer (vogue.model.optimizer) and writes its state (.checkpoint).
NEEDED = (
    *("deepspeed", "pydantic", "omegaconf", "datasets", "math_verify", "rich", "pyarrow", "PIL", "psutil", "jinja2"),
    *("torchvision", "xxhash", "matplotlib", "threadpoolctl"),
)
TRANSFORMERS = (5, 17)  # the oldest that vogue asks for: of older ones no test says that they see the images
METHODS = ("grpo", "vogue")
MODELS = {"tiny": 8, "3b": 3}  # steps of each method


def training(report: Report, settings: Settings) -> None:
    for wide in (False,) if settings.quick else (False, True):
        with report.trying(f"plain loop, {'3b' if wide else 'tiny'}"):
            _plain(report, settings, wide)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        told = f"the trainer needs {', '.join(missing)} (wheels: the head of bench/gpu.sh says how)"
        report.add(what="vogue.trainer", skipped=told)
        return
    version = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
    if version < TRANSFORMERS:
        told = f"older than {TRANSFORMERS}: the trainer's steps may leave the images out"
        report.add(what="transformers", version=".".join(map(str, version)), warning=told)
    for model, steps in {"tiny": 1}.items() if settings.quick else MODELS.items():
        with report.trying(f"vogue.trainer, {model}"), tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, folder, model, str(steps), *(["--quick"] if settings.quick else [])]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout:  # what was measured before an error or the section's end is kept
                    if line.startswith("{"):
                        report.add(what=f"vogue.trainer, {model}", **json.loads(line))
            if process.returncode:
                raise RuntimeError(f"ended with exit code {process.returncode}; training.log has its last words")


# ------------------------------------------------------------------------------------------------------ plain loop


def _plain(report: Report, settings: Settings, wide: bool) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vogue.model.attention import attention_inputs, automatic
    from vogue_kernels import VogueLoss

    device, dtype = settings.device, torch.bfloat16 if settings.device == "cuda" else torch.float32
    prompt, n, length = (12, 2, 4) if settings.quick else (1024, 8, 128)
    config = qwen_config(wide)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    text = config.text_config
    attention = automatic(dtype, text.hidden_size // text.num_attention_heads)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    machine, loss_function = machine_of(device, dtype, quick=True), VogueLoss()
    ids = torch.randint(200, (1, prompt), device=device)
    segments = torch.tensor([[0] * prompt + [i + 1 for i in range(n) for _ in range(length)]], device=device)
    counted = torch.arange(length, device=device).repeat(n)
    positions = torch.cat([torch.arange(prompt, device=device), prompt + counted]).expand(3, 1, -1)
    # The last token of the prompt predicts the first of each completion, which predicts its second, and so on.
    predicts = torch.where(counted == 0, prompt - 1, prompt + torch.arange(n * length, device=device) - 1)
    advantage = torch.linspace(-1, 1, n, device=device).repeat_interleave(length)

    def generate():
        model.set_attn_implementation({"text_config": "sdpa"})
        told = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "num_return_sequences": n}
        return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **told)[:, prompt:]

    def hidden(embedded):
        body = model.model.language_model
        given = attention_inputs(attention, segments, dtype)
        return body(inputs_embeds=embedded, position_ids=positions, use_cache=False, **given).last_hidden_state[0]

    def update(completions, method):
        model.set_attn_implementation({"text_config": attention})
        embedded = model.get_input_embeddings()(torch.cat([ids[0], completions.flatten()])[None])
        noisy = {}
        if method == "vogue":
            with torch.no_grad():
                other = hidden(embedded + 0.1 * embedded.std() * torch.randn_like(embedded))
            noisy = {"hidden_other": other[predicts], "noisy": True}
        given = hidden(embedded)[predicts], model.lm_head.weight, completions.flatten(), advantage
        loss, _ = loss_function(*given, **noisy)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for method in METHODS:
        for step in range(1 if settings.quick else 3):
            start = time.perf_counter()
            completions = generate()
            machine.free()
            generated = time.perf_counter()
            memory = machine.peak_bytes(lambda x=completions, method=method: update(x, method))
            machine.free()
            seconds = {"generation_s": generated - start, "update_s": time.perf_counter() - generated}
            row = {
                "method": method,
                "step": step,
                "attention": attention,
                "tokens": segments.numel(),
                **seconds,
                **memory,
            }
            report.add(what=f"plain loop, {'3b' if wide else 'tiny'}", **row)


# --------------------------------------------------------------------------------------------------- vogue.trainer


def _trainer(folder: Path, wide: bool, steps: int, quick: bool) -> None:
    """GRPO's and VOGUE's steps in this process; a JSON object for each."""
    from trainer_contestants import Task, prepare, vogue_trainer

    task = Task("digits", (56, 28), prompt=40, completion=20, prompts=8, n=8)
    if wide:
        task = Task("digits", (448, 448), prompt=400, completion=128, prompts=4, n=8)
    if quick:
        task = replace(task, prompts=2, n=2, completion=4)
    prepare(task, folder)
    if wide:
        widen(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    used = getattr(machine_of(device, torch.float32, quick=True), "used", None)
    for method in METHODS:
        settings = [f"method={method}", f"trainer.steps={steps}", f"model.dtype={dtype}", "branch.probability=1"]
        settings += [f"trainer.output_dir={folder}/{method}"]
        trainer = vogue_trainer(folder, task, *[x for x in settings if method == "vogue" or "branch" not in x])
        for step in range(steps):
            start = time.perf_counter()
            metrics = trainer.run_step().metrics
            row = {"method": method, "step": step, "seconds": time.perf_counter() - start}
            row |= {name: value for name, value in metrics.items() if name.startswith("time/")}
            row |= {"memory_gb": metrics["memory_gb"], "nvml_used_gb": used() / 1e9 if used else None}
            print(json.dumps(row | {"attention": trainer.policy.attention}), flush=True)
        if not wide:  # the wide one's takes gigabytes
            start = time.perf_counter()
            trainer.save()
            print(json.dumps({"method": method, "checkpoint_s": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("steps", type=int)
    parser.add_argument("--quick", action="store_true", help="few and short completions")
    given = parser.parse_args()
    _trainer(given.folder, given.model == "3b", given.steps, given.quick)
