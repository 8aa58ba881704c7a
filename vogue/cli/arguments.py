"""What may be said to the command `vogue`: its commands, their options and their help."""

import argparse
import shlex
import sys
from pathlib import Path

from vogue.cli.argument_types import count, counts, gigabytes, names, steps, whole_number
from vogue.config.settings_help import settings_help

RESUME = "--resume"
WARMSTART = {
    "vision_batches": (60, "batches that teach the model to see"),
    "batches": (320, "supervised batches of the whole model"),
    "batch_size": (32, "demonstrations a batch"),
    "lr": (3e-3, "learning rate of AdamW"),
    "printed": (0.0, "share of demonstrations with the state as text and no image"),
    "seed": (0, "seed of everything random"),
}
WARMSTART_DIGITS = {
    "misread": (0.5, "digits alone: share of demonstrations that misread a digit, in the last quarter"),
    "faintest": (1.0, "digits alone: least contrast of a digit, as in `vogue data digits`"),
    "latent_steps": (0, "digits alone: states that are read before the answer, as rollout.latent_steps"),
    "latent_weight": (
        0.001,
        "digits alone: what the states' squared distance from the image's tokens counts; about as in the authors' "
        "code. The paper's 0.1 leaves this model few right answers",
    ),
}
WARMSTART_DATA = {
    "answer_weight": (1.0, "with --data alone: what a token of the answer counts, in tokens of the thought before it"),
    "design": (
        "verifiable",
        "with --data alone: the reward design whose form of answer is taught, behind its system prompt; pebr_reasoning "
        "is PeBR-R1's four headings",
    ),
}
PUZZLES = {
    "count": (3000, "training samples of each kind"),
    "test": (300, "test samples of each kind, of states that are in no training split"),
    "size": (224, "width and height of an image, in pixels"),
    "seed": (0, "seed of everything random"),
}
PLAN_HELP = """\
It is arithmetic on the settings and the model's config.json: no weight is read, none need be there, and nothing is
fetched. All prompts and completions are taken for as long as they may be, each prompt's image for as large as
data.max_pixels allows. Without --memory, and where there is no GPU, a run on this machine's CPUs is planned. Exit code
1: it doesn't fit; the settings that would make it fit are listed. docs/memory.md says what fits where.

  vogue plan examples/qwen2_5_vl.yaml --gpus 8 --memory 80
  vogue plan run.yaml rollout.max_tokens=8192 --gpus 8 --nodes 2 --memory 80 --json"""
EVAL_HELP = """\
completions have up to rollout.max_tokens tokens, behind the system prompt of reward.design, and are sampled at
rollout.temperature unless trainer.eval_temperature says otherwise: trainer.eval_temperature=0 --samples 1 is greedy.
So it is with trainer.eval_top_p, eval_top_k and eval_min_p. rollout.stop ends a completion here, too.

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
question, then in --batches of whole samples, behind the system prompt of --design.

  vogue data puzzles --kind checker_move --size 112 --out data
  vogue warmstart base --data data/train.parquet --vision-batches 800 --lr 2e-3 --printed 0.2

A model that sees already learns other images sooner: --model takes one of the digits, for their videos."""
SCORE_HELP = """\
docs/rewards.md has the rules. Nothing is loaded and no reward function is called. With --file the settings are those of
config.yaml beside the file.

  vogue score '<think>5 + 7</think> \\boxed{12 cm}' 12
  vogue score '<think></think><answer>3:05</answer>' 3:10 reward.design=continuous
  vogue score --file runs/demo/vogue/completions.jsonl"""
SERVE_HELP = """\
The settings are those of the training: model, dtype, lengths, rollout.engine_args, rollout.tensor_parallel. Its GPUs
are those of CUDA_VISIBLE_DEVICES. The environment variable VLLM_API_KEY is the key that it asks for at every door but
/health; without a key it listens on this machine alone. docs/rollouts.md says how weights get there.

on the machine of the servers, and on that of the training:
  CUDA_VISIBLE_DEVICES=0 VLLM_API_KEY=... vogue serve run.yaml --host 10.0.0.7 --port 8000
  VLLM_API_KEY=... deepspeed --module vogue.train run.yaml rollout.engine=server rollout.servers=[http://10.0.0.7:8000]"""
