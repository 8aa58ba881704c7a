"""The command `vogue`: warmstart, train, plan, sweep, eval, serve, score, report, watch, merge, data, doctor.

A wrong setting or sample ends a command with one message on standard error and exit code 2, before anything is
trained or overwritten.
"""

import argparse
import shlex
import sys
import traceback
from typing import NoReturn

try:
    from rich.console import Console
    from rich.table import Table

    from vogue.cli.arguments import WARMSTART, WARMSTART_DATA, WARMSTART_DIGITS, parse
    from vogue.cli.data_commands import data
    from vogue.cli.quiet import quiet
    from vogue.config import Config, load_config
    from vogue.config.sections import RewardConfig
    from vogue.run.stopping import LOST, STOPPED
    from vogue.settings import ConfigError
except ImportError as missing:  # only `vogue_kernels` was installed
    sys.exit(
        f"vogue: {missing.name} isn't installed: training needs pip install --no-build-isolation '.[cpu]' or '.[gpu]'"
    )

DIVERGED = FOUND = CRASHED = 1  # a run whose gradients were not finite; a check that found something; a bug
USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = parse(argv)
    from vogue.benchmarks import EndpointError
    from vogue.data import DataError
    from vogue.rewards import RewardError
    from vogue.rollout.engine import EngineError
    from vogue.run.errors import tell
    from vogue.run.folder import FolderError
    from vogue.run.stacks import LostRank

    try:
        return COMMANDS[arguments.command](arguments)
    except (
        *(ConfigError, DataError, RewardError, EngineError, EndpointError, FolderError, LostRank),
        *(ImportError, FloatingPointError, KeyboardInterrupt),
    ) as error:
        tell(arguments.command, error, str(error) or "interrupted")
        codes = {FloatingPointError: DIVERGED, KeyboardInterrupt: STOPPED, LostRank: LOST}
        return codes.get(type(error), USAGE_ERROR)


def command() -> NoReturn:
    """What a shell or a launcher starts: `main`, and the end of the process."""
    from vogue.run.errors import tell_crash
    from vogue.run.restarts import note_end

    try:
        code = main()
        if code != LOST:
            note_end(code)
    except Exception as error:  # a bug, maybe of one rank alone, whose output a launcher has mixed with the others'
        traceback.print_exc()
        tell_crash(error)
        code = CRASHED
    if "vogue.distributed" not in sys.modules:
        sys.exit(code)
    from vogue.distributed import leave

    leave(code)


# ------------------------------------------------------------------------------------------------------- commands


def train(arguments: argparse.Namespace) -> int:
    from vogue.run import launch

    if arguments.restarts is not None:
        return _restarted(arguments)
    if arguments.launcher:
        raise ConfigError("--launcher goes with --restarts; without them, it is what starts this command")
    launch.join()
    quiet()
    config = load_config(*_file_and_overrides(arguments.settings))
    from vogue.run.training import check, run

    if arguments.check:
        return check(config, arguments.resume)
    return run(config, arguments.resume, arguments.profile)


def _restarted(arguments: argparse.Namespace) -> int:
    from vogue.run import launch, restarts

    if arguments.launcher is None:  # whose ranks are others
        launch.join()
    if arguments.check:
        raise ConfigError("--check starts nothing that --restarts could start again")
    trainer = load_config(*_file_and_overrides(arguments.settings)).trainer
    command = [*(arguments.launcher or restarts.OWN_PYTHON), *arguments.settings]
    if arguments.profile:
        command.append(f"--profile={','.join(map(str, sorted(arguments.profile)))}")
    return restarts.supervise(trainer.output_dir, trainer.timeout, command, arguments.resume, arguments.restarts)


