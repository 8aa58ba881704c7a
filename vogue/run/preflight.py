"""What every training does first, and `vogue train --check` alone: find all that is wrong before something slow begins.

Nothing slow is started and no weight is read; what goes wrong is told together, in the order of a run. Every rank does
it, and all of them stop for what any of them found.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from vogue.config import Config
from vogue.config.presets import told_of_answers, told_of_starts
from vogue.data import DataError
from vogue.inputs import Preprocessor
from vogue.model.deepspeed_check import deepspeed_problems
from vogue.model.files import Checkpoint, check_experts, read_checkpoint
from vogue.model.liger import check_liger
from vogue.model.lora import add_adapters
from vogue.model.optimizer import own_settings
from vogue.model.policy import check_attention
from vogue.model.reference import check_reference
from vogue.rewards import RewardError, check_function
from vogue.rollout.latent_spans import check_latent
from vogue.rollout.sampling import told_of_truncation
from vogue.run import launch, logs, trackers
from vogue.run.chat_template import checked_preprocessor
from vogue.run.folder import check_unlocked, check_writable
from vogue.run.memory import (
    adapter_count,
    check_engine,
    check_length,
    checkpoint_bytes,
    keeps_activations,
    shown,
    weight_count,
)
from vogue.run.plan import told_of
from vogue.run.save_schedule import check_hub
from vogue.settings import ConfigError

Result = TypeVar("Result")


@dataclass
class Preflight:
    """What was found: `problems` and `warnings`, a sentence each; `fine`, by part; and what makes prompts."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fine: dict[str, str] = field(default_factory=dict)
    preprocessor: Preprocessor | None = None

    def of(self, function: Callable[..., Result], *given: Any) -> Result | None:
        """What `function` returns; None where it finds a problem, which is kept."""
        try:
            return function(*given)
        except (ConfigError, DataError, RewardError) as error:
            self.problems += str(error).splitlines()
            return None


def examine(config: Config, resume: bool) -> Preflight:
    """Look at folder, model, chat template, memory, DeepSpeed's settings and reward of a run; its data comes next."""
    found = Preflight()
    if launch.rank() == 0:  # which writes there, and tries it
        found.of(logs.check_folder, config, resume)
        found.of(check_unlocked, config.trainer.output_dir)
        found.problems += trackers.missing(config)
    if checkpoint := found.of(read_checkpoint, config.model.path):
        _examine_model(found, checkpoint, config)
        found.preprocessor = found.of(checked_preprocessor, config)
        if found.preprocessor:
            found.of(check_vocabulary, found.preprocessor, checkpoint)
            found.of(check_latent, found.preprocessor.tokenizer, config)
    found.problems += deepspeed_problems(config.trainer.deepspeed, own_settings(config))
    found.of(check_function, config.reward)
    told = (told_of_starts(config), told_of_answers(config), told_of_truncation(config), found.of(check_hub, config))
    found.warnings += filter(None, told)
    if config.rollout.engine_args or config.rollout.sleep:
        _check_vllm(found, config)
    if config.rollout.engine == "server":
        _check_servers(found, config)
    return found


def _check_vllm(found: Preflight, config: Config) -> None:
    from vogue.rollout.vllm import check_engine_args, check_sleep  # importing vLLM takes seconds

    found.of(check_engine_args, config)
    found.of(check_sleep, config)


def _check_servers(found: Preflight, config: Config) -> None:
    from vogue.rollout.serving import check_servers  # as above

    found.of(check_servers, config)
    if config.rollout.weight_folder and launch.rank() == 0:  # which alone writes there
        found.of(check_writable, config.rollout.weight_folder, "rollout.weight_folder")


def show(found: Preflight, console: Console) -> None:
    """Print what was found fine, and warnings."""
    table = Table("checked", "", show_edge=False)
    for part, text in found.fine.items():
        table.add_row(part, text)
    console.print(table)
    warn(found, console)


def warn(found: Preflight, console: Console) -> None:
    for text in found.warnings:
        console.print(f"warning: {text}", soft_wrap=True)


def _examine_model(found: Preflight, checkpoint: Checkpoint, config: Config) -> None:
    model: Any = checkpoint.model
    head = "tied" if model.config.tie_word_embeddings else "its own"
    kind, count = model.config.model_type, weight_count(model)
    found.fine["model"] = f"{kind}, {count / 1e6:.3g} million weights, {config.model.dtype}; head: {head}"
    if config.lora.on:
        found.of(add_adapters, model, config.lora, config.seed)
        found.fine["adapters"] = f"{adapter_count(model) / 1e6:.3g} million weights; the model itself is frozen"
    if warning := keeps_activations(count, config, torch.cuda.is_available()):
        found.warnings.append(warning)
    found.of(check_attention, model, config.model.attention)
    if config.model.liger:
        found.of(check_liger, model)
    checks = {
        "tokens": (check_length, model.config.get_text_config()),
        "memory": (told_of, model),
        "disk": (check_disk, model),
    }
    if config.kl.coef:
        checks["reference"] = (check_reference, model)
    if config.rollout.engine != "hf":
        found.of(check_experts, checkpoint)
    if config.rollout.engine != "hf" and not config.rollout.servers:
        checks["engine"] = (check_engine, model)
    for part, (check, given) in checks.items():
        if text := found.of(check, given, config):
            found.fine[part] = text


def check_vocabulary(preprocessor: Preprocessor, checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` where the tokenizer has tokens that the model has no embedding of."""
    embedding: Any = checkpoint.model.get_input_embeddings()
    tokens, rows = len(preprocessor.tokenizer), len(embedding.weight)
    if tokens > rows:
        raise ConfigError(f"model.path={checkpoint.folder}: the tokenizer has {tokens} tokens, the model {rows}")


def check_disk(model: Any, config: Config) -> str:
    """What checkpoints take and what is free; raises `ConfigError` where two don't fit."""
    wanted = config.trainer.output_dir.absolute()
    folder = next(path for path in (wanted, *wanted.parents) if os.path.exists(path))  # too long a name is none
    one, free = checkpoint_bytes(model, config), shutil.disk_usage(folder).free
    if 2 * one > free:
        raise ConfigError(
            f"trainer.output_dir={config.trainer.output_dir}: {shown(free)} are free there, less than two checkpoints "
            f"of {shown(one)} each"
        )
    return f"a checkpoint takes {shown(one)}; {shown(free)} are free"
