"""A model's chat template, tried out: does it show the system prompt, and one place for one image?"""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vogue.config import Config
from vogue.data import Sample
from vogue.data.prompts import chat_messages, system_prompt
from vogue.inputs import Preprocessor, load_processor
from vogue.model.files import find_folder
from vogue.settings import ConfigError

VOCABULARY = ("tokenizer.json", "vocab.json", "tokenizer.model")  # of which a tokenizer has one
NONE = "set data.system_prompt='' (in a shell \"data.system_prompt=''\")"
ASKED = Sample("<image>Which?", "1", (b"",))  # of which the text alone is looked at


def checked_preprocessor(config: Config) -> Preprocessor:
    """The preprocessor of a run; raises `ConfigError` where the model's folder lacks what it needs.

    The chat template must show the system prompt and one place for one image.
    """
    prompt = system_prompt(config)
    try:
        folder = find_folder(config.model.path)
        _check_tokenizer_files(folder)
        processor: Any = load_processor(str(folder))
        if not hasattr(processor, "image_processor"):
            raise ConfigError("there is no image processor in it, preprocessor_config.json")
        _check_template(processor, prompt)
        return Preprocessor(processor, prompt, config.data.max_prompt_tokens)
    except ValueError as error:  # ConfigError, or a processor of a family that vogue doesn't know
        told = str(error).removeprefix(f"model.path={config.model.path}: ")
        raise ConfigError(f"model.path={config.model.path}: {told}") from None


def _check_template(processor: Any, prompt: str) -> None:
    if not processor.chat_template:
        raise ConfigError("there is no chat template in it, chat_template.jinja")
    try:
        text = _render(processor, prompt)
    except (TemplateError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        if not prompt or _fails_without(processor):
            raise ConfigError(f"its chat template fails: {why}") from None
        raise ConfigError(f"its chat template refuses a system message ({why}): {NONE}") from None
    if prompt.strip() not in text:
        raise ConfigError(f"its chat template leaves the system prompt out: {NONE}")
    if (places := text.count(processor.image_token)) != 1:
        raise ConfigError(f"its chat template has {places} places for one image")


def _check_tokenizer_files(folder: Path) -> None:
    """Raise `ConfigError` where transformers would make an empty tokenizer, or one with other special tokens."""
    if not any((folder / name).exists() for name in VOCABULARY):
        raise ConfigError(f"there is no {VOCABULARY[0]} in it")
    if not (folder / "tokenizer_config.json").exists():
        raise ConfigError("there is no tokenizer_config.json in it")


def _render(processor: Any, prompt: str) -> str:
    messages = chat_messages(ASKED, prompt)
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _fails_without(processor: Any) -> bool:
    """Whether the chat template fails without a system message too."""
    try:
        _render(processor, "")
    except (TemplateError, TypeError, ValueError):
        return True
    return False
