"""The process of `vogue.rewards.function`: answers [completions, samples] with {"rewards": [...]}.

Or with {"failed": "raised ..."}, and the position "at" where it is known. Its first line is {} or why the function
can't be imported. A script that imports nothing of vogue, so that it starts soon.
"""

import importlib.util
import json
import math
import numbers
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def work(path: str, name: str) -> None:
    """Import the function, say whether that worked, and answer questions from stdin until it closes."""
    # A launcher's SIGTERM is for the trainer, which ends this process itself; what it starts takes it as ever.
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    questions, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the function starts may read, and gets no question
    os.dup2(2, 1)  # whatever is printed is not a reply
    sys.path[0] = str(Path(path).parent)
    try:
        spec = importlib.util.spec_from_file_location("reward_function", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # of the user's code, any
        print(json.dumps({"failed": _told(error, path)}), file=replies, flush=True)
        return
    print(json.dumps({}), file=replies, flush=True)
    for line in questions:
        print(json.dumps(_answer(function, path, *json.loads(line))), file=replies, flush=True)


def _answer(function: Callable, path: str, completions: list[str], samples: list[dict]) -> dict:
    try:
        rewards = list(function(completions, samples))
    except Exception as error:  # of the user's code, any
        return {"failed": f"raised {_told(error, path)}"}
    if len(rewards) != len(completions):
        return {"failed": f"returned {len(rewards)} rewards for {len(completions)} completions"}
    for at, reward in enumerate(rewards):
        if not isinstance(reward, numbers.Real) or not _is_finite(reward):
            return {"failed": f"returned {reward!r}, not a finite number,", "at": at}
    return {"rewards": [float(reward) for reward in rewards]}


def _is_finite(reward: numbers.Real) -> bool:
    try:
        return math.isfinite(reward)
    except OverflowError:  # of an integer that no float holds
        return False


def _told(error: Exception, path: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


if __name__ == "__main__":
    work(*sys.argv[1:])
