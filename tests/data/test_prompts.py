from PIL import Image

from vogue.data import Sample
from vogue.data.prompts import SYSTEM_PROMPT, chat_messages
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