REPORT_HELP = """\
learning curves, pass@k before and after, exploration, guidance, times, and every logged completion with its images and
its tokens coloured by u_per or entropy. Runs that differ in their seed alone are one method: their mean with a band.

  vogue report runs/demo/vogue
  vogue report runs/sweeps/digits/*/seed_? --out runs/sweeps/digits/report.html"""
WATCH_HELP = """\
only the run's folder is read, while the run goes on and after it. Without a terminal it is shown once. Exit code 1: an
alarm is on. --serve prints the page's address and ends with Ctrl-C. From elsewhere: ssh -L 6007:localhost:6007 HOST"""
MERGE_HELP = """\
in the dtype of the model's own files. `vogue eval model.path=MODEL lora.adapter=ADAPTER` needs no merging.

  vogue merge runs/lora/checkpoints/step_000200/adapter --out merged"""
SHOW_HELP = """\
the chat text with its special tokens, token counts, images' sizes before and after, what the reward reads. It is the
first thing to run on data of your own; without model.path it shows what takes no model.

  vogue data show photos.csv
  vogue data show train.parquet model.path=MODEL --row 7 --count 20 --html samples.html
  vogue data show run.yaml data.max_pixels=500000"""
CHECK_HELP = """\
with model.path prompts that are too long are found, too. Exit code 1: some can't be used; data.skip=FILE leaves them
out of a training.

  vogue data check train.parquet
  vogue data check run.yaml --out broken.txt; vogue train run.yaml data.skip=broken.txt"""
SPLIT_HELP = """\
model.path answers each problem N times, as in an evaluation. easy: all answers are right, medium: some, hard: none.
The stages of PeBR-R1 (arXiv 2509.13031) train on the first two, one after the other:

  vogue data split train.parquet model.path=MODEL rollout.temperature=1.2 --out data/split
  vogue train model.path=MODEL data.train=data/split/easy.parquet reward.design=pebr_perception ...
  vogue train model.path=runs/first/checkpoints/step_000200/hf data.train=data/split/medium.parquet ..."""
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
    grpo_large: [method=grpo, model.path=LARGE]
    vogue_large: [model.path=LARGE]
  baselines: {vogue_large: grpo_large}  # compared with another one than the first (optional)
  launcher: [deepspeed, --num_gpus, "8", --module, vogue.train]     # default: this Python, one rank

key=value settings after FILE are for every run too. Each run has the folder OUTPUT_DIR/VARIANT/seed_N, and what it
printed in seed_N.log beside it; OUTPUT_DIR/table.md and table.json are the table, differences.png its figure. The same
command goes on with a sweep that stopped. Exit code 1: a run failed.

A variant may go on from checkpoints of another sweep that began with the same model:

    two_stages: ['model.path=runs/sweeps/first/a/seed_\\${seed}/checkpoints/step_000010/hf']"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Settings may stand on both sides of an option; argparse ends a list of them at the first one."""
    parser = _parser()
    # Alone it stands for "", not for the setting behind it.
    given = [f"{RESUME}=" if text == RESUME else text for text in (sys.argv[1:] if argv is None else argv)]
    arguments, rest = parser.parse_known_args(given)
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
    _add_plan(commands)
    _add_sweep(commands)
    _add_eval(commands)
    _add_serve(commands)
    _add_score(commands)
    _add_report(commands)
    _add_watch(commands)
    _add_merge(commands)
    _add_warmstart(commands)
    _add_data(commands)
    command = _add(commands, "doctor", "what was found here, what can run, and why the rest can't")
    command.add_argument(
        "--gpu",
        action="store_true",
        help="then measure the GPU's ceilings and hold the kernels to float64 on it: a minute, in a checkout of vogue",
    )
    return parser


