"""What a run leaves behind and shows while it runs; only rank 0 has one.

metrics.jsonl       one object a step
evaluations.jsonl   held-out pass@k as [mean, low, high], after so many steps, and what every problem got
completions.jsonl   sampled completions token by token (`vogue.run.completion_records`)
completions/        their images
tensorboard/        the same metrics as events
config.yaml         the resolved configuration
trackers.json       the run's ids in the trackers of `trainer.report_to` (`vogue.run.trackers`)
"""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from vogue.config import Config, dumped, flatten, load_config
from vogue.evaluate import headline
from vogue.run.folder import IMAGES, check_new, check_writable, iterate_rows, lines_of, parts, replace, rotate
from vogue.run.trackers import Trackers
from vogue.settings import ConfigError

SHOWN = {
    **{"reward": "reward", "accuracy": "acc", "entropy": "H", "u_per": "u_per", "throughput/rollout": "tok/s"},
    "time/wait": "wait s",  # of several ranks
}
# How far the last row's step is behind the number of steps: steps are counted from 0, evaluations come after a step.
STEPS_BEHIND = {"metrics.jsonl": 1, "completions.jsonl": 1, "evaluations.jsonl": 0}
# Settings that leave what a run computes as it is.
HARMLESS = (
    *("trainer.output_dir", "trainer.save_every", "trainer.keep", "trainer.log_completions", "trainer.timeout"),
    *("trainer.report_to", "trainer.project", "trainer.run_name", "trainer.tracker_args", "rollout.memory"),
    *("trainer.save_minutes", "trainer.save_best", "trainer.save_model_only", "trainer.save_command"),
    *("trainer.push_to_hub", "trainer.log_rotation_mb", "reward.pass_env"),
)
LENGTH = ("trainer.steps", "trainer.epochs")
# Settings that a resumed run may change: those, and what is asked for. So is its length where no schedule reads it.
# How a run is laid over ranks and their memory changes what it computes by rounding alone, and may be what it needs to
# go on where there are fewer of them; so may be its servers, one of which may be gone for good.
RESUMABLE = (
    *(*HARMLESS, "trainer.eval_every", "trainer.eval_samples", "data.test", "data.test_limit"),
    *("trainer.offload_optimizer", "trainer.offload_params", "trainer.deepspeed", "trainer.micro_batch_tokens"),
    *("model.gradient_checkpointing", "rollout.tensor_parallel", "rollout.sleep", "rollout.kv_cache_gb"),
    *("rollout.servers", "rollout.server_count", "rollout.server_gpus", "rollout.server_timeout"),
    *("rollout.weight_transfer", "rollout.weight_folder"),
)


def check_folder(config: Config, resume: bool) -> None:
    """Raise `ConfigError` where a new run would overwrite another one, or a resumed one be another than it was.

    So it does for a folder that can't be written to, and where the resumed run's logs or settings are damaged.
    """
    folder = config.trainer.output_dir
    check_writable(folder)
    if not resume:
        check_new(folder)
        return
    for name in STEPS_BEHIND:
        for _ in iterate_rows(folder / name):
            pass
    if (folder / "config.yaml").exists():
        scheduled = config.uses_steps()
        if told := changes(config, RESUMABLE if scheduled else (*RESUMABLE, *LENGTH)):
            if any(f"{name} was" in told for name in LENGTH):
                told += f" (the end of {' and '.join(scheduled)})"
            raise ConfigError(
                f"--resume: this would be another run than the one in {folder}: {told}. Leave that as it was, or begin "
                "a new run: another trainer.output_dir, and model.path=the hf folder of a checkpoint"
            )


def changes(config: Config, allowed: tuple[str, ...]) -> str:
    """What `config` sets otherwise than the run in its output folder did, `allowed` settings aside; empty for nothing.

    Raises `ConfigError` where there is no run, or its settings can't be read.
    """
    path = config.trainer.output_dir / "config.yaml"
    try:
        if not path.read_bytes().strip(b"\0 \n"):
            raise ConfigError("it is empty")
        before, now = flatten(load_config(path, [])), flatten(config)
    except (ConfigError, OSError, TypeError) as error:  # of YAML that holds no settings, OmegaConf raises any of them
        why = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise ConfigError(
            f"{path} can't be read, so that nothing says whether this is the same run: {why}. Where you know that it "
            "is, delete that file"
        ) from None
    # The run before knows both. The same number of steps is the same run, however it is said; without it, before the
    # data is known, the same number of epochs is.
    unread = LENGTH[1] if config.trainer.steps else LENGTH[0]
    changed = [key for key in now if now[key] != before[key] and key not in (*allowed, unread)]
    return "; ".join(f"{key} was {before[key]} and is {now[key]}" for key in changed)


