"""The checkpoints in a run's folder: which there are, which is the best one, and which of them are deleted.

    output_dir/checkpoints/step_000020     one of them (`vogue.model.checkpoint`)
    output_dir/checkpoints/best            with trainer.save_best: a link to the best one

An old one is renamed before it is deleted, so that none is half there.
"""

import shutil
from pathlib import Path

from vogue.config import Config
from vogue.run.folder import remove, sync
from vogue.step.run_state import RunState

UNFINISHED = (".step_*.partial", ".step_*.old")
BEST = "best"  # a link's name, and that of what the run's state knows of the best checkpoint: {"step": …}


def root_of(config: Config) -> Path:
    """The folder of a run's checkpoints."""
    return config.trainer.output_dir / "checkpoints"


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root` by their step, whole or damaged."""
    found = (path for path in root.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return sorted(found, key=step_of)


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def mark_best(root: Path, state: RunState) -> None:
    """Let the link `best` lead to the best checkpoint that the run's state knows; there is none where it is gone."""
    known = state.current.get(BEST)
    best, new = root / name_of(known["step"]) if known else None, root / f".{BEST}.new"
    new.unlink(missing_ok=True)
    if best and best.is_dir():
        new.symlink_to(best.name)  # relative: the run's folder may be moved
        new.rename(root / BEST)
    else:
        (root / BEST).unlink(missing_ok=True)
    sync(root)


def best_of(root: Path) -> Path | None:
    """The checkpoint that the link `best` leads to, if there is one."""
    link = root / BEST
    return root / link.readlink() if link.is_symlink() and link.exists() else None


def delete_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    kept = (*checkpoints(root)[-keep:], best_of(root))
    for old in checkpoints(root):
        if old not in kept:
            remove(old)


def forget_after(root: Path, step: int) -> None:
    """Delete the checkpoints after `step`, whose steps run again."""
    for path in checkpoints(root):
        if step_of(path) > step:
            remove(path)


def clear(root: Path) -> None:
    """Delete what saving and deleting left behind where they were stopped in the middle."""
    for pattern in UNFINISHED:
        for path in root.glob(pattern):
            shutil.rmtree(path)
