"""The settings of a run with their descriptions, as `vogue train --help` lists them."""

import textwrap
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vogue.config import Config

HELP_WIDTH = 100  # columns of a setting's description


def settings_help() -> str:
    lines, section = ["settings (key=value, default in brackets):", ""], ""
    for key, field in fields(Config, ""):
        found = key.rpartition(".")[0]
        if found != section:
            lines += ["", f"{found}: {Config.model_fields[found].annotation.__doc__}", ""]
            section = found
        default = field.default
        if default is None or default is PydanticUndefined:
            default = "unset" if default is None else "required"
        lines.append(f"  {key} [{default}]")
        lines += textwrap.wrap(field.description or "", HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every setting below `model` by its dotted name, section by section."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
