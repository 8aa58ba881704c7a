"""How settings are read and refused, whatever they are: YAML under `key=value` overrides, checked by pydantic."""

from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A setting that can't be used; the message names it and says what would do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Checked = TypeVar("Checked", bound=Section)


def read_settings(path: str | Path | None, overrides: list[str]) -> dict[str, Any]:
    """A YAML file's settings (optional) under `key=value` overrides, unchecked; raises `ConfigError`."""
    try:
        parts = [OmegaConf.load(path)] if path else []
        merged = OmegaConf.merge(*parts, OmegaConf.from_dotlist(overrides))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path or 'overrides'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings, found a {type(values).__name__}")
    return values


def check(model: type[Checked], values: dict[str, Any], command: str) -> Checked:
    """`values` as a `model`; raises `ConfigError` with one line per wrong setting of `command`."""
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(item, model, command) for item in error.errors())) from None


def _sentence(item: ErrorDetails, model: type[Section], command: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{key} is not set: {_description(item['loc'], model)}"
    if item["type"] == "extra_forbidden":
        return f"unknown setting {key}; `{command} --help` lists them all"
    if item["type"] == "value_error":
        return item["msg"].removeprefix("Value error, ")
    return f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _description(location: tuple, model: Any) -> str:
    for name in location[:-1]:  # of a section, or a name of the user's own in a table of sections
        model = model.model_fields[name].annotation if hasattr(model, "model_fields") else get_args(model)[1]
    return model.model_fields[location[-1]].description
