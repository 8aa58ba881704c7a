"""`vogue data`: show, check, split, and the data sets that are drawn: digits, moving digits, puzzles."""

import argparse
from typing import TYPE_CHECKING

from rich.console import Console

from vogue.cli.quiet import quiet
from vogue.config import Config, load_config
from vogue.settings import ConfigError

if TYPE_CHECKING:
    from vogue.inputs import Preprocessor

FOUND = 1  # exit code of a check that found something


def data(arguments: argparse.Namespace) -> int:
    commands = {"digits": digits, "moving-digits": moving_digits, "puzzles": puzzles}
    commands |= {"check": check_data, "show": show_data, "split": split_data}
    return commands[arguments.kind](arguments)


def check_data(arguments: argparse.Namespace) -> int:
    quiet()
    config, preprocessor = _inspected(arguments)
    from vogue.data.dataset import training_samples
    from vogue.data_inspection import find_offenders, print_offenders, write_rows

    samples, console = training_samples(config.data), Console()
    offenders = find_offenders(samples, preprocessor, console)
    if offenders:
        print_offenders(samples, offenders, console)
    else:
        console.print(f"{samples.spec}: all {len(samples)} samples can be used")
    if arguments.out:
        write_rows(samples, offenders, arguments.out)
        console.print(f"their row numbers, for data.skip={arguments.out}")
    return FOUND if offenders else 0


def show_data(arguments: argparse.Namespace) -> int:
    quiet()
    config, preprocessor = _inspected(arguments)
    from vogue.data.dataset import training_samples
    from vogue.data_inspection import print_shown, show, write_page

    samples, console = training_samples(config.data), Console()
    if arguments.row not in samples.rows:
        raise ConfigError(
            f"--row {arguments.row}: {samples.spec} has no such row; they go from 0 to {samples.rows[-1]}"
        )
    first = samples.rows.index(arguments.row)
    shown = [show(sample, config, preprocessor) for sample in samples[first : first + arguments.count]]
    special = preprocessor.special_tokens if preprocessor else ()
    for item in shown:
        print_shown(item, special, console)
    if preprocessor is None:
        console.print("model.path=MODEL shows the chat text and its tokens too")
    if arguments.html:
        write_page(shown, f"{samples.spec}: {len(samples)} samples", special, arguments.html)
        console.print(f"page: {arguments.html}")
    return 0


def split_data(arguments: argparse.Namespace) -> int:
    quiet()
    is_settings = arguments.file.endswith((".yaml", ".yml"))
    overrides = [*([] if is_settings else [f"data.train={arguments.file}"]), *arguments.settings]
    overrides += [f"trainer.eval_samples={arguments.samples}", "trainer.eval_every=0", "trainer.save_best=null"]
    config = load_config(arguments.file if is_settings else None, overrides)
    from vogue.difficulty import split

    console = Console()
    for name, count in split(config, arguments.out, console).items():
        console.print(f"{name:8} {count:6}  {arguments.out / f'{name}.parquet' if count else ''}", soft_wrap=True)
    return 0


def _inspected(arguments: argparse.Namespace) -> tuple[Config, "Preprocessor | None"]:
    """The settings of `vogue data check` and `show`, and a preprocessor where they name a model."""
    is_settings = arguments.file.endswith((".yaml", ".yml"))
    overrides = [*([] if is_settings else [f"data.train={arguments.file}"]), *arguments.settings]
    has_model = is_settings or any(text.startswith("model.path=") for text in overrides)
    config = load_config(
        arguments.file if is_settings else None, [*([] if has_model else ["model.path=none"]), *overrides]
    )
    from vogue.run.chat_template import checked_preprocessor

    return config, checked_preprocessor(config) if has_model else None


def digits(arguments: argparse.Namespace) -> int:
    from vogue.data.digits import write_digits

    counts = (arguments.train, arguments.validation, arguments.test)
    write_digits(arguments.out, *counts, arguments.seed, faintest=arguments.faintest)
    for name in ("train", "validation", "test"):
        print(arguments.out / f"{name}.parquet")
    return 0


def moving_digits(arguments: argparse.Namespace) -> int:
    from vogue.data.moving_digits import write_moving_digits

    counts = (arguments.train, arguments.validation, arguments.test)
    write_moving_digits(arguments.out, *counts, arguments.seed, arguments.frames)
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