def _add_train(commands) -> None:
    command = _add(commands, "train", "train a model", epilog=settings_help())
    _add_config(command)
    command.add_argument(
        RESUME,
        metavar="CHECKPOINT",
        nargs="?",
        const="",
        help="go on from the last checkpoint of trainer.output_dir, or from the one with this name: "
        "--resume=step_000020 or --resume=best; --resume=whole passes over damaged ones; without any checkpoint the "
        "run begins anew",
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="look for all that is wrong with settings, model, data and this machine, and train nothing",
    )
    command.add_argument(
        "--profile",
        type=steps,
        default=frozenset(),
        metavar="STEPS",
        help="write a torch profiler trace of these steps, counted from 0, into trainer.output_dir/profile: 3,5",
    )
    command.add_argument(
        "--restarts",
        type=count,
        metavar="N",
        help="after a crash go on by itself from the newest whole checkpoint, N times at most; not after a wrong "
        "setting or sample, a failed reward, or a stop",
    )
    command.add_argument(
        "--launcher",
        type=shlex.split,
        metavar="COMMAND",
        help="what --restarts starts the ranks with, 'deepspeed --num_gpus 8 --module vogue.train' or 'srun vogue "
        "train' for two (default: this Python, one rank)",
    )
    command.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def _add_plan(commands) -> None:
    command = _add(commands, "plan", "which memory a run would take, phase by phase, and whether it fits", PLAN_HELP)
    _add_config(command)
    command.add_argument("--gpus", type=count, metavar="N", help="GPUs of a machine (default: those here, or 1)")
    command.add_argument("--memory", type=gigabytes, metavar="GB", help="memory of a GPU (default: of those here)")
    command.add_argument("--nodes", type=count, default=1, metavar="N", help="machines (default 1)")
    command.add_argument("--json", action="store_true", help="print all of it as JSON, in bytes and tokens")


def _add_sweep(commands) -> None:
    command = _add(commands, "sweep", "train variants × seeds from one start, resumable, and compare them", SWEEP_HELP)
    _add_config(command)
    command.add_argument("--jobs", type=count, metavar="N", help="runs at a time, in place of FILE's")
    command.add_argument("--table", action="store_true", help="run nothing, show the table of the runs that are done")


def _add_eval(commands) -> None:
    from vogue.benchmarks import BENCHMARKS

    command = _add(
        commands,
        "eval",
        "pass@k of model.path on data.test or a published benchmark, with 95%% intervals",
        EVAL_HELP,
    )
    _add_config(command)
    command.add_argument(
        "--samples", type=count, metavar="N", help="completions a problem (default: trainer.eval_samples)"
    )
    command.add_argument(
        "--pass-at",
        type=counts,
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
    command.add_argument(
        "--extractor-model", metavar="NAME", help="the language model that --extractor's endpoint is asked for"
    )
    command.add_argument(
        "--extract-all",
        action="store_true",
        help="ask --extractor's language model about every completion, not only where rules find no answer",
    )
    command.add_argument(
        "--view",
        dest="views",
        type=names,
        default=("image",),
        metavar="VIEW,…",
        help="image, text (the sample's printed state in the image's place), both: is a model's weakness seeing or "
        "thinking? And noisy (the image perturbed by the settings of `perturb`): does it need a clean one? (default "
        "image)",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write every completion with its score, JSONL")


def _add_serve(commands) -> None:
    command = _add(commands, "serve", "a server of vLLM, for trainings with rollout.engine=server", SERVE_HELP)
    _add_config(command)
    command.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where it listens (default 127.0.0.1)")
    command.add_argument("--port", type=count, default=8000, metavar="N", help="(default 8000)")


def _add_score(commands) -> None:
    command = _add(commands, "score", "why a completion earns what it earns, step by step", SCORE_HELP)
    command.add_argument(
        "settings", nargs="*", metavar="COMPLETION ANSWER | key=value", help="a completion, the right answer, settings"
    )
    command.add_argument(
        "--file", type=Path, metavar="FILE", help="score a run's completions.jsonl again, and show what has changed"
    )


def _add_report(commands) -> None:
    command = _add(commands, "report", "one HTML page on runs, which needs no network, and PNGs beside it", REPORT_HELP)
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, its trainer.output_dir")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default for one run: RUN/report.html; several need it said)"
    )


def _add_watch(commands) -> None:
    command = _add(commands, "watch", "a run as it goes, in the terminal or on a page: curves, alarms", WATCH_HELP)
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a run, its trainer.output_dir")
    command.add_argument("--serve", action="store_true", help="serve the page of `vogue report`, kept up to date")
    command.add_argument("--port", type=whole_number, metavar="N", help="of --serve (default 6007; 0: a free one)")
    command.add_argument("--host", metavar="ADDRESS", help="of --serve (default 127.0.0.1, this machine alone)")


def _add_merge(commands) -> None:
    command = _add(commands, "merge", "write a model with an adapter merged into it, to use anywhere", MERGE_HELP)
    command.add_argument("adapter", type=Path, help="folder of the adapter, a checkpoint's or another one of PEFT's")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the model's new folder")
    command.add_argument("--base", metavar="MODEL", help="the model (default: the one that the adapter was trained on)")


def _add_warmstart(commands) -> None:
    command = _add(
        commands,
        "warmstart",
        "make a small Qwen2.5-VL from nothing, for the digits or data with a printed state",
        WARMSTART_HELP,
    )
    command.add_argument("out", type=Path, help="folder of the model")
    command.add_argument("--data", metavar="FILE", help="samples with a `state`, as data.train (default: the digits)")
    command.add_argument(
        "--model", metavar="DIR", help="with --data alone: a model to begin with, as this command makes"
    )
    for name, (default, help) in (WARMSTART | WARMSTART_DIGITS | WARMSTART_DATA).items():
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, type=type(default), default=default, help=f"{help} (default {default})")


