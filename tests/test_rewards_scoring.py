"""The blind re-answer on the real engine: what the policy is asked, and what that is worth."""

import re

import pytest
from steps import group_of

from vogue.data.prompts import SYSTEM_PROMPT
from vogue.rewards.scoring import blind_answers, score_groups
from vogue.rollout.engine import Completion
from vogue.rollout.hf import HfEngine
from vogue.rollout.sampling import Sampling

SAMPLING = Sampling(12, 1.0)  # as the settings of the tests are
DESIGN = ("reward.design=vision_sr1", "data.max_prompt_tokens=400")
DESCRIBED = "<description>Digits: 4, 7.</description><think>a</think>\\boxed{11}"


class Recorder(HfEngine):
    """The real engine, which remembers what it was asked."""

    def generate(self, requests, n, sampling):
        self.asked = [*getattr(self, "asked", []), *requests]
        self.calls = getattr(self, "calls", 0) + 1
        return super().generate(requests, n, sampling)


@pytest.fixture
def engine(config, processor):
    return Recorder(config(*DESIGN), processor)


def test_the_policy_is_asked_again_with_its_description_in_the_images_place(
    engine, config, processor, preprocessor, samples
):
    (answer,) = blind_answers(engine, preprocessor, config(*DESIGN), [DESCRIBED], samples[:1], [1], SAMPLING)
    (request,) = engine.asked
    text = processor.tokenizer.decode(request.prompt.token_ids)
    question = samples[0].problem.replace("<image>", "")
    assert request.view.images == ()
    assert processor.image_token not in text
    assert SYSTEM_PROMPT in text
    assert "Digits: 4, 7.\n\n" + question in text
    assert "\\boxed{11}" not in text
    assert answer == engine.generate([request], 1, SAMPLING)[0][0].text


def test_an_answer_depends_on_its_seed_and_not_on_its_company(engine, config, preprocessor, samples):
    def answers(seeds):
        return blind_answers(
            engine, preprocessor, config(*DESIGN), [DESCRIBED] * len(seeds), samples[: len(seeds)], seeds, SAMPLING
        )

    assert answers([1, 2, 3])[:1] == answers([1])
    assert len({*answers([1]), *answers([2]), *answers([3]), *answers([4]), *answers([5])}) > 1


def test_answers_are_sampled_at_the_temperature_that_is_given(engine, config, preprocessor, samples):
    # At 0.001 the likeliest token has all the probability, so that seeds make no difference.
    found = {
        temperature: blind_answers(
            engine,
            preprocessor,
            config(*DESIGN),
            [DESCRIBED] * 5,
            samples[:1] * 5,
            range(1, 6),
            Sampling(12, temperature),
        )
        for temperature in (1.0, 0.001)
    }
    assert len(set(found[1.0])) > 1 == len(set(found[0.001]))


def test_without_a_description_that_can_be_read_nothing_is_asked(engine, config, preprocessor, samples):
    unreadable = [
        "<think>a</think>\\boxed{3}",
        "<description> </description>\\boxed{3}",
        f"<description>{'word ' * 500}</description>",  # longer than data.max_prompt_tokens
    ]
    asked = [*unreadable, DESCRIBED, "<description>See <|image_pad|>.</description>"]  # a special token's text is text
    answers = blind_answers(engine, preprocessor, config(*DESIGN), asked, samples[:1] * 5, range(5), SAMPLING)
    assert answers[:3] == [None] * 3
    assert None not in answers[3:]
    assert len(engine.asked) == 2
    assert blind_answers(engine, preprocessor, config(*DESIGN), asked[:1], samples[:1], [0], SAMPLING) == [None]
    # For nothing too: of ranks that share an engine another one may have something to ask.
    assert (engine.calls, len(engine.asked)) == (2, 2)


def group(*texts):
    return tuple(Completion((1,), (0.0,), text, True) for text in texts)


