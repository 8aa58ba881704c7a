import logging
import threading
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vogue.answer_extraction import boxed
from vogue.config.sections import RewardConfig
from vogue.data import Sample
from vogue.rewards import Score, score, score_batch, verifier
from vogue.rewards.correctness import is_correct
from vogue.rewards.equality import Verifier
from vogue.rewards.format import is_formatted
from vogue.rewards.worker import Worker

HOSTILE = "9^{9^{9^9}}"


def asked(*answers):
    return [Sample("Which?", answer, ()) for answer in answers]


def test_the_reward_is_nine_parts_accuracy_and_one_part_format():
    assert score("<think>3 + 5</think>\\boxed{8}", "8") == Score(1.0, 1.0, 1.0, "8")
    assert score("<think>3 + 5</think>\\boxed{9}", "8") == Score(0.1, 0.0, 1.0, "9")
    assert score("It is \\boxed{8}", "8") == Score(0.9, 1.0, 0.0, "8")
    assert score("It is 8", "8") == Score(0.0, 0.0, 0.0, None)
    assert (
        score("<think>3 + 5</think>\\boxed{9}", "8", RewardConfig(weights={"accuracy": 0.5, "format": 0.5})).reward
        == 0.5
    )


@pytest.mark.parametrize(
    ("completion", "formatted"),
    [
        ("<think>a</think>\\boxed{8}", True),
        (" \n<think>a\nb</think>\n\nSo the answer is \\boxed{8}.\n", True),
        ("<think></think>\\boxed{\\frac{1}{2}}", True),
        ("<think>a</think>\\boxed{>}", True),
        ("<think>a</think>\\boxed{}", False),
        ("<think>a</think>\\boxed{ }", False),
        ("<think>a</think>\\boxed{?}", False),
        ("<think>a</think>\\boxed{\\text{}}", False),
        ("<think>a</think>\\boxed{\\ldots}", False),
        ("<think>a</think>\\boxed{\u200b}", False),
        ("<think>a</think>\\boxed{8} \\boxed{ ... }", False),
        ("Well, <think>a</think>\\boxed{8}", False),
        ("<think>a \\boxed{8}</think>", False),
        ("<think>a</think> 8", False),
        ("<think>a</think>\\boxed{8", False),
        ("<think>a \\boxed{8}", False),
        ("a</think>\\boxed{8}", False),
        ("<think>a</think><think>b</think>\\boxed{8}", False),
        ("<think>a<think>b</think>\\boxed{8}", False),
        ("", False),
    ],
)
def test_format_needs_one_thought_then_a_box(completion, formatted):
    assert is_formatted(completion) is formatted


@pytest.mark.parametrize(
    ("completion", "content"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} and more}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("} { \\boxed {8}", "8"),
        ("\\boxed{}", ""),
        ("<think>\\boxed{5}</think> \\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{x \\in \\left(0, 1\\right\\}}", "x \\in \\left(0, 1\\right\\}"),
        ("\\boxed{\\{1, 2\\}} and \\{", "\\{1, 2\\}"),
        ("a \\\\boxed{1} \\\\\\boxed{2}", "2"),
        ("\\boxed 8", None),
        ("\\boxed{8", None),
    ],
)
def test_the_last_closed_box_is_the_answer(completion, content):
    assert boxed(completion) == content


def test_plain_answers_start_no_process():
    verifier.close()
    completions = ["\\boxed{8}", "\\boxed{B}", "\\boxed{3:05}", "\\boxed{no}", "no box"]
    score_batch(completions, asked("9", "A", "4:05", "yes", "8"))
    assert not verifier._workers


def test_a_batch_is_scored_in_order_and_unequal_lengths_are_refused():
    assert [s.accuracy for s in score_batch(["\\boxed{1}", "\\boxed{2}"], asked("1", "1"))] == [1.0, 0.0]
    with pytest.raises(ValueError, match="zip"):
        score_batch(["\\boxed{1}"], asked("1", "1"))


