import logging
import signal
import threading
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vogue.data import Sample
from vogue.rewards import Score, score, score_batch, verifier
from vogue.rewards.equality import Verifier
from vogue.rewards.verifiable import boxed, is_correct, is_formatted
from vogue.rewards.worker import Worker
from vogue.sections import RewardConfig

HOSTILE = "9^{9^{9^9}}"


def asked(*answers):
    return [Sample("Which?", answer, ()) for answer in answers]


def test_the_reward_is_nine_parts_accuracy_and_one_part_format():
    assert score("<think>3 + 5</think>\\boxed{8}", "8") == Score(1.0, 1.0, 1.0, "8")
    assert score("<think>3 + 5</think>\\boxed{9}", "8") == Score(0.1, 0.0, 1.0, "9")
    assert score("It is \\boxed{8}", "8") == Score(0.9, 1.0, 0.0, "8")
    assert score("It is 8", "8") == Score(0.0, 0.0, 0.0, None)
    assert score("<think>3 + 5</think>\\boxed{9}", "8", RewardConfig(accuracy=0.5, format=0.5)).reward == 0.5


@pytest.mark.parametrize(
    ("completion", "formatted"),
    [
        ("<think>a</think>\\boxed{8}", True),
        (" \n<think>a\nb</think>\n\nSo the answer is \\boxed{8}.\n", True),
        ("<think></think>\\boxed{\\frac{1}{2}}", True),
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
        ("\\boxed 8", None),
        ("\\boxed{8", None),
    ],
)
def test_the_last_closed_box_is_the_answer(completion, content):
    assert boxed(completion) == content


@pytest.mark.parametrize(
    ("parsed", "answer"),
    [
        ("8", "8"),
        ("8.0", "8"),
        ("1,000", "1000"),
        ("+3", "3"),
        (".5", "0.50"),
        ("$8$", "8"),
        ("8.", "8"),
        ("a", "A"),
        ("(B)", "B"),
        ("\\text{yes}", "Yes"),
        ("3:05", "03:05"),
        ("1/2", "0.5"),
        ("\\frac{1}{2}", "0.5"),
        ("1\n+ x", "x+1"),
        ("2\\sqrt{3}", "$\\sqrt{12}$"),
        ("30^\\circ", "30"),
        ("5 \\text{ cm}", "5"),
        ("x = 5", "5"),
    ],
)
def test_equal_answers_are_right_however_they_are_written(parsed, answer):
    assert is_correct(parsed, answer)


@pytest.mark.parametrize(
    ("parsed", "answer"),
    [
        ("9", "8"),
        ("-8", "8"),
        ("1,00", "100"),
        ("B", "A"),
        ("on", "no"),  # n·o = o·n
        ("12:15", "4:05"),  # 12/15 = 4/5
        ("4/5", "12:15"),
        ("5, 6, 7", "6"),
        ("5 or 6", "6"),
        ("5$ $6", "6"),
        ("\\pm 5", "5"),
        ("Yes or No", "Yes"),
        ("", "8"),
        ("\\frac{}{", "8"),
        ("\ud800\x00", "8"),
    ],
)
def test_other_answers_are_wrong(parsed, answer):
    assert not is_correct(parsed, answer)


def test_plain_answers_start_no_process():
    verifier.close()
    completions = ["\\boxed{8}", "\\boxed{B}", "\\boxed{3:05}", "\\boxed{no}", "no box"]
    score_batch(completions, asked("9", "A", "4:05", "yes", "8"))
    assert verifier._worker is None


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGSEGV])
def test_a_right_answer_stays_right_where_the_worker_is_killed_from_outside(number):
    asked = Verifier()
    assert asked.equal("0.5", "\\frac{1}{2}")
    worker = asked._worker._process
    worker.send_signal(number)
    worker.wait()
    assert asked.equal("0.5", "\\frac{1}{2}")
    assert asked.failures == 0
    asked.close()


@pytest.mark.parametrize("hostile", [HOSTILE, "10^{10^{10}}"])  # out of CPU time, out of memory
def test_an_answer_that_ends_the_worker_by_itself_is_asked_once(hostile, monkeypatch):
    asked, started = Verifier(cpu_seconds=1.0), []
    monkeypatch.setattr(asked, "_start", lambda start=asked._start: started.append(1) or start())
    assert not asked.equal("5", hostile)
    assert (asked.failures, len(started)) == (1, 1)
    asked.close()


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
        assert worker.ask(["1/2", "0.5"]) is True
        assert psutil.Process(worker._process.pid).rlimit(psutil.RLIMIT_AS) == (4 << 30, 4 << 30)
    finally:
        worker.stop()


def test_a_closed_verifier_has_no_process_and_starts_again():
    fresh = Verifier()
    assert fresh.equal("x+1", "1+x")
    process = fresh._worker._process
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
