"""A model's chat template, tried out: does it show the system prompt, and one place for one image?"""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vogue.config import Config
from vogue.data import Sample
from vogue.data.prompts import chat_messages
from vogue.inputs import Preprocessor
from vogue.model.files import find_folder
from vogue.settings import ConfigError

NEEDED = (  # of each, one
    ("tokenizer_config.json",),
    ("tokenizer.json", "vocab.json", "tokenizer.model"),
    ("preprocessor_config.json", "processor_config.json"),
)
NONE = "set data.system_prompt=''"
ASKED = Sample("<image>Which?", "1", (b"",))  # of which the text alone is looked at


def checked_preprocessor(config: Config) -> Preprocessor:
    """The preprocessor of a run; raises `ConfigError` where the model's folder lacks what it needs.

    The chat template must show the system prompt and one place for one image.
    """
    try:
        _check_processor_files(find_folder(config.model.path))
        preprocessor = Preprocessor.of(config)
        _check_template(preprocessor.processor, preprocessor.system_prompt)
        return preprocessor
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


def _check_processor_files(folder: Path) -> None:
    """Raise `ConfigError` where transformers would make a tokenizer alone, an empty one, or one with other tokens."""
    for names in NEEDED:
        if not any((folder / name).exists() for name in names):
            raise ConfigError(f"there is no {' or '.join(names)} in it")


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
