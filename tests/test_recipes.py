"""The recipes of other trainers and papers in examples/recipes: each is read, and fits where it says."""

import re
from pathlib import Path

import pytest
from test_plan import folder_of  # noqa: F401

from vogue.config import load_config
from vogue.run.plan import adapted, layout_of, problems_of
from vogue.run.sizes import sizes_of

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
