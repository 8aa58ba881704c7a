import pytest
from PIL import Image

from vogue.data import DataError, Sample
from vogue.data.prompts import SYSTEM_PROMPT, chat_messages, with_view
from vogue.rewards import score

RED = Image.new("RGB", (4, 3), (255, 0, 0))
IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


def user_content(problem, images):
    (message,) = chat_messages(Sample(problem, "3", (RED,) * images), system_prompt="")
    assert message["role"] == "user"
    return message["content"]


def test_images_stand_where_their_placeholders_stood():
    assert user_content("<image>How many?", 1) == [IMAGE, text("How many?")]
    assert user_content("Compare <image> with <image>.", 2) == [
        text("Compare "),
        IMAGE,
        text(" with "),
        IMAGE,
        text("."),
    ]
    assert user_content("How many in <image>", 1) == [text("How many in "), IMAGE]


def test_without_placeholders_the_images_come_first():
    assert user_content("How many?", 2) == [IMAGE, IMAGE, text("How many?")]
    assert user_content("How many?", 0) == [text("How many?")]


def test_the_system_prompt_comes_first_and_can_be_left_out():
    sample = Sample("<image>How many?", "3", (RED,))
    system, user = chat_messages(sample)
    assert system == {"role": "system", "content": [text(SYSTEM_PROMPT)]}
    assert [user] == chat_messages(sample, system_prompt="")


def test_the_default_system_prompt_asks_for_what_the_reward_checks():
    assert "<think></think>" in SYSTEM_PROMPT
    assert "\\boxed{}" in SYSTEM_PROMPT
    assert score("<think>I see three.</think>\\boxed{3}", "3").format == 1.0


def viewed(view, problem, images=1):
    sample = with_view(Sample(problem, "3", (RED,) * images, state="Three dots"), view)
    (message,) = chat_messages(sample, system_prompt="")
    return message["content"]


def test_the_state_is_printed_in_the_place_of_the_image_or_behind_it():
    assert viewed("image", "<image>How many?") == [IMAGE, text("How many?")]
    assert viewed("text", "<image>How many?") == [text("Three dots\n\nHow many?")]
    assert viewed("both", "<image>How many?") == [IMAGE, text("Three dots\n\nHow many?")]
    assert viewed("text", "See <image> How many?") == [text("See Three dots\n\n How many?")]


def test_the_state_of_images_without_placeholders_comes_first():
    assert viewed("text", "How many?", images=2) == [text("Three dots\n\nHow many?")]
    assert viewed("both", "How many?", images=2) == [IMAGE, IMAGE, text("Three dots\n\nHow many?")]


def test_several_images_have_one_state():
    problem = "Compare <image> with <image>."
    assert viewed("text", problem, images=2) == [text("Compare  with Three dots\n\n.")]
    assert viewed("both", problem, images=2) == [
        text("Compare "),
        IMAGE,
        text(" with "),
        IMAGE,
        text("Three dots\n\n."),
    ]


def test_only_a_state_can_be_printed_and_only_in_a_known_view():
    sample = Sample("<image>How many?", "3", (RED,), place="test.parquet, row 4")
    assert with_view(sample, "image") == sample
    with pytest.raises(DataError, match=r"test\.parquet, row 4: view 'text' needs a 'state', all that the images show"):
        with_view(sample, "text")
    with pytest.raises(DataError, match="view is 'words'; it must be one of image, noisy, text, both"):
        with_view(sample, "words")
