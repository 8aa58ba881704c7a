"""The command `vogue`: warmstart, train, sweep, eval, report, data, doctor.

A wrong setting or sample ends a command with one message on standard error and exit code 2, before anything is
trained or overwritten.
"""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    from pydantic import BaseModel
    from pydantic_core import PydanticUndefined
    from rich.console import Console
    from rich.table import Table

    from vogue.config import Config, ConfigError, load_config
except ImportError as missing:  # only `vogue_kernels` was installed
    sys.exit(f"vogue: {missing.name} isn't installed: pip install 'vogue[cpu]' or 'vogue[gpu]' for training")

USAGE_ERROR = 2
WARMSTART = {
    "vision_batches": (60, "batches that teach it to see"),
    "batches": (320, "supervised batches of the whole model"),
    "batch_size": (32, "demonstrations a batch"),
    "lr": (3e-3, "learning rate of AdamW"),
    "printed": (0.0, "share of demonstrations with the state as text and no image"),
    "seed": (0, "of everything random"),
}
WARMSTART_DIGITS = {
    "misread": (0.5, "digits alone: share of demonstrations that misread one, in the last quarter"),
    "faintest": (1.0, "digits alone: least contrast of one, as in `vogue data digits`"),
}
WARMSTART_DATA = {
    "answer_weight": (1.0, "with --data alone: what a token of the answer counts, in tokens of the thought before it"),
}
PUZZLES = {
    "count": (3000, "training samples of each kind"),
    "test": (300, "test samples of each kind, of states that are in no training split"),
    "size": (224, "width and height of an image, in pixels"),
    "seed": (0, "of everything random"),
}
EVAL_HELP = """\
completions have up to rollout.max_tokens tokens, behind the system prompt of reward.design, and are sampled at
rollout.temperature unless trainer.eval_temperature says otherwise: trainer.eval_temperature=0 --samples 1 is greedy.

benchmarks: data.test is a folder or file in the benchmark's own schema and layout, or hub:owner/name@split (with a
subset, hub:owner/name/subset@split); unset, the benchmark's place on the hub. Some benchmarks' images need more than
the default data.max_prompt_tokens. Whose prompts and scoring they are, and what is ours, stands at the top of
vogue/benchmarks/NAME.py.

a data set of your own, by category, the image printed as text beside it:
  vogue eval run.yaml model.path=MODEL data.test=test.parquet --view image,text
ChartQA from the hub, pass@1 to pass@16 from 16 completions a question:
  vogue eval run.yaml model.path=MODEL data.test=null --benchmark chartqa --samples 16 --pass-at 1,2,4,8,16
MathVista from a folder with testmini.json and images/, every answer extracted by a language model, all of it written
down to check (the endpoint's key, if it wants one, is the environment variable OPENAI_API_KEY):
  vogue eval run.yaml model.path=MODEL data.test=MathVista/data --benchmark mathvista --out mathvista.jsonl \\
      --extractor http://localhost:8000/v1 --extractor-model Qwen/Qwen2.5-72B-Instruct --extract-all"""
WARMSTART_HELP = """\
Without --data the task is the digits': --vision-batches of a classifier of digits, then --batches of demonstrations,
behind the system prompt of examples/digits. With it, each sample's `state` says all that its images show, as text:
the model learns to think that and then answer, in --vision-batches of images alone, which are quick for want of a
question, then in --batches of whole samples, behind the default system prompt.

  vogue data puzzles --kind checker_move --size 112 --out data
  vogue warmstart base --data data/train.parquet --vision-batches 800 --lr 2e-3 --printed 0.2"""
REPORT_HELP = """\
learning curves, pass@k before and after, exploration, guidance, times, and every logged completion with its images and
its tokens coloured by u_per or entropy. Runs that differ in their seed alone are one method: their mean with a band.

  vogue report runs/demo/vogue
  vogue report runs/sweeps/digits/*/seed_? --out runs/sweeps/digits/report.html"""
PUZZLES_HELP = """\
kinds: clock, maze, move_box, n_queens, water_jugs, tower_of_hanoi, number_slide, checker_move, board_tiling

Besides the columns of EasyR1's schema, `category` is the kind and `state` prints what the image shows.

the training sets of arXiv 2601.00215, Clock-3k and Diverse-8k:
  vogue data puzzles --kind clock --count 3000 --out data/clock-3k
  vogue data puzzles --kind clock,maze,move_box,n_queens --count 2000 --out data/diverse-8k"""