class Reader(HfEngine):
    """A policy that can read, as the model of the tests can't: it answers what the prompt says after "It says"."""

    def generate(self, requests, n, sampling):
        texts = [self.tokenizer.decode(request.prompt.token_ids) for request in requests]
        return [group(f"\\boxed{{{re.search('It says (.*?)[.]', text)[1]}}}") * n for text in texts]


def test_a_right_answer_from_the_description_adds_its_weight(config, processor, preprocessor, samples):
    def completion(described, answered):
        return f"<description>It says {described}.</description><think>a</think>\\boxed{{{answered}}}"

    settings = config(*DESIGN, "reward.weights.blind=0.5")
    first, second = samples[0].answer, samples[1].answer
    groups = [
        group(completion(first, first), completion(first, 99), completion(99, first), completion(99, 99), "no"),
        group(completion(first, second), completion(second, second)),
    ]
    assert first != second
    engine = Reader(settings, processor)
    found = score_groups(engine, preprocessor, settings, samples[:2], groups, [(0, 1), (0, 2)], SAMPLING)
    assert [[score.reward for score in scores] for scores in found] == [
        pytest.approx([1.5, 0.6, 1.0, 0.1, 0.0]),
        pytest.approx([1.0, 1.5]),
    ]
    assert [score.components["blind"] for score in found[0]] == [1, 1, 0, 0, 0]
    assert score_groups(engine, preprocessor, settings, samples[1:2], groups[1:], [(0, 2)], SAMPLING) == found[1:]


def test_each_description_of_a_group_is_answered_by_a_draw_of_its_own(config, preprocessor, processor, samples):
    class Asked(Reader):
        seeds = ()

        def generate(self, requests, n, sampling):
            self.seeds += tuple(request.seed for request in requests)
            return super().generate(requests, n, sampling)

    settings = config(*DESIGN, "reward.weights.blind=0.5")
    engine = Asked(settings, processor)
    described = "<description>It says 3.</description><think>a</think>\\boxed{3}"
    groups = [group(described, described, described), group(described, described)]
    score_groups(engine, preprocessor, settings, samples[:2], groups, [(0, 1), (1, 1)], SAMPLING)
    assert len(engine.seeds) == len(set(engine.seeds)) == 5


def test_a_design_that_doesnt_weigh_it_asks_nothing(engine, config, preprocessor, samples):
    for overrides in ((), ("reward.design=mixture",), ("reward.design=vision_sr1", "reward.weights.blind=0")):
        score_groups(
            engine, preprocessor, config(DESIGN[1], *overrides), samples[:1], [group(DESCRIBED)], [(0,)], SAMPLING
        )
    assert not hasattr(engine, "asked")


def test_a_step_measures_the_components_of_its_design(new_trainer):
    trainer = new_trainer("reward.design=vision_sr1", "rollout.prompts=2", "data.max_prompt_tokens=400")
    metrics, groups = trainer.run_step()
    assert metrics["reward/blind"] == 0.0  # the model describes nothing
    assert {name for name in metrics if name.startswith("reward/")} == {"reward/blind"}
    judged = trainer.judge([group_of(groups[0].item, group(DESCRIBED, "no"))])
    assert judged[0].scores[0].format == 1.0
    assert judged[0].advantages[0] == pytest.approx(0.7071, abs=1e-4)  # more than the other, whatever it answers


def test_a_step_is_trained_on_the_users_own_reward(new_trainer, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def own(completions, samples):\n"
        "    return [10 * len(completions) + ord(text[-2]) for text in completions]"  # 8 of a step; the digit
    )
    trainer = new_trainer(f"reward.function={tmp_path}/rewards.py:own")
    metrics, groups = trainer.run_step()
    for item in groups:
        for completion, found in zip(item.completions, item.scores):
            assert found.reward == 80 + ord(completion.text[-2])
    rewards = [found.reward for item in groups for found in item.scores]
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
