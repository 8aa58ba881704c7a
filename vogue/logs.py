"""What a run leaves behind and shows while it runs; only rank 0 has one.

metrics.jsonl       one object a step
evaluations.jsonl   held-out pass@k as [mean, low, high], after so many steps, and what every problem got
completions.jsonl   sampled completions token by token, with their reward, branch and advantage (`vogue.records`)
completions/        their images
tensorboard/        the same metrics as events
config.yaml         the resolved configuration
"""

import json

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from vogue.config import Config, flatten, load_config, save_config
from vogue.evaluate import headline
from vogue.records import FOLDER
from vogue.settings import ConfigError

SHOWN = {"reward": "reward", "accuracy": "acc", "entropy": "H", "u_per": "u_per", "throughput/rollout": "tok/s"}


# Settings that leave what a run computes as it is.
HARMLESS = ("trainer.save_every", "trainer.keep", "trainer.log_completions", "trainer.wandb", "rollout.memory")
# Settings that a resumed run may change: those, and what is asked for, like more steps.
RESUMABLE = (
    *HARMLESS,
    *("trainer.steps", "trainer.eval_every", "trainer.eval_samples", "data.test", "data.test_limit"),
)


def check_folder(config: Config, resume: bool) -> None:
    """Raise `ConfigError` where a new run would overwrite another one, or a resumed one be another than it was."""
    folder = config.trainer.output_dir
    if not resume:
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(f"{folder} holds a run already: pass --resume, or another trainer.output_dir")
    elif (folder / "config.yaml").exists() and (told := changes(config, RESUMABLE)):
        raise ConfigError(f"--resume: this would be another run than the one in {folder}: {told}")


def changes(config: Config, allowed: tuple[str, ...]) -> str:
    """What `config` sets otherwise than the run in its output folder did, `allowed` settings aside; empty for nothing.

    Raises `ConfigError` where there is no run.
    """
    before, now = flatten(load_config(config.trainer.output_dir / "config.yaml", [])), flatten(config)
    changed = [key for key in now if now[key] != before[key] and key not in allowed]
    return "; ".join(f"{key} was {before[key]} and is {now[key]}" for key in changed)


def prepare(config: Config, step: int) -> None:
    """Make the output folder ready for steps from `step` on.

    Going on from a checkpoint drops what was logged after it, since those steps run again.
    """
    folder = config.trainer.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, last in {
        "metrics.jsonl": step - 1,
        "completions.jsonl": step - 1,
        "evaluations.jsonl": step or -1,
    }.items():
        if (folder / name).exists():
            kept = [line for line in (folder / name).read_text().splitlines() if json.loads(line)["step"] <= last]
            (folder / name).write_text("".join(line + "\n" for line in kept))
    for image in (folder / FOLDER).glob("step_*.webp"):
        if int(image.name.split("_")[1]) >= step:
            image.unlink()
    save_config(config, folder / "config.yaml")


class RunLog:
    """Writes metrics, evaluations and completions, and draws the progress bar; a context manager."""

    def __init__(self, config: Config, start: int, console: Console):
        self.folder = config.trainer.output_dir
        self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start)
        self.wandb = _wandb(config) if config.trainer.wandb else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[shown]}"), console=console)
        self.task = self.progress.add_task(config.method, total=config.trainer.steps, completed=start, shown="")

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def step(self, step: int, metrics: dict[str, float], completions: list[dict]) -> None:
        self._append("metrics.jsonl", [{"step": step} | metrics])
        self._append("completions.jsonl", completions)
        self._scalars(step, metrics)
        shown = "  ".join(f"{label} {metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics)
        self.progress.update(self.task, completed=step + 1, shown=shown)

    def evaluation(self, step: int, record: dict) -> None:
        """`record`: see `vogue.evaluate.evaluation_row`."""
        self._append("evaluations.jsonl", [{"step": step} | record])
        values = {f"eval/{name}": value[0] for name, value in record.items() if name.startswith("pass@")}
        self._scalars(step, values)
        shown = ", ".join(f"{name} {e}" for name, e in headline(record).items())
        self.progress.console.print(f"after {step} steps: held-out {shown}")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def _append(self, name: str, records: list[dict]) -> None:
        with open(self.folder / name, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def _wandb(config: Config):
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("trainer.wandb is set, but wandb isn't installed: pip install wandb") from None
    return wandb.init(project=config.trainer.wandb, config=config.model_dump(mode="json"))
