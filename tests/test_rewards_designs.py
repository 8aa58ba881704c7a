"""The designs of arXiv 2601.00215: what they ask for, what they earn. tanh 1, 2, 3 = 0.761594, 0.964028, 0.995055."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vogue.answer_extraction import tagged_answer
from vogue.config import load_config
from vogue.config.presets import DESIGNS, HEADED
from vogue.config.sections import RewardConfig
from vogue.data.prompts import SYSTEM_PROMPTS, system_prompt
from vogue.data.puzzles import draw_puzzles
from vogue.rewards import Score, score
from vogue.rewards.designs import TAGS, content, has_format, partial_credit, sentence_score, sentences
from vogue.rewards.pebr_r1 import HEADINGS
from vogue.settings import ConfigError

FOUR_TAGS = (
    "<description>A clock.</description>"
    "<think>The short hand is past 3. The long one is at 2.</think>"
    "<rethink>It is ten past. Yes. It is ten past.</rethink>"
    "<answer>{}</answer>"
)
SETTINGS = ["model.path=some/model", "data.train=train.parquet"]


def earned(design, completion, answer, **weights):
    return score(completion, answer, RewardConfig(design=design, weights=weights))


# --------------------------------------------------------------------------------------------------- the six designs


def test_vanilla_is_a_tenth_thought_and_nine_tenths_answer():
    completion = "<think>The hand is at 3. So it is three.</think><answer>3:00</answer>"
    right = earned("vanilla", completion, "3:00")
    assert right.reward == pytest.approx(0.1 * 0.964028 + 0.9, abs=1e-6)
    assert right.components == pytest.approx({"think": 0.964028, "answer": 1.0}, abs=1e-6)
    assert (right.accuracy, right.format, right.parsed) == (1.0, 1.0, "3:00")
    wrong = earned("vanilla", completion, "4:00")
    assert wrong.reward == pytest.approx(0.0964028, abs=1e-6)
    assert (wrong.accuracy, wrong.format) == (0.0, 1.0)


def test_only_accuracy_asks_for_thought_and_rewards_the_answer_alone():
    assert SYSTEM_PROMPTS["only_accuracy"] == SYSTEM_PROMPTS["vanilla"]
    thoughtful = earned("only_accuracy", "<think>Three.</think><answer>3</answer>", "3")
    assert thoughtful == Score(1.0, 1.0, 1.0, "3", {"think": pytest.approx(0.761594, abs=1e-6), "answer": 1.0})
    assert earned("only_accuracy", "<answer>3</answer>", "3") == Score(1.0, 1.0, 0.0, "3", {"think": 0, "answer": 1.0})
    assert earned("only_accuracy", "<think>Three.</think><answer>4</answer>", "3").reward == 0


def test_a_mixture_adds_up_four_tags():
    found = earned("mixture", FOUR_TAGS.format("3:10"), "3:10")
    assert found.components == pytest.approx(
        {"description": 0.761594, "think": 0.964028, "rethink": 0.964028 - 0.761594, "answer": 1.0}, abs=1e-6
    )
    # 0.06 · 0.761594 + 0.06 · 0.964028 + 0.08 · 0.202434 + 0.8
    assert found.reward == pytest.approx(0.919732, abs=1e-6)
    assert found.format == 1.0
    assert earned("mixture", FOUR_TAGS.format("4:15"), "3:10").reward == pytest.approx(0.119732, abs=1e-6)


def test_continuous_is_the_mixture_with_partial_credit():
    right, near = (FOUR_TAGS.format(answer) for answer in ("3:10", "4:15"))
    assert earned("continuous", right, "3:10") == earned("mixture", right, "3:10")
    found = earned("continuous", near, "3:10")
    assert found.components["answer"] == pytest.approx(0.775)  # (1 - 1/5 + 1 - 5/20) / 2
    assert found.reward == pytest.approx(0.119732 + 0.8 * 0.775, abs=1e-6)
    assert found.accuracy == 0.0


def test_no_accuracy_never_looks_at_whether_the_answer_is_right():
    right, wrong = (earned("no_accuracy", FOUR_TAGS.format(answer), "3:10") for answer in ("3:10", "nonsense"))
    # 0.3 · (0.761594 + 0.964028 + 0.202434) + 0.1
    assert right.reward == wrong.reward == pytest.approx(0.678417, abs=1e-6)
    assert (right.accuracy, wrong.accuracy) == (1.0, 0.0)  # measured all the same
    silent = earned("no_accuracy", FOUR_TAGS.partition("<answer>")[0], "3:10")
    assert silent.reward == pytest.approx(0.578417, abs=1e-6)


def test_visual_fusion_rewards_what_was_seen_within_the_thought():
    seen = "<visual>The short hand is at 3.</visual>"
    found = earned("visual_fusion", f"<think>I look. {seen} So it is 3.</think><answer>3</answer>", "3")
    assert found.components == pytest.approx({"think": 0.995055, "visual": 0.761594, "answer": 1.0}, abs=1e-6)
    assert found.reward == pytest.approx(0.1 * 0.995055 + 0.1 * 0.761594 + 0.8, abs=1e-6)
    assert found.format == 1.0
    outside = earned("visual_fusion", f"{seen}<think>I look. So it is 3.</think><answer>3</answer>", "3")
    assert (outside.components["visual"], outside.format) == (0.0, 0.0)


@pytest.mark.parametrize("design", [name for name in DESIGNS if "answer" in DESIGNS[name]])
def test_an_absent_tag_earns_nothing_and_the_order_is_free(design):
    pieces = ["<description>A clock.</description>", "<rethink>Yes.</rethink>", "<answer>3:10</answer>"]
    pieces.append("<think>Past 3. <visual>Hands.</visual></think>")
    forwards, backwards = (earned(design, "".join(order), "3:10") for order in (pieces, pieces[::-1]))
    assert forwards == backwards
    assert forwards.format == 1.0
    for tag in DESIGNS[design]:
        without = earned(design, "".join(pieces).replace(f"</{tag}>", ""), "3:10")
        assert without.components[tag] == 0.0
        assert without.format == 0.0
    assert earned(design, "", "3:10").reward == 0.0
    assert earned(design, "\\boxed{3:10}", "3:10").accuracy == 0.0


def test_weights_are_settings():
    completion, vanilla = (
        "<think>Three.</think><answer>3</answer>",
        RewardConfig(design="vanilla", weights={"think": 0.5, "answer": 0.25}),
    )
    assert score(completion, "3", vanilla).reward == pytest.approx(0.5 * 0.761594 + 0.25, abs=1e-6)
    assert earned("only_accuracy", completion, "3", think=1.0).reward == pytest.approx(1.761594, abs=1e-6)


def test_unset_weights_are_those_of_the_design_and_unknown_ones_are_refused():
    def load(*overrides):
        return load_config(None, [*SETTINGS, *overrides]).reward

    assert load().weights == {"accuracy": 0.9, "format": 0.1}
    assert load("reward.design=mixture", "reward.weights.think=0.2").weights == DESIGNS["mixture"] | {"think": 0.2}
    for design, weights in DESIGNS.items():
        scorer = ["reward.scorer.function=own.py:score"] * ("similarity" in weights)
        assert load(f"reward.design={design}", *scorer).weights == weights
    assert load("reward.weights.format=null").weights == {"accuracy": 0.9, "format": 0.1}
    with pytest.raises(ConfigError, match=r"^reward\.weights\.rethink=1\.0: the scores are think, answer$"):
        load("reward.design=vanilla", "reward.weights.rethink=1")
    with pytest.raises(ConfigError, match=r"^reward\.weights\.think=-1\.0: a score of the design has a weight of 0 or"):
        load("reward.design=vanilla", "reward.weights.think=-1")
    with pytest.raises(ConfigError, match=r"^reward\.weights\.think='much': "):
        load("reward.design=vanilla", "reward.weights.think=much")
    with pytest.raises(ConfigError, match=r"^reward\.function=rewards\.py:own takes the place of all weights"):
        load("reward.function=rewards.py:own", "reward.weights.think=1")
    with pytest.raises(ConfigError, match=r"^reward\.function='rewards\.py': string should match pattern"):
        load("reward.function=rewards.py")


# ------------------------------------------------------------------------------------------------------- the prompts


@pytest.mark.parametrize("design", DESIGNS)
def test_a_design_asks_for_every_tag_it_scores(design):
    prompt = SYSTEM_PROMPTS[design]
    for tag in {*TAGS, "answer"} & {*DESIGNS[design]}:
        assert f"<{tag}></{tag}>" in prompt
    assert ("\\boxed{}" in prompt) == ("answer" not in DESIGNS[design] and design not in HEADED)
    assert all(heading in prompt for heading in HEADINGS) == (design in HEADED)
    filled = prompt.replace("></", ">Something.</").replace("\\boxed{}", "\\boxed{3}")
    if design == "visual_fusion":
        filled = filled.replace("<think>Something.", "<think><visual>Something.</visual>")
    assert all(f"<{tag}>" in filled for tag in TAGS if tag in DESIGNS[design])


def test_a_design_brings_its_prompt_unless_the_user_sets_one():
    def prompt(*overrides):
        return system_prompt(load_config(None, [*SETTINGS, *overrides]))

    assert prompt() == SYSTEM_PROMPTS["verifiable"]
    assert prompt("reward.design=mixture") == SYSTEM_PROMPTS["mixture"]
    assert prompt("reward.design=mixture", "data.system_prompt=Think.") == "Think."
    assert prompt("data.system_prompt=''") == ""


# ---------------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("One", ["one"]),
        ("One. Two! Three? Four", ["one.", "two!", "three?", "four"]),
        ("At 3.5 cm, i.e. near.", ["at 3.5 cm, i.e.", "near."]),
        ("One\n\n  Two \n", ["one", "two"]),
        ("I see <visual>a hand.</visual> Good.", ["i see", "a hand.", "good."]),
        ("One  big\tone.", ["one big one."]),
        ("... ! \n - \n 7", ["7"]),
        ("是。不是？", ["是。", "不是？"]),
    ],
)
def test_sentences_end_at_marks_line_breaks_and_tags(text, found):
    assert sentences(text) == found


def test_repeating_a_sentence_costs_what_saying_another_earns():
    assert sentence_score("") == 0
    assert sentence_score("One.") == pytest.approx(0.761594, abs=1e-6)
    assert sentence_score("One. Two.") == pytest.approx(0.964028, abs=1e-6)
    assert sentence_score("One. ONE.") == pytest.approx(0)
    assert sentence_score("One. Two. one. One.") == pytest.approx(0)  # two distinct, two repetitions
    assert sentence_score("One. One. One. One.") == pytest.approx(0.761594 - 0.995055, abs=1e-6)


def test_a_tag_twice_has_both_contents_and_an_open_one_none():
    assert content("<think>a</think> b <think>c\nd</think>", "think") == "a\nc\nd"
    assert content("<think></think>", "think") == ""
    assert content("<think>a", "think") is None
    assert content("a</think>", "think") is None


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer> 3 </answer>", "3"),
        ("<answer>3</answer> or <answer>4</answer>", "4"),
        ("<answer>It is \\boxed{3}.</answer>", "3"),
        ("<answer>\\boxed{3</answer>", "\\boxed{3"),
        ("<answer></answer>", ""),
        ("\\boxed{3}", None),
        ("<answer>3", None),
    ],
)
def test_the_last_answer_tag_holds_the_answer(completion, answer):
    assert tagged_answer(completion) == answer


# ------------------------------------------------------------------------------------------------------ partial credit


@pytest.mark.parametrize(
    ("parsed", "answer", "credit"),
    [
        ("3:10", "3:10", 1.0),
        ("03:10.", "3:10", 1.0),
        ("4:15", "3:10", 0.775),  # (1 - 1/5 + 1 - 5/20) / 2
        ("1:05", "12:55", 0.65),  # an hour and ten minutes round the twelve: (0.8 + 0.5) / 2
        ("11:00", "1:30", 0.3),  # two hours: 0.6; thirty minutes: 0
        ("6:10", "3:10", 0.5),  # three hours: 0
        ("3:21", "3:10", 0.5),  # eleven minutes: 0
        ("9:40", "3:10", 0.0),
        ("2:59", "3:00", 0.875),  # the hours' own distance, not that of the hands: (0.8 + 0.95) / 2
        ("15:10", "3:10", 0.0),  # the puzzle asks for the 12-hour clock
        ("0:10", "12:10", 0.0),
        ("3:1", "3:10", 0.0),
        ("3", "3:10", 0.0),
        ("3:10", "3", 0.0),
        ("14:05", "14:10", 0.0),
        ("", "3:10", 0.0),
    ],
)
def test_a_time_earns_by_its_hour_and_its_minute(parsed, answer, credit):
    assert partial_credit(parsed, answer) == pytest.approx(credit)


@pytest.mark.parametrize(
    ("parsed", "answer", "credit"),
    [
        ("5", "5", 1.0),
        ("6", "5", 1 / 2),
        ("4", "5", 1 / 2),
        ("$7$", "5", 1 / 3),
        ("4.5", "5", 2 / 3),
        ("10", "5", 1 / 6),
        ("10.5", "5", 0.0),
        ("1,001", "1000", 1 / 2),
        ("-2", "2", 1 / 5),
        ("9" * 400, "5", 0.0),
        ("five", "5", 0.0),
        ("5 or 6", "5", 0.0),
        ("Yes", "No", 0.0),
        ("", "5", 0.0),
    ],
)
def test_a_number_earns_by_its_distance(parsed, answer, credit):
    assert partial_credit(parsed, answer) == pytest.approx(credit)


TIMES = st.tuples(st.integers(1, 12), st.integers(0, 59))


@given(TIMES, TIMES)
def test_the_credit_of_a_time_is_that_of_walking_round_the_dial(first, second):
    def steps(start, end, circle):
        return min(next(k for k in count() if (start + way * k - end) % circle == 0) for way in (1, -1))

    h, m = steps(first[0], second[0], 12), steps(first[1], second[1], 60)
    expected = ({0: 1.0, 1: 0.8, 2: 0.6}.get(h, 0.0) + max(0.0, 1 - m / 20) * (m <= 10)) / 2
    written = [f"{hour}:{minute:02}" for hour, minute in (first, second)]
    assert partial_credit(*written) == partial_credit(*reversed(written)) == pytest.approx(expected)


def test_the_puzzles_clocks_are_read_and_only_the_right_time_earns_everything():
    answers = [puzzle.answer for puzzle in draw_puzzles("clock", "train", 100, seed=0)]
    for answer in answers:
        credits = {other: partial_credit(other, answer) for other in answers}
        assert [other for other, credit in credits.items() if credit == 1] == [answer]
    assert 0.1 < sum(partial_credit(answers[0], other) for other in answers) / 100 < 0.6


def test_a_right_answer_that_is_no_plain_number_earns_everything():
    assert earned("continuous", "<answer>\\frac{1}{2}</answer>", "0.5").components["answer"] == 1.0
    assert earned("continuous", "<answer>yes</answer>", "Yes").components["answer"] == 1.0


# ------------------------------------------------------------------------------------------------------- Vision-SR1


def test_vision_sr1_adds_the_answer_from_the_description_alone():
    sr1 = RewardConfig(design="vision_sr1")
    completion = "<description>Three dots.</description>\n<think>3</think>\n\\boxed{3}"
    assert score(completion, "3", sr1, "<think>3</think>\\boxed{3}").reward == pytest.approx(2.0)
    blind = score(completion, "3", sr1, "\\boxed{4}")
    assert blind == Score(pytest.approx(1.0), 1.0, 1.0, "3", {"blind": 0.0})
    assert score(completion, "3", sr1, None).components["blind"] == 0.0
    assert score(completion, "4", sr1, "\\boxed{4}").reward == pytest.approx(0.1 + 1.0)


@pytest.mark.parametrize(
    ("completion", "formatted"),
    [
        ("<description>a</description><think>b</think>\\boxed{3}", True),
        (" <description>a</description>\n<think>b</think> So \\boxed{3}.", True),
        ("<think>b</think>\\boxed{3}", False),
        ("<think>b</think><description>a</description>\\boxed{3}", False),
        ("<description>a</description><description>a</description><think>b</think>\\boxed{3}", False),
        ("<description>a</description>\\boxed{3}", False),
        ("<description>a<think>b</think>\\boxed{3}", False),
        ("<description>a</description><think>b</think><description>c</description>\\boxed{3}", False),
    ],
)
def test_the_format_of_vision_sr1_is_description_thought_box(completion, formatted):
    assert has_format(completion, "vision_sr1") is formatted


@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "pebr_perception"])  # it takes a sample
@settings(max_examples=30)
@given(
    text=st.text(alphabet="<>/abcdeiklnoprstuvwx{}\\0123456789 .,:-\n", max_size=80), answer=st.integers(0, 99).map(str)
)
def test_nothing_a_model_writes_raises(design, text, answer):
    for completion in (text, f"<think>{text}</think><answer>{text}</answer>", f"<description>{text}</description>"):
        found = score(completion, answer, RewardConfig(design=design), text)
        assert -1 <= found.reward <= 2
        assert found.components.keys() <= DESIGNS[design].keys()
