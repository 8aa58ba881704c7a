"""The examples of kernels/README.md, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "kernels" / "README.md"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_worked_example_learns():
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "VogueLoss()" in block
    )
    printed = run(code)
    first, *_, last = (float(reward) for reward in re.findall(r"reward ([0-9.]+)", printed))
    assert first < 0.65
    assert last > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("package, module", [("liger_kernel", "liger_kernel.ops"), ("verl", "verl.utils")])
def test_in_another_trainer_our_errors_are_as_small_as_it_says_and_smaller_than_theirs(package, module):
    pytest.importorskip(package)
    block = r"((?:(?!```).)*)```"
    blocks = re.findall(rf"```python\n{block}\n\n```\n{block}", README.read_text(), re.S)
    code, expected = next(block for block in blocks if f"from {module}" in block[0])
    printed = [line for line in run(code).splitlines() if " error of " in line]
    names, expected_names = ([line.split()[0] for line in lines] for lines in (printed, expected.splitlines()))
    assert names == expected_names and len(names) >= 2
    *theirs, ours = ([float(error) for error in re.findall(r"\d\.\de-\d\d", line)] for line in printed)
    assert len(ours) == 2 and max(ours) < 1e-5
    assert all(min(errors) > 1e-3 for errors in theirs)


@pytest.mark.slow
def test_the_example_of_distillation_prints_the_errors_of_float32():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    printed = run(next(block for block in blocks if "weight_q=" in block)).splitlines()
    assert [line.split()[0] for line in printed] == ["forward", "reverse"]
    errors = [float(error) for line in printed for error in re.findall(r"\d+e-\d\d", line)]
    assert len(errors) == 6 and max(errors) <= 1e-5


def test_what_is_shown_of_the_example_with_trl_stands_in_it():
    shown = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "VogueTrainer(" in block
    )
    assert shown in (ROOT / "examples" / "trl_trainer.py").read_text()


def example(told):
    return next(block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if told in block)


@pytest.mark.slow
@pytest.mark.parametrize(
    "told",
    [
        pytest.param("import linear_branch_stats, vocab_parallel_branch_stats", marks=pytest.mark.long),
        "import fully_shard",
    ],
)
def test_an_example_of_several_ranks_is_as_exact_as_it_says(told, tmp_path):
    # the interpreter's own end is left out, where a thread of gloo may abort a rank that is done
    (tmp_path / "example.py").write_text(f"{example(told)}import os\nprint(end='', flush=True)\nos._exit(0)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "example.py"]
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # what both print at once may share a line
    assert sorted(re.findall(r"rank (\d):", done.stdout)) == ["0", "1"]
    errors = [float(error) for error in re.findall(r"\de-\d\d", done.stdout)]
    assert len(errors) == 6 and max(errors) < 1e-6


EXACT = """
exact_hidden = hidden.detach().double().requires_grad_()
exact = (exact_hidden @ weight.double().T).log_softmax(-1).gather(1, words)
(teacher.exp() * (teacher - exact)).sum(-1).mean().backward()
for found, true in ((student, exact), (hidden.grad, exact_hidden.grad)):
    print(((found - true).abs().max() / true.abs().max()).item())
"""


def test_the_example_of_several_words_is_as_exact_as_it_says():
    errors = [float(line) for line in run(example("distillation.backward()") + EXACT).split()]
    assert len(errors) == 2 and max(errors) < 1e-5