def plan(arguments: argparse.Namespace) -> int:
    quiet()
    config = load_config(*_file_and_overrides(arguments.settings))
    from vogue.run import plan as module

    ranks, memory, on_gpu = module.machine(arguments.gpus, arguments.memory)
    made = module.make_plan(config, ranks * arguments.nodes, memory, on_gpu=on_gpu, nodes=arguments.nodes)
    if arguments.json:
        print(module.as_json(made))
    else:
        module.show(made, Console())
    return FOUND if made.problems else 0


def evaluate(arguments: argparse.Namespace) -> int:
    quiet()
    path, overrides = _file_and_overrides(arguments.settings)
    # A run's file may set them, and data.test=null or other samples may be asked for.
    overrides += ["trainer.eval_every=0", "trainer.save_best=null"]
    if arguments.samples:
        overrides.append(f"trainer.eval_samples={arguments.samples}")
    config = load_config(path, overrides)
    n = config.trainer.eval_samples
    pass_at = _pass_at(arguments.pass_at, n)
    if arguments.out and not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    if arguments.benchmark:
        return _evaluate_benchmark(config, arguments, pass_at)
    if arguments.extractor or arguments.extract_all:
        raise ConfigError("--extractor needs --benchmark: other answers are read and scored by reward.design")
    from vogue.evaluate import by_category, evaluate_model, summary, write_judged

    console = Console()
    judged = evaluate_model(config, arguments.views, console)
    groups = {view: by_category(items) for view, items in judged.items()}
    first, last = arguments.views[0], arguments.views[-1]
    title = f"{_model(config)}: {_completions(n)} a problem"
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


def serve(arguments: argparse.Namespace) -> NoReturn:
    quiet()
    config = load_config(*_file_and_overrides(arguments.settings))
    from vogue.rollout.serving import serve as become_server
    from vogue.rollout.vllm import check_engine_args

    check_engine_args(config)
    become_server(config, arguments.host, arguments.port)


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
    title = f"{_model(config)}, {arguments.benchmark}: {_completions(n)} a problem"
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


def score(arguments: argparse.Namespace) -> int:
    if arguments.file:
        return _score_again(arguments)
    if len(arguments.settings) < 2:
        raise ConfigError("COMPLETION and ANSWER are missing: what the model wrote, and the right answer")
    completion, answer, *overrides = arguments.settings
    from vogue.rewards.explain import steps

    for name, told in steps(completion, answer, _reward(None, overrides)):
        print(f"{name:13} {told}")
    return 0


def _score_again(arguments: argparse.Namespace) -> int:
    from vogue.rewards.explain import changes
    from vogue.run.folder import read_rows

    rows, beside = read_rows(arguments.file, steps=False), arguments.file.with_name("config.yaml")
    for number, row in enumerate(rows, 1):
        for name in ("completion", "answer", "accuracy"):
            if name not in row:
                raise ConfigError(f"{arguments.file}, line {number}: no {name!r}; it has {', '.join(row)}")
    if not rows:
        raise ConfigError(f"{arguments.file}: no completions in it")
    settings = _reward(str(beside) if beside.is_file() else None, arguments.settings)
    found = changes(rows, settings)
    for change in found:
        print(f"line {change.row}: {change.before:g} is now {float(change.verdict.right):g}")
        print(f"  {change.parsed!r} for {change.answer!r}: {change.verdict.rule}")
    up = sum(change.verdict.right for change in found)
    print(f"{len(rows)} completions: {up} more are right, {len(found) - up} fewer")
    return 0


def _reward(path: str | None, overrides: list[str]) -> RewardConfig:
    return load_config(path, ["model.path=none", *overrides]).reward


def sweep(arguments: argparse.Namespace) -> int:
    quiet()
    path, overrides = _file_and_overrides(arguments.settings)
    if path is None:
        raise ConfigError("FILE is missing: what is to be run; `vogue sweep --help` shows one")
    from vogue import sweep as module

    chosen = module.load_sweep(path, arguments.jobs)
    if arguments.table:
        return module.show_table(chosen, overrides, Console())
    return module.run(chosen, overrides, shlex.join(["vogue", "sweep", *arguments.settings]), Console())


