"""tools/mutants.py: every mistake of its list can still be made, and a test that fails anyway sees none."""

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


@pytest.fixture
def survives(tmp_path):
    """A function: whether tests of a file's `twice` pass in spite of a mistake in it."""
    (tmp_path / "number.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "tests").mkdir()

    def tell(assertion):
        (tmp_path / "tests/test_number.py").write_text(f"from number import twice\n\ndef test(): assert {assertion}\n")
        mutant = TOOL["Mutant"]("number.py", "2 * x", "x * x", "tests/test_number.py", "test")
        TOOL["tried_without"].cache_clear()
        found = TOOL["survives"](mutant, tmp_path)
        assert (tmp_path / "number.py").read_text() == "def twice(x):\n    return 2 * x\n"
        return found

    return tell


@pytest.mark.slow
def test_a_mistake_survives_where_the_tests_pass_with_it_and_is_seen_where_they_pass_only_without(survives):
    assert survives("twice(2) == 4")
    assert not survives("twice(3) == 6")


@pytest.mark.slow
def test_tests_that_fail_without_a_mistake_are_an_error(survives):
    with pytest.raises(RuntimeError, match=r"tests/test_number\.py fails without a mistake"):
        survives("twice(3) == 7")


def test_a_text_that_is_no_longer_there_is_an_error_that_names_it():
    mutant = TOOL["Mutant"]("number.py", "2 * x", "x * x", "tests/test_number.py")
    for text, count in (("x + x", 0), ("2 * x + 2 * x", 2)):
        with pytest.raises(ValueError, match=rf"number\.py has '2 \* x' {count} times, not once"):
            TOOL["mutated"](mutant, text)
