"""The recipes of other trainers and papers in examples/recipes: each is read, and fits where it says."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_plan import folder_of  # noqa: F401

from vogue.config import load_config
from vogue.run.model_sizes import sizes_of
from vogue.run.plan import adapted, layout_of, problems_of

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_where_it_says(recipe, folder_of):  # noqa: F811
    text = recipe.read_text()
    (size,) = re.findall(r"^  path: Qwen/Qwen2.5-VL-(\d+B)-Instruct$", text, re.M)
    ((ranks, memory),) = re.findall(r"[Ff]or (\d+) GPUs of (\d+) GB\b", " ".join(text.replace("\n#", "").split()))
    config = load_config(recipe, [f"model.path={folder_of(size)}", "data.train=none"])
    sizes = sizes_of(adapted(config), config)
    assert problems_of(sizes, layout_of(config, sizes, int(ranks), float(memory) * 1e9, on_gpu=True)) == []


def test_there_are_those_of_the_trainers_that_people_come_from():
    assert {"easyr1_geometry3k", "trl_vlm_lora", "verl_geometry3k", "papo", "vppo"} <= {path.stem for path in RECIPES}


# Says what it was called with, and leaves what a training leaves.
TELLS = """#!/bin/sh
for word; do printf "%s " "'$(printf %s "$word" | sed "s/'/'\\\\''/g")'"; done; echo
mkdir -p first/checkpoints/step_000010/hf
"""


def test_pebr_r1_splits_and_then_trains_its_two_stages(tmp_path):
    (tmp_path / "vogue").write_text(TELLS)
    (tmp_path / "vogue").chmod(0o755)
    command = ["sh", RECIPES[0].parent / "pebr_r1.sh", "model", "clip", "all.parquet", "."]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRAIN": "vogue train"}
    told = subprocess.run(command, cwd=tmp_path, env=os.environ | path, check=True, capture_output=True, text=True)
    split, first, second = map(shlex.split, told.stdout.splitlines())
    assert (split[:2], split[-4:]) == (["data", "split"], ["--samples", "8", "--out", "./split"])
    drawn = load_config(split[2], split[3:-4])
    assert (drawn.data.train, drawn.rollout.temperature, drawn.rollout.top_p) == ("all.parquet", 1.2, 0.99)
    seeing, thinking = (load_config(words[1], words[2:]) for words in (first, second))
    assert (seeing.reward.design, seeing.rollout.prompts, seeing.trainer.updates) == ("pebr_perception", 560, 5)
    assert seeing.reward.scorer.options == {"model": "clip"}
    assert (thinking.reward.design, thinking.rollout.prompts, thinking.trainer.epochs) == ("pebr_reasoning", 512, 2)
    assert thinking.model.path == "./first/checkpoints/step_000010/hf"
    assert {config.kl.coef for config in (seeing, thinking)} == {0.01}
