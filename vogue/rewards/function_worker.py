"""The process of `vogue.rewards.function`: answers [completions, samples] with {"earned": [{"reward": ...}, ...]}.

Or with {"failed": "raised ..."}, and the position "at" where it is known. Its first line is {} or why the function
can't be imported. A script that imports nothing of vogue, so that it starts soon.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def work(target: str, name: str, options: str, search: str) -> None:
    """Import the function, say whether that worked, and answer questions from stdin until it closes.

    target   a file, or an importable module
    options  JSON: further arguments of the function
    search   JSON: where the trainer looks for modules
    """
    # A launcher's SIGTERM is for the trainer, which ends this process itself; what it starts takes it as ever.
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    questions, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the function starts may read, and gets no question
    os.dup2(2, 1)  # whatever is printed is not a reply
    sys.path[:1] = [str(Path(target).parent)] if target.endswith(".py") else []
    sys.path += [place for place in json.loads(search) if place not in sys.path]
    try:
        module = _imported(target)
        function = getattr(module, name)
    except Exception as error:  # of the user's code, any
        print(json.dumps({"failed": _told(error, target)}), file=replies, flush=True)
        return
    path, loop = str(module.__file__), asyncio.new_event_loop()
    call = _caller(function, json.loads(options), loop)
    print(json.dumps({}), file=replies, flush=True)
    for line in questions:
        print(json.dumps(_answer(call, path, *json.loads(line))), file=replies, flush=True)


def _imported(target: str) -> ModuleType:
    if not target.endswith(".py"):
        return importlib.import_module(target)
    spec = importlib.util.spec_from_file_location("reward_function", target)
    if spec is None or spec.loader is None:
        raise ImportError(f"{target} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _caller(function: Callable, options: dict[str, Any], loop: asyncio.AbstractEventLoop) -> Callable:
    """The function as one of all completions, called with `options`, whatever its kind.

    A first parameter called `completion` means one completion at a time; several coroutines run at once.
    """

    async def gathered(started) -> list:
        return list(await asyncio.gather(*started))

    def batch(completions: list[str], samples: list[dict]) -> list:
        found = function(completions, samples, **options)
        return list(loop.run_until_complete(found) if inspect.isawaitable(found) else found)

    def single(completions: list[str], samples: list[dict]) -> list:
        found = [function(*pair, **options) for pair in zip(completions, samples, strict=True)]
        return loop.run_until_complete(gathered(found)) if found and inspect.isawaitable(found[0]) else found

    return single if next(iter(inspect.signature(function).parameters), "") == "completion" else batch


def _answer(call: Callable, path: str, completions: list[str], samples: list[dict]) -> dict:
    try:
        values = call(completions, samples)
    except Exception as error:  # of the user's code, any
        return {"failed": f"raised {_told(error, path)}"}
    if len(values) != len(completions):
        return {"failed": f"returned {len(values)} rewards for {len(completions)} completions"}
    for at, value in enumerate(values):
        if wrong := _why_unusable(value):
            return {"failed": f"returned {wrong},", "at": at}
    return {"earned": [_earned(value) for value in values]}


def _why_unusable(value: Any) -> str | None:
    """Why a returned value can't be used, None where it can: a number, or a dict with a reward and more."""
    if not isinstance(value, dict):
        return None if _is_finite(value) else f"{value!r}, not a finite number"
    if "reward" not in value:
        return f"{value!r}, without a 'reward'"
    for name, part in value.items():
        if name == "parsed":
            if not isinstance(part, str | None):
                return f"'parsed': {part!r}, neither a text nor None"
        elif not _is_finite(part):
            return f"{name!r}: {part!r}, not a finite number"
        elif name == "accuracy" and not 0 <= part <= 1:
            return f"'accuracy': {part!r}, not between 0 and 1"
    return None


def _earned(value: Any) -> dict[str, Any]:
    parts = value if isinstance(value, dict) else {"reward": value}
    return {str(name): part if name == "parsed" else float(part) for name, part in parts.items()}


def _is_finite(reward: Any) -> bool:
    try:
        return isinstance(reward, numbers.Real) and math.isfinite(reward)
    except OverflowError:  # of an integer that no float holds
        return False


def _told(error: Exception, path: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


if __name__ == "__main__":
    work(*sys.argv[1:])
