"""The loop of one's own in examples/own_trainer.py."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from ranks import environment

from vogue_kernels import linear_logprob

SCRIPT = Path(__file__).parents[1] / "examples" / "own_trainer.py"
WITHOUT_VOGUE = "import runpy, sys; sys.modules['vogue'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_the_hidden_states_of_the_example_are_those_that_its_completions_were_sampled_from(model_folder, digits_folder):
    functions = runpy.run_path(str(SCRIPT))
    processor, model, media = functions["load"](model_folder)
    (row,) = parquet.read_table(digits_folder / "test.parquet").slice(0, 1).to_pylist()
    inputs = functions["as_inputs"](processor, row, [Image.new("RGB", (56, 28), "gray")], "Think.")
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        **{"suppress_tokens": media, "max_new_tokens": 8, "num_return_sequences": 3},
        **{"return_dict_in_generate": True, "output_scores": True},
    )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = torch.stack(out.scores, dim=1).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    hidden = functions["hidden_states"](model, inputs, tokens)
    bias = torch.zeros(model.lm_head.out_features)
    bias[media] = functions["BAN"]
    found = linear_logprob(hidden, model.lm_head.weight, tokens.flatten(), bias).logprob.view_as(tokens)
    assert len(media) == 2
    before_the_end = (tokens == processor.tokenizer.eos_token_id).cumsum(1).roll(1, 1) == 0
    before_the_end[:, 0] = True
    assert before_the_end.sum() > 12
    torch.testing.assert_close(found[before_the_end], expected[before_the_end], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ["raw", pytest.param("drawn", marks=pytest.mark.long)])
def test_the_example_trains_without_the_trainer(rollout, model_folder, digits_folder):
    command = [sys.executable, "-c", WITHOUT_VOGUE.replace("sys.argv[0]", repr(str(SCRIPT)))]
    settings = [
        "--system",
        "Think.",
        "--steps",
        "4",
        "--prompts",
        "4",
        "--n",
        "4",
        "--max-tokens",
        "12",
        "--rollout",
        rollout,
    ]
    done = subprocess.run(
        [*command, str(model_folder), str(digits_folder / "train.parquet"), *settings], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {i}" for i in (1, 2, 3, 4)]
    assert float(re.search(r"u_per ([\d.]+) nats in 4 groups", lines[0])[1]) > 0


@pytest.mark.slow
def test_the_example_with_trls_trainer_trains(model_folder, digits_folder, tmp_path):
    pytest.importorskip("trl")
    settings = f"--system Think. --steps 2 --prompts 2 --n 4 --max-tokens 12 --rollout drawn --out {tmp_path}".split()
    command = [sys.executable, SCRIPT.with_name("trl_trainer.py"), model_folder, digits_folder / "train.parquet"]
    done = subprocess.run([*map(str, command), *settings], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in printed] == ["step 1", "step 2"]
    assert float(re.search(r"paid 1.00, u_per ([\d.]+) nats", printed[0])[1]) > 0
