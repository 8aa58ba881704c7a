"""tools/mutants.py: every mistake of its list can still be made."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "mutants.py"))


@pytest.mark.parametrize("mutant", TOOL["MUTANTS"], ids=lambda mutant: f"{mutant.file}-{mutant.text[:20]}")
def test_the_text_of_every_mistake_stands_once_in_its_file(mutant):
    text = (ROOT / mutant.file).read_text()
    assert TOOL["mutated"](mutant, text) != text
    assert (ROOT / mutant.tests).exists()