def steps_of(folder: Path) -> int:
    """The number of steps of the run in `folder`, also where `trainer.epochs` made it."""
    return load_config(folder / "config.yaml", []).trainer.steps


def prepare(config: Config, step: int) -> None:
    """Make the output folder ready for steps from `step` on.

    Going on from a checkpoint drops what was logged after it, since those steps run again.
    """
    folder = config.trainer.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, behind in STEPS_BEHIND.items():
        last = step - behind if step else -1  # the evaluation before the first step runs again with it
        files = parts(folder / name)
        for file in reversed(files):  # the newest first: killed between two, what is left is a log without a gap
            _keep_steps(file, last, torn=file == files[-1])
            if file.stat().st_size == 0 and file.name != name:
                file.unlink()
    for image in (folder / IMAGES).glob("step_*.webp"):
        if int(image.name.split("_")[1]) >= step:
            image.unlink()
    settings, text = folder / "config.yaml", dumped(config)
    if not settings.exists() or settings.read_text() != text:
        replace(settings, text)


def _keep_steps(file: Path, last: int, torn: bool) -> None:
    """Leave in a log's file the rows of steps up to the `last`; they come first, and the last of them gets its end."""
    kept, end = 0, b"\n"
    for line, row in lines_of(file, torn=torn):
        if row["step"] > last:
            break
        kept, end = kept + len(line), line[-1:]
    if end == b"\n" and kept == file.stat().st_size:
        return  # without reading all of it: completions may be many
    with open(file, "rb") as opened:
        replace(file, (opened.read(kept) + (b"" if end == b"\n" else b"\n")).decode())


class RunLog:
    """Writes metrics, evaluations and completions, and draws the progress bar; a context manager."""

    def __init__(self, config: Config, start: int, console: Console):
        self.folder, self.steps = config.trainer.output_dir, config.trainer.steps
        self.most_bytes = int(1e6 * (config.trainer.log_rotation_mb or 0))
        self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start)
        self.trackers = Trackers(config, start > 0)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # A file that a scheduler keeps would have the bar once, at the end: there, every step is a line.
        self.live, shown = console.is_terminal, TextColumn("{task.fields[shown]}")
        self.progress = Progress(*columns, shown, console=console, disable=not self.live)
        self.started = time.monotonic(), start
        self.task = self.progress.add_task(config.method, total=config.trainer.steps, completed=start, shown="")

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()
        self.tensorboard.close()
        self.trackers.finish()

    def step(self, step: int, metrics: dict[str, float], completions: list[dict]) -> None:
        self._append("metrics.jsonl", [{"step": step} | metrics])
        self._append("completions.jsonl", completions)
        self._scalars(step, metrics)
        self.trackers.table(completions, step)
        shown = "  ".join(f"{label} {metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics)
        self.progress.update(self.task, completed=step + 1, shown=shown)
        if not self.live:
            self._print(f"step {step + 1}/{self.steps}  {shown}  left {self._left(step + 1)}")

    def _left(self, done: int) -> str:
        """The time that the rest of the run takes, as h:mm:ss, if its steps take as long as those so far."""
        began, first = self.started
        seconds = (time.monotonic() - began) / (done - first) * (self.steps - done)
        return str(timedelta(seconds=round(seconds)))

    def evaluation(self, step: int, record: dict) -> None:
        """`record`: see `vogue.evaluate.evaluation_row`."""
        self._append("evaluations.jsonl", [{"step": step} | record])
        values = {f"eval/{name}": value[0] for name, value in record.items() if name.startswith("pass@")}
        self._scalars(step, values)
        shown = ", ".join(f"{name} {e}" for name, e in headline(record).items())
        self.progress.console.print(f"after {step} steps: held-out {shown}")

    def warn(self, text: str) -> None:
        self._print(text, "yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        self.progress.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self.trackers.log(values, step)

    def _append(self, name: str, records: list[dict]) -> None:
        path, text = self.folder / name, "".join(json.dumps(record) + "\n" for record in records)
        size = path.stat().st_size if path.exists() else 0
        if size and self.most_bytes and size + len(text) > self.most_bytes:
            rotate(path)
        with open(path, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that comes after it relies on it