def _add_inspection(kinds, name: str, help: str, epilog: str) -> argparse.ArgumentParser:
    command = _add(kinds, name, help, epilog)
    command.add_argument("file", metavar="DATA", help="a data set, as data.train takes it, or a run's settings, .yaml")
    command.add_argument("settings", nargs="*", metavar="key=value", help="settings of data, model.path and others")
    return command


def _add_data(commands) -> None:
    command = commands.add_parser(
        "data", help="look at a data set (show, check), or write one (split, digits, moving-digits, puzzles)"
    )
    kinds = command.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    command = _add_inspection(
        kinds, "show", "samples as the model will see them, and what looks odd about them", SHOW_HELP
    )
    command.add_argument("--row", type=whole_number, default=0, metavar="N", help="the first row shown (default 0)")
    command.add_argument("--count", type=count, default=1, metavar="N", help="samples shown from there on (default 1)")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with the images, too")
    command = _add_inspection(kinds, "check", "find all samples that can't be used; each image is decoded", CHECK_HELP)
    command.add_argument("--out", type=Path, metavar="FILE", help="write their row numbers, as data.skip takes them")

    command = _add_inspection(
        kinds, "split", "easy, medium and hard .parquet, by how often a model is right", SPLIT_HELP
    )
    command.add_argument("--samples", type=count, default=8, metavar="N", help="completions a problem (default 8)")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")

    command = _add_splits(kinds, "digits", "two handwritten digits and a question: train, validation, test .parquet")
    command.add_argument(
        "--faintest",
        type=float,
        default=1.0,
        metavar="C",
        help="ink of each digit has a contrast between C and 1, so that noise hides some of them (default 1)",
    )
    command = _add_splits(kinds, "moving-digits", "videos of two digits, one after the other: the same three .parquet")
    command.add_argument(
        "--frames", type=count, default=4, metavar="N", help="frames of a video, a multiple of 4 (default 4)"
    )

    command = _add(kinds, "puzzles", "puzzles with a known state: train.parquet, test.parquet", PUZZLES_HELP)
    command.add_argument("--kind", dest="kinds", type=names, metavar="KIND,…", help="default: all of the kinds below")
    for name, (default, help) in PUZZLES.items():
        command.add_argument(
            f"--{name}", type=whole_number, default=default, metavar="N", help=f"{help} (default {default})"
        )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")


def _add_splits(kinds, name: str, help: str) -> argparse.ArgumentParser:
    command = _add(kinds, name, help)
    command.add_argument("out", type=Path, help="folder to write to")
    for split, size in {"train": 8000, "validation": 500, "test": 1000}.items():
        command.add_argument(
            f"--{split}", type=int, default=size, metavar="N", help=f"samples of the {split} split (default {size})"
        )
    command.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    return command


def _add(commands, name: str, help: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help,
        description=help.replace("%%", "%"),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "settings", nargs="*", metavar="FILE.yaml | key=value", help="settings: a file first, then overrides"
    )
