"""What is wrong with `trainer.deepspeed`, told before DeepSpeed starts.

DeepSpeed's own configuration reads the settings here. Its sections of pydantic refuse what they don't know; of all
others it ignores a key that it never asks for, which is how such a key is found.
"""

import copy
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

PREFIX = "trainer.deepspeed"
INSTEAD = {  # settings of vogue, for what DeepSpeed would decide otherwise
    "optimizer": "optimizer.lr, optimizer.betas and optimizer.weight_decay",
    "scheduler": "optimizer.lr_scheduler_type and optimizer.warmup_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "train_batch_size": "rollout.prompts, rollout.n and trainer.updates",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_tokens",
    "gradient_accumulation_steps": "trainer.micro_batch_tokens",
    "fp16": "model.dtype",
    "bf16.enabled": "model.dtype",
    "zero_allow_untested_optimizer": "none: the optimizer is vogue's",
    "data_types.grad_accum_dtype": "trainer.grad_accum_dtype",
}
OFFLOADS = {"offload_optimizer": "trainer.offload_optimizer", "offload_param": "trainer.offload_params"}


class _Asked(dict):
    """Settings that remember which keys were looked for, and which were read, with the default of each."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__({key: _Asked(v) if isinstance(v, dict) else v for key, v in settings.items()})
        self.known: set[str] = set()
        self.read: dict[str, Any] = {}

    def __copy__(self) -> "_Asked":
        return self

    def __contains__(self, key) -> bool:
        self.known.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.read.setdefault(key, None)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read[key] = default if self.read.get(key) is None else self.read[key]
        return super().get(key, default)


def deepspeed_problems(chosen: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """A sentence for each setting in `chosen` that DeepSpeed doesn't know or refuses, or that contradicts `own`."""
    contradictions = list(_contradictions(chosen, own))
    if contradictions:
        return contradictions
    asked = _Asked(own | chosen)
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        told = [_refused(item, error.title, chosen) for item in error.errors()]
        rest = _without(chosen, [item["loc"] for item in error.errors()])
        return told + (deepspeed_problems(rest, own) if rest != chosen else [])  # DeepSpeed stops at the first section
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError, AttributeError, KeyError) as error:
        return [f"{PREFIX}={chosen}: DeepSpeed says: {str(error).splitlines()[0]}"]
    return list(_ignored(asked, PREFIX))


def _contradictions(chosen: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    for key, instead in INSTEAD.items():
        section, _, name = key.partition(".")
        if section not in chosen:
            continue
        given, fixed = chosen[section], own.get(section)
        if name and isinstance(given, dict) and isinstance(fixed, dict):
            given, fixed = given.get(name, fixed.get(name)), fixed.get(name)
        if given != fixed:
            yield f"{PREFIX}.{key}={given}: vogue sets that itself; its own setting is {instead}"
    for section, fixed in own.items():
        if isinstance(fixed, dict) and not isinstance(chosen.get(section, {}), dict):
            yield f"{PREFIX}.{section}={chosen[section]!r}: must be a section, with settings below it"
            return
    yield from _misplaced(chosen.get("zero_optimization", {}), own)


def _misplaced(zero: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    """What ZeRO's stage can't do, and what is offloaded without vogue's setting, on which the optimizer depends."""
    place, known = f"{PREFIX}.zero_optimization", own["zero_optimization"]
    stage = zero.get("stage", known["stage"])
    for name, setting in OFFLOADS.items():
        section = zero.get(name)
        device = section.get("device") if isinstance(section, dict) else None
        if device == "nvme" and name == "offload_optimizer":
            yield f"{place}.{name}.device=nvme: no checkpoint can be written of what lies there; cpu is what there is"
        elif device in ("cpu", "nvme") and name not in known:
            yield f"{place}.{name}.device={device}: set {setting}=true, which this may only refine"
        if name in known and stage in (0, 1, 2) and (stage == 0 or name == "offload_param"):
            yield f"{place}.stage={stage}: {setting}=true needs {'3' if name == 'offload_param' else '1, 2 or 3'}"
    if stage == 0 and own["bf16"]["enabled"] and own.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        yield f"{place}.stage=0: trainer.grad_accum_dtype=float32 needs 1, 2 or 3 with model.dtype=bfloat16"


def _refused(item: Any, model: str, chosen: dict[str, Any]) -> str:
    """One of pydantic's errors, of the section that `model`, DeepSpeed's class, is of."""
    place = ".".join(map(str, item["loc"]))
    section = next((key for key, value in chosen.items() if _has(value, item["loc"])), model)
    key = f"{PREFIX}.{section}.{place}"
    if item["type"] == "extra_forbidden":
        return f"{key}: DeepSpeed has no such setting{_similar(place.rpartition('.')[2], _fields(model))}"
    if item["type"] == "enum":  # DeepSpeed's has a value twice
        allowed = dict.fromkeys(re.split(", | or ", item["ctx"]["expected"]))
        return f"{key}={item['input']!r}: input should be one of {', '.join(allowed)}"
    return f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _without(chosen: dict[str, Any], locations: list[tuple]) -> dict[str, Any]:
    """The settings without what stands at these places of any of their sections."""
    left = copy.deepcopy(chosen)
    for section in left.values():
        for location in locations:
            if _has(section, location):
                functools.reduce(dict.__getitem__, location[:-1], section).pop(location[-1])
    return left


def _has(settings: Any, location: tuple) -> bool:
    for part in location:
        if not isinstance(settings, dict) or part not in settings:
            return False
        settings = settings[part]
    return True


def _fields(name: str) -> list[str]:
    """Settings of DeepSpeed's section of this class, under the names by which they are given."""
    fields = [model.model_fields for model in DeepSpeedConfigModel.__subclasses__() if model.__name__ == name]
    return [field.alias or name for part in fields for name, field in part.items()]


def _ignored(settings: _Asked, place: str) -> Iterator[str]:
    for key, value in settings.items():
        if key not in settings.read:
            yield f"{place}.{key}: DeepSpeed has no such setting{_similar(str(key), settings.known | {*settings.read})}"
        elif isinstance(value, _Asked):
            if value.read:  # else pydantic has read all of it at once
                yield from _ignored(value, f"{place}.{key}")
        elif type(default := settings.read[key]) in (bool, int) and type(value) is not type(default):
            yield f"{place}.{key}={value!r}: must be of the kind of its default, {default}"


def _similar(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""
