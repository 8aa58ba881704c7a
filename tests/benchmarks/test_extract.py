r"""What the rules find in a completion, and what they leave unfound rather than guess."""

import pytest

from vogue.benchmarks.extract import EXPRESSION, LETTERS, LIST, NUMERIC, SHORT, YES_OR_NO, extract, options, stated

CHOICES = options({"A": "40°", "B": "\\frac{1}{2}", "C": "120 people", "D": "St. Louis"})


@pytest.mark.parametrize(
    ("completion", "statement"),
    [
        ("<think>3</think> So \\boxed{4}, not \\boxed{5}", "5"),
        ("<think>\\boxed{3}</think> <answer>4</answer> \\boxed{5}", "4"),
        ("<answer>It is \\boxed{4}.</answer>", "4"),
        ("The answer is 3. No: the final answer is 4. It fits.", "4"),
        ("**Answer:** **B**\nwhy", "B"),
        ("The correct option is (B).", "(B)"),
        ("Answer:\n\n  .5", ".5"),
        ("It is 4.", None),
        ("\\boxed{}", None),
    ],
)
def test_the_last_stated_answer_is_what_counts(completion, statement):
    assert stated(completion) == statement


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{(b)}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{A. 40°}", "A"),
        ("\\boxed{C: 120}", "C"),
        ("\\boxed{40°}", "A"),
        ("\\boxed{$40°$}", "A"),
        ("\\boxed{0.5}", "B"),  # equal as mathematics
        ("\\boxed{st. louis}", "D"),
        ("The answer is B because A is too small.", None),  # neither the letter alone, nor marked as an option
        ("The answer is option B because A is too small.", "B"),
        ("(C)", "C"),
        ("D", "D"),
        ("Reasoning.\nSo we choose (A), not option b", "B"),
        ("A triangle has three sides.\nA square has four.", None),
        ("A triangle has three sides.", None),
        ("\\boxed{E}", None),
        ("\\boxed{41°}", None),
        ("<think>Maybe (A).</think> I can't tell.", None),
    ],
)
def test_an_option_is_found_by_its_letter_or_its_text(completion, letter):
    assert extract(completion, CHOICES) == letter


def test_an_option_of_one_word_is_found_at_the_start_of_a_sentence():
    yes_or_no = options({"A": "Yes", "B": "No"})
    assert extract("So the answer is no, there are fewer.", yes_or_no) == "B"
    assert extract("So the answer is nowhere to be seen.", yes_or_no) is None
    assert extract("The answer is 3, 5.", options({"A": "3", "B": "5"})) is None


def test_words_are_not_compared_as_products_of_variables():
    assert extract("\\boxed{on top}", options({"A": "no pot", "B": "yes"})) is None


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("\\boxed{14}", "14"),
        ("\\boxed{14 meters}", "14"),
        ("\\boxed{\\$1,450.50}", "1450.50"),
        ("\\boxed{12\\%}", "12%"),
        ("\\boxed{-3/4}", "-0.75"),
        ("\\boxed{\\frac{1}{4}}", "0.25"),
        ("\\boxed{3/0}", None),
        ("\\boxed{x_1 = 3 \\text{ cm}^2}", "3"),
        ("\\boxed{2 \\times 10^{3}}", "2e3"),
        ("\\boxed{−.5}", "-.5"),
        ("\\boxed{1.2.3/4}", "1.2"),
        ("The answer is 5 out of 10.", "5"),
        ("First 3, and then 47.6 cm^{2}.", "47.6"),
        ("<think>4 or 5</think>", None),
        ("\\boxed{many}", None),
    ],
)
def test_a_number_is_found_without_unit_and_separators(completion, number):
    assert extract(completion, NUMERIC) == number


@pytest.mark.parametrize(
    ("completion", "letters"),
    [
        ("\\boxed{A, C}", "A, C"),
        ("\\boxed{C and A}", "A, C"),
        ("\\boxed{(A) (C)}", "A, C"),
        ("\\boxed{CA}", "A, C"),
        ("\\boxed{a}", "A"),
        ("\\boxed{B. 12 boxes}", "B"),
        ("\\boxed{3}", "3"),
        ("Both (A) and (C) fit.", "A, C"),
        ("\\boxed{NO}", None),
        ("A box.", None),
    ],
)
def test_several_letters_are_found_in_any_order(completion, letters):
    assert extract(completion, LETTERS) == letters


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{Yes}", "yes"),
        ("The answer is no, it is smaller.", "no"),
        ("Yes, and no circle is larger.", "yes"),
        ("As they are equal, no.", "no"),
        ("It is yes or no.", None),
        ("\\boxed{uncertain}", "uncertain"),
        ("That cannot be told without the figure.", "uncertain"),
        ("They are equal.", None),
        ("", None),
    ],
)
def test_yes_and_no_are_found_where_only_one_is_said(completion, answer):
    assert extract(completion, YES_OR_NO) == answer


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("\\boxed{[0,2 , 1]}", "[0, 2, 1]"),
        ("The answer is 2014 and 2016.", "[2014, 2016]"),
        ("First [1, 2]; then [3, 4]", "[3, 4]"),
        ("\\boxed{7}", None),
        ("Between 2014 and 2016", None),
    ],
)
def test_a_list_is_found_and_written_as_python_does(completion, found):
    assert extract(completion, LIST) == found


def test_words_and_expressions_are_taken_as_they_are_stated():
    assert extract("\\boxed{\\text{Light blue}}", SHORT) == "Light blue"
    assert extract("Light blue.", SHORT) == "Light blue"
    assert extract("Two lines\nand no statement", SHORT) is None
    assert extract("\\boxed{\\frac{\\sqrt{3}}{2}}", EXPRESSION) == "\\frac{\\sqrt{3}}{2}"
    assert extract("so that it is 3, and then 9.", EXPRESSION) == "9"
