"""How settings are read and refused, whatever they are: YAML under `key=value` overrides, checked by pydantic."""

import shlex
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A setting that can't be used; the message names it and says what would do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Checked = TypeVar("Checked", bound=Section)


def read_settings(path: str | Path | None, overrides: list[str]) -> dict[str, Any]:
    """A YAML file's settings (optional) under `key=value` overrides, unchecked; raises `ConfigError`."""
    try:
        for text in overrides:
            _check_value(text)
        # Nothing behind the = is text, too: OmegaConf would take it for null, and so for unset.
        given = OmegaConf.from_dotlist([text + "''" if text.find("=") == len(text) - 1 else text for text in overrides])
        parts = [_read_file(path, given)] if path else []
        values: Any = OmegaConf.to_container(OmegaConf.merge(*parts, given), resolve=True)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_sentence(error, path)) from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{path or 'overrides'}: {str(error).splitlines()[0]}") from None
    return values


def _check_value(override: str) -> None:
    """Raise `ConfigError` for a `key=value` whose value isn't YAML, such as a template's {{ }} without quotes."""
    key, _, value = override.partition("=")
    try:
        yaml.compose(value, yaml.SafeLoader)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or error
        quoted = value.replace("'", "''")
        as_text = shlex.quote(f"{key}='{quoted}'")
        raise ConfigError(f"{override}: the value isn't YAML: {why}. As text it is {as_text}") from None


def _read_file(path: str | Path, overrides: DictConfig) -> DictConfig:
    """A YAML file's settings, of which none is in the way of the overrides' sections."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"configuration file {path} can't be read: {error.strerror}") from None
    if not content:
        raise ConfigError(f"{path} is empty: expected settings, name: value")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings, name: value, but found a {type(content).__name__}")
    for key in overrides:
        if content.get(key) is not None and isinstance(content[key], dict) != isinstance(overrides[key], DictConfig):
            raise ConfigError(f"{path}: {key}={content[key]!r}, but key=value settings set {key}={overrides[key]}")
    return cast(DictConfig, OmegaConf.load(path))  # which, unlike yaml's own reader, refuses a key that stands twice


def _yaml_sentence(error: yaml.YAMLError, path: str | Path | None) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{path or 'overrides'}: {error}"
    line = error.problem_mark.line
    if path and any("\t" in text for text in Path(path).read_text().splitlines()[line : line + 1]):
        return f"{path}, line {line + 1}: a tab, where YAML takes spaces"
    place = f"{path}, line {line + 1}" if path else "overrides"
    return f"{place}: {error.problem}"


def check(model: type[Checked], values: dict[str, Any], command: str) -> Checked:
    """`values` as a `model`; raises `ConfigError` with one line per wrong setting of `command`."""
    try:
        return model.model_validate(values)
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