def merge(arguments: argparse.Namespace) -> int:
    quiet()
    from vogue.model.lora import merge as write_merged

    write_merged(arguments.adapter, arguments.base, arguments.out)
    print(f"model: {arguments.out}")
    return 0


def warmstart(arguments: argparse.Namespace) -> int:
    quiet()
    from vogue import warmstart as module

    console = Console()
    settings = {name: getattr(arguments, name) for name in WARMSTART}
    of_digits = {name: getattr(arguments, name) for name in WARMSTART_DIGITS}
    of_data = {name: getattr(arguments, name) for name in WARMSTART_DATA}
    if arguments.data is None:
        _refuse(of_data, WARMSTART_DATA, "of other data's demonstrations: it goes with --data")
        if arguments.model:
            raise ConfigError(f"--model {arguments.model} is of other data's demonstrations: it goes with --data")
        module.warmstart(arguments.out, **settings, **of_digits, console=console)
    else:
        _refuse(of_digits, WARMSTART_DIGITS, "of the digits' demonstrations: it goes without --data")
        start = arguments.model
        module.warmstart_on(arguments.data, arguments.out, **settings, **of_data, start=start, console=console)
    console.print(f"model: {arguments.out}")
    return 0


def _refuse(given: dict[str, float | str], defaults: dict[str, tuple], why: str) -> None:
    for name, value in given.items():
        if value != defaults[name][0]:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is {why}")


def report(arguments: argparse.Namespace) -> int:
    from vogue.report import write_report

    page, *images = write_report(arguments.runs, arguments.out)
    print(f"report: {page}")
    print("beside it:", ", ".join(path.name for path in images))
    return 0


def watch(arguments: argparse.Namespace) -> int:
    from vogue.watch.following import Follower

    follower = Follower(arguments.run)
    if arguments.serve:
        from vogue.watch.server import HOST, PORT, serve

        serve(follower, arguments.host or HOST, PORT if arguments.port is None else arguments.port, Console())
        return 0
    if arguments.port is not None or arguments.host is not None:
        raise ConfigError("--port and --host are the page's: they go with --serve")
    from vogue.watch.terminal import watch as show

    return FOUND if show(follower, Console()) else 0


def doctor(arguments: argparse.Namespace) -> int:
    from vogue import doctor as module

    console = Console()
    code = module.run(console)
    return max(code, module.try_gpu(console)) if arguments.gpu else code


COMMANDS = {
    "train": train,
    "plan": plan,
    "sweep": sweep,
    "eval": evaluate,
    "serve": serve,
    "score": score,
    "report": report,
    "watch": watch,
    "merge": merge,
    "warmstart": warmstart,
    "data": data,
    "doctor": doctor,
}


# -------------------------------------------------------------------------------------------------------- helpers


def _pass_at(asked: tuple[int, ...] | None, n: int) -> tuple[int, ...]:
    """The k of the table's columns; raises ConfigError for one that n completions are too few for."""
    from vogue.estimates import powers_of_two

    asked = asked or powers_of_two(n)
    if max(asked) > n:
        raise ConfigError(f"--pass-at {max(asked)} needs --samples {max(asked)} or more, but it is {n}")
    return tuple(sorted({1, *asked}))


def _model(config: Config) -> str:
    """What is evaluated: the model, with its adapter where it has one."""
    adapter = config.lora.adapter
    return config.model.path + (f" with {adapter}" if adapter else "")


def _completions(n: int) -> str:
    return "1 completion" if n == 1 else f"{n} completions"


def _file_and_overrides(settings: list[str]) -> tuple[str | None, list[str]]:
    files = [text for text in settings if "=" not in text]
    if files and files != settings[:1]:
        raise ConfigError(f"{files[-1]}: one YAML file may stand before the key=value settings")
    return (files[0] if files else None), settings[len(files) :]