def test_a_hostile_answer_scores_nothing_is_counted_and_stops_in_time(caplog):
    quick = Verifier(cpu_seconds=0.5)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert quick.equal("5", HOSTILE) is False
        assert quick.equal("5", "(10^9)!") is False
    assert time.monotonic() - began < 60
    assert quick.failures == 2
    assert HOSTILE in caplog.text
    assert quick.equal("0.5", "\\frac{1}{2}") is True  # a new worker answers
    quick.close()


def test_equal_pairs_are_asked_once_and_hostile_ones_are_counted_once():
    verifier.take_failures()
    began = time.monotonic()
    scores = score_batch([f"\\boxed{{{HOSTILE}}}"] * 64 + ["\\boxed{1+x}"] * 8, asked(*["5"] * 64, *["x+1"] * 8))
    assert time.monotonic() - began < 20
    assert [score.accuracy for score in scores] == [0.0] * 64 + [1.0] * 8
    assert (verifier.take_failures(), verifier.take_failures()) == (1, 0)


def test_hostile_answers_take_no_time_from_others_and_not_more_than_all_may_take():
    bounded = Verifier(cpu_seconds=0.5, seconds=1.0)
    hostile = [(f"9^{{9^{{9^{number}}}}}", "5") for number in range(100, 140)]
    honest = [(f"{number}x + 1", f"1 + {number}x") for number in range(40)]
    began = time.monotonic()
    found = bounded.equal_all([*hostile, *honest])
    assert time.monotonic() - began < 40
    assert [found[pair] for pair in honest] == [True] * 40
    assert not any(found[pair] for pair in hostile)
    assert bounded.failures == 40
    bounded.close()


def test_what_ends_a_worker_from_outside_is_no_fault_of_the_answer():
    fresh = Verifier()
    assert fresh.equal("x+1", "1+x")
    worker = psutil.Process(fresh._workers[0]._process.pid)
    worker.children()[0].kill()
    assert fresh.equal("x+2", "2+x")
    worker.kill()
    assert fresh.equal("x+3", "3+x")
    assert fresh.failures == 0
    fresh.close()


def test_the_limit_works_outside_the_main_thread():
    quick, replies = Verifier(cpu_seconds=0.5), []
    thread = threading.Thread(target=lambda: replies.append(quick.equal("5", HOSTILE)))
    thread.start()
    thread.join(timeout=60)
    assert replies == [False]
    assert quick.failures == 1
    quick.close()


def test_the_process_that_compares_mathematics_may_take_4_gb():
    worker = Worker("equality_worker.py", "3.0")
    try:
        assert worker.ask(["x/2", "0.5x"])["equal"] is True
        assert psutil.Process(worker._process.pid).rlimit(psutil.RLIMIT_AS) == (4 << 30, 4 << 30)
    finally:
        worker.stop()


def test_a_closed_verifier_has_no_process_and_starts_again():
    fresh = Verifier()
    assert fresh.equal("x+1", "1+x")
    process = fresh._workers[0]._process
    fresh.close()
    fresh.close()
    assert process.poll() is not None
    assert fresh.equal("x+1", "1+x")
    fresh.close()


def test_a_worker_that_cannot_start_is_an_error_and_not_a_score(monkeypatch):
    monkeypatch.setattr("vogue.rewards.worker.sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="math-verify worker does not start"):
        Verifier().equal("x+1", "1+x")


@settings(max_examples=50)
@given(st.text(alphabet="<think></think>\\boxed{}0123456789 .,:-", max_size=60), st.integers(0, 99).map(str))
def test_nothing_a_model_writes_raises(completion, answer):
    result = score(completion, answer)
    assert 0 <= result.reward <= 1


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_equals_itself_with_separators_and_zeros(value):
    assert is_correct(f"{value:,f}00", f"{value:f}")
    assert not is_correct(f"{value + 1:f}", f"{value:f}")