SWEEP_HELP = """\
FILE says what is run; `settings` is a file that `vogue train` takes, and its model.path the start of every run:

  settings: examples/digits/vogue.yaml
  output_dir: runs/sweeps/digits
  seeds: [0, 1, 2, 3, 4]
  jobs: 2                               # runs at a time (default 1); they share the cores
  overrides: [trainer.steps=100]        # of every run (optional)
  variants:                             # the others are compared with the first one
    grpo: [method=grpo]
    vogue: []
    vogue_no_u_per: [guidance.alpha_per=0]
  launcher: [deepspeed, --num_gpus, "8", --module, vogue.train]     # default: this Python, one rank

key=value settings after FILE are for every run too. Each run has the folder OUTPUT_DIR/VARIANT/seed_N, and what it
printed in seed_N.log beside it; OUTPUT_DIR/table.md and table.json are the table. The same command goes on with a sweep
that stopped. Exit code 1: a run failed."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = _parse(argv)
    from vogue.benchmarks import ExtractorError
    from vogue.data import DataError
    from vogue.rewards import RewardError

    try:
        return arguments.run(arguments)
    except RewardError as error:  # of one rank, maybe not the first
        print(f"vogue {arguments.command}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (ConfigError, DataError, ExtractorError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"vogue {arguments.command}: {error}", file=sys.stderr)
        return USAGE_ERROR


# ------------------------------------------------------------------------------------------------------- commands


def train(arguments: argparse.Namespace) -> int:
    _quiet()
    config = load_config(*_file_and_overrides(arguments.settings))
    from vogue.run import run

    return run(config, arguments.resume, arguments.profile)


def evaluate(arguments: argparse.Namespace) -> int:
    _quiet()
    path, overrides = _file_and_overrides(arguments.settings)
    if arguments.samples:
        overrides.append(f"trainer.eval_samples={arguments.samples}")
    config = load_config(path, overrides)
    n = config.trainer.eval_samples
    pass_at = _pass_at(arguments.pass_at, n)
    if arguments.out and not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    if arguments.benchmark:
        return _evaluate_benchmark(config, arguments, pass_at)
    if config.data.test is None:
        raise ConfigError("data.test is not set: the samples to evaluate on")
    if arguments.extractor or arguments.extract_all:
        raise ConfigError("--extractor needs --benchmark: other answers are read and scored by reward.design")
    from vogue.evaluate import by_category, evaluate_model, summary, write_judged

    console = Console()
    judged = evaluate_model(config, arguments.views, console)
    groups = {view: by_category(items) for view, items in judged.items()}
    first, last = arguments.views[0], arguments.views[-1]
    title = f"{config.model.path}: {_completions(n)} a problem"
    table = Table("category", "view", "problems", *(f"pass@{k}" for k in pass_at), title=title)
    for category in groups[first]:
        for view in arguments.views:
            items = groups[view][category]
            estimates = map(str, summary(items, pass_at).values())
            table.add_row(category, view, str(len(items)), *estimates, end_section=view == last)
    console.print(table)
    if arguments.out:
        write_judged(judged, arguments.out)
        console.print(f"completions and scores: {arguments.out}")
    return 0


def _evaluate_benchmark(config: Config, arguments: argparse.Namespace, pass_at: tuple[int, ...]) -> int:
    from vogue.benchmarks import BENCHMARKS, Extractor
    from vogue.benchmarks.answers import ask_extractor, write_answered
    from vogue.evaluate import answer_benchmark, benchmark_table

    if arguments.views != ("image",):
        raise ConfigError(f"--view {','.join(arguments.views)}: a benchmark has no printed state to show in its place")
    if bool(arguments.extractor) != bool(arguments.extractor_model):
        raise ConfigError("--extractor URL and --extractor-model NAME need each other")
    if arguments.extract_all and not arguments.extractor:
        raise ConfigError("--extract-all needs --extractor, the endpoint to ask")
    benchmark, console = BENCHMARKS[arguments.benchmark], Console()
    problems = benchmark.load(config.data.test, config.data.test_limit)
    extractor = Extractor(arguments.extractor, arguments.extractor_model) if arguments.extractor else None
    if extractor:
        extractor.check()
    answered = answer_benchmark(config, benchmark, problems, console)
    if arguments.out:  # before the endpoint is asked, which may fail
        write_answered(answered, arguments.out)
    if extractor:
        answered = ask_extractor(benchmark, answered, extractor, arguments.extract_all, console)
    n = config.trainer.eval_samples
    title = f"{config.model.path}, {arguments.benchmark}: {_completions(n)} a problem"
    table = Table("", "of", *(f"pass@{k}" for k in pass_at), title=title)
    for name, count, estimates in benchmark_table(benchmark, answered, pass_at):
        table.add_row(name, str(count), *map(str, estimates))
    console.print(table)
    unread = sum(answer.parsed is None for item in answered for answer in item.answers)
    console.print(f"completions in which no answer was found: {unread} of {len(answered) * n}")
    if arguments.out:
        write_answered(answered, arguments.out)
        console.print(f"completions, answers and scores: {arguments.out}")
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    _quiet()
    path, overrides = _file_and_overrides(arguments.settings)
    if path is None:
        raise ConfigError("FILE is missing: what is to be run; `vogue sweep --help` shows one")
    from vogue import sweep as module

    chosen = module.load_sweep(path, arguments.jobs)
    if arguments.table:
        return module.show_table(chosen, overrides, Console())
    return module.run(chosen, overrides, shlex.join(["vogue", "sweep", *arguments.settings]), Console())


def warmstart(arguments: argparse.Namespace) -> int:
    _quiet()
    from vogue import warmstart as module

    console = Console()
    settings = {name: getattr(arguments, name) for name in WARMSTART}
    of_digits = {name: getattr(arguments, name) for name in WARMSTART_DIGITS}
    of_data = {name: getattr(arguments, name) for name in WARMSTART_DATA}
    if arguments.data is None:
        _refuse(of_data, WARMSTART_DATA, "of other data's demonstrations: it goes with --data")
        module.warmstart(arguments.out, **settings, **of_digits, console=console)
    else:
        _refuse(of_digits, WARMSTART_DIGITS, "of the digits' demonstrations: it goes without --data")
        module.warmstart_on(arguments.data, arguments.out, **settings, **of_data, console=console)
    console.print(f"model: {arguments.out}")
    return 0


def _refuse(given: dict[str, float], defaults: dict[str, tuple], why: str) -> None:
    for name, value in given.items():
        if value != defaults[name][0]:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is {why}")


def digits(arguments: argparse.Namespace) -> int:
    from vogue.data.digits import write_digits

    counts = (arguments.train, arguments.validation, arguments.test)
    write_digits(arguments.out, *counts, arguments.seed, faintest=arguments.faintest)
    for name in ("train", "validation", "test"):
        print(arguments.out / f"{name}.parquet")
    return 0


def puzzles(arguments: argparse.Namespace) -> int:
    from vogue.data.puzzles import KINDS, write_puzzles

    kinds = arguments.kinds or tuple(KINDS)
    counts = (arguments.count, arguments.test)
    write_puzzles(arguments.out, kinds, *counts, arguments.size, arguments.seed, Console(stderr=True))
    for name in ("train", "test"):
        print(arguments.out / f"{name}.parquet")
    return 0


def report(arguments: argparse.Namespace) -> int:
    from vogue.report import write_report

    page, *images = write_report(arguments.runs, arguments.out)
    print(f"report: {page}")
    print("beside it:", ", ".join(path.name for path in images))
    return 0


def doctor(_: argparse.Namespace) -> int:
    from vogue import doctor as module

    return module.run(Console())


# --------------------------------------------------------------------------------------------------------- parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Settings may stand on both sides of an option; argparse ends a list of them at the first one."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(arguments, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vogue",
        description="Reinforcement learning of vision-language models from verifiable rewards, exploring where the "
        "image is ambiguous (VOGUE, arXiv 2510.01444).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_train(commands)
    _add_sweep(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_warmstart(commands)
    _add_data(commands)
    _add(commands, "doctor", doctor, "what was found here, what can run, and why the rest can't")
    return parser


def _add_train(commands) -> None:
    command = _add(commands, "train", train, "train a model", epilog=_settings_help())
    _add_config(command)
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint of trainer.output_dir")
    command.add_argument(
        "--profile",
        type=_steps,
        default=frozenset(),
        metavar="STEPS",
        help="write a torch profiler trace of these steps, counted from 0, into trainer.output_dir/profile: 3,5",
    )
    command.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def _add_sweep(commands) -> None:
    command = _add(
        commands, "sweep", sweep, "train variants × seeds from one start, resumable, and compare them", SWEEP_HELP
    )
    _add_config(command)
    command.add_argument("--jobs", type=_count, metavar="N", help="runs at a time, in place of FILE's")
    command.add_argument("--table", action="store_true", help="run nothing, show the table of the runs that are done")


def _add_eval(commands) -> None:
    from vogue.benchmarks import BENCHMARKS

    command = _add(
        commands,
        "eval",
        evaluate,
        "pass@k of model.path on data.test or a published benchmark, with 95%% intervals",
        EVAL_HELP,
    )
    _add_config(command)
    command.add_argument(
        "--samples", type=_count, metavar="N", help="completions a problem (default: trainer.eval_samples)"
    )
    command.add_argument(
        "--pass-at",
        type=_counts,
        metavar="K,…",
        help="pass@1 and pass@k for these k up to N, from the same completions (default 1, 2, 4 … up to N)",
    )
    command.add_argument(
        "--benchmark",
        choices=BENCHMARKS,
        metavar="NAME",
        help=f"score as this benchmark does, with its own table: {', '.join(BENCHMARKS)}",
    )
    command.add_argument(
        "--extractor",
        metavar="URL",
        help="OpenAI-compatible endpoint, http://HOST:PORT/v1, whose language model is asked for the answer of a "
        "completion in which rules find none",
    )
    command.add_argument("--extractor-model", metavar="NAME", help="the model to ask there")
    command.add_argument(
        "--extract-all", action="store_true", help="ask it about every completion, not only where rules find no answer"
    )
    command.add_argument(
        "--view",
        dest="views",
        type=_names,
        default=("image",),
        metavar="VIEW,…",
        help="image, text (the sample's printed state in the image's place), both: is a model's weakness seeing or "
        "thinking? And noisy (the image perturbed by the settings of `perturb`): does it need a clean one? (default "
        "image)",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write every completion with its score, JSONL")


def _add_report(commands) -> None:
    command = _add(
        commands, "report", report, "one HTML page on runs, which needs no network, and PNGs beside it", REPORT_HELP
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, its trainer.output_dir")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default for one run: RUN/report.html; several need it said)"
    )


def _add_warmstart(commands) -> None:
    command = _add(
        commands,
        "warmstart",
        warmstart,
        "make a small Qwen2.5-VL from nothing, for the digits or data with a printed state",
        WARMSTART_HELP,
    )
    command.add_argument("out", type=Path, help="folder of the model")
    command.add_argument("--data", metavar="FILE", help="samples with a `state`, as data.train (default: the digits)")
    for name, (default, help) in (WARMSTART | WARMSTART_DIGITS | WARMSTART_DATA).items():
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, type=type(default), default=default, help=f"{help} (default {default})")


def _add_data(commands) -> None:
    command = commands.add_parser("data", help="write a data set in the EasyR1 schema (problem, answer, images)")
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND")
    command = _add(kinds, "digits", digits, "two handwritten digits and a question: train, validation, test .parquet")
    command.add_argument("out", type=Path, help="folder to write to")
    for name, count in {"train": 8000, "validation": 500, "test": 1000}.items():
        command.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"samples (default {count})")
    command.add_argument(
        "--faintest",
        type=float,
        default=1.0,
        metavar="C",
        help="ink of each digit has a contrast between C and 1, so that noise hides some of them (default 1)",
    )
    command.add_argument("--seed", type=int, default=0, help="default 0")

    command = _add(kinds, "puzzles", puzzles, "puzzles with a known state: train.parquet, test.parquet", PUZZLES_HELP)
    command.add_argument("--kind", dest="kinds", type=_names, metavar="KIND,…", help="default: all of the kinds below")
    for name, (default, help) in PUZZLES.items():
        command.add_argument(
            f"--{name}", type=_whole_number, default=default, metavar="N", help=f"{help} (default {default})"
        )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")


def _steps(text: str) -> frozenset[int]:
    steps = text.split(",")
    if not all(step.isdecimal() for step in steps):
        raise argparse.ArgumentTypeError(f"{text} is not a list of steps such as 3,5")
    return frozenset(map(int, steps))


def _add(commands, name: str, run, help: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help.replace("%%", "%"),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "settings", nargs="*", metavar="FILE.yaml | key=value", help="settings: a file first, then overrides"
    )


def _names(text: str) -> tuple[str, ...]:
    """The parts of a list with commas, each once."""
    return tuple(dict.fromkeys(text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, but is {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _pass_at(asked: tuple[int, ...] | None, n: int) -> tuple[int, ...]:
    """The k of the table's columns; raises ConfigError for one that n completions are too few for."""
    from vogue.evaluate import powers_of_two

    asked = asked or powers_of_two(n)
    if max(asked) > n:
        raise ConfigError(f"--pass-at {max(asked)} needs --samples {max(asked)} or more, but it is {n}")
    return tuple(sorted({1, *asked}))


def _completions(n: int) -> str:
    return "1 completion" if n == 1 else f"{n} completions"


def _whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, but is {text!r}")
    return int(text)


def _file_and_overrides(settings: list[str]) -> tuple[str | None, list[str]]:
    files = [text for text in settings if "=" not in text]
    if files and files != settings[:1]:
        raise ConfigError(f"{files[-1]}: one YAML file may stand before the key=value settings")
    return (files[0] if files else None), settings[len(files) :]


def _settings_help() -> str:
    lines = ["settings (key=value, default in brackets):"]
    for key, field in _fields(Config, ""):
        default = "required" if field.default is PydanticUndefined else field.default
        lines.append(f"  {key} [{default}]\n      {field.description}")
    return "\n".join(lines)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _quiet() -> None:
    """Leave the terminal to vogue: the libraries below it announce themselves at length."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed finds by itself, with a warning
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
