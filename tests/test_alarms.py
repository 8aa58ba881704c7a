"""Alarms, each on a series made by hand: when it begins, when it ends, and what doesn't set it off."""

import pytest

from vogue.run import alarms

NORMAL = {"differing_share": 0.5, "entropy": 1.0, "mismatch/kl": 1e-4, "finished": 0.9, "skipped_updates": 0.0}
NORMAL |= {"memory_gb": 70.0, "memory_gb_limit": 80.0, "time/rollout": 3.0, "time/train": 1.0}


def rows(*stretches):
    """Metrics of (count, what is other than normal) one after the other."""
    found = [NORMAL | other for count, other in stretches for _ in range(count)]
    return [row | {"step": step} for step, row in enumerate(found)]


def spans(found):
    return [(alarm.name, alarm.first, alarm.last, alarm.on) for alarm in found]


def test_a_healthy_run_has_no_alarm(config):
    assert alarms.alarms(rows((100, {})), config()) == []
    assert alarms.alarms([], config()) == []
    assert alarms.alarms([{"step": step, "reward": 0.5} for step in range(50)], config()) == []  # of an older run


def test_nothing_to_learn_is_ten_steps_without_a_group_that_differs(config):
    why = {"differing_share": 0.0, "alike_share": 0.0, "accuracy": 1.0, "answered": 1.0, "format": 1.0, "reward": 1.0}
    assert alarms.nothing_to_learn(rows((5, {}), (9, why), (5, {}), (9, why)), config()) == []
    found = alarms.nothing_to_learn(rows((5, {}), (12, why), (3, {}), (10, why)), config())
    assert spans(found) == [("nothing to learn", 5, 16, False), ("nothing to learn", 20, 29, True)]
    assert found[0].text == (
        "no group has completions with different rewards: "
        "every answer is right: the samples are too easy for this model"
    )


def test_entropy_has_collapsed_where_a_tenth_of_its_beginning_is_left():
    # The mean of ten steps is below 0.1 from the second step of nothing on: (8 * 0.12 + 2 * 0) / 10 = 0.096.
    found = alarms.entropy_collapse(rows((10, {}), (20, {"entropy": 0.12}), (5, {"entropy": 0.0}), (10, {})))
    assert spans(found) == [("entropy collapse", 31, 34, False)]
    assert found[0].text == "0.06 nats a token, 1 in the first 10 steps"
    assert alarms.entropy_collapse(rows((10, {}), (9, {"entropy": 0.0}))) == []  # too short to tell


def test_steps_without_a_known_value_neither_set_off_nor_end_an_alarm():
    unknown = {"entropy": float("nan")}
    found = alarms.entropy_collapse(rows((10, {}), (10, {"entropy": 0.01}), (5, unknown), (10, {"entropy": 0.01})))
    assert spans(found) == [("entropy collapse", 19, 34, True)]


def test_trainer_and_engine_disagree_where_the_mean_kl_of_ten_steps_is_above_two_hundredths():
    found = alarms.engine_mismatch(rows((10, {}), (10, {"mismatch/kl": 0.03})))
    # 7 steps of 0.03 in the window of ten: 0.021 + 3e-5 is above 0.02; 6 aren't.
    assert spans(found) == [("engine mismatch", 16, 19, True)]
    assert found[0].text == "KL of trainer and engine 0.03 nats a token, more than 0.02"
    assert alarms.engine_mismatch(rows((20, {}), (1, {"mismatch/kl": 0.19}), (20, {}))) == []  # one step isn't many


def test_completions_are_cut_off_where_most_end_at_the_limit(config):
    found = alarms.cut_off(rows((10, {"finished": 0.5}), (10, {"finished": 0.25})), config())
    assert spans(found) == [("cut off", 10, 19, True)]
    assert found[0].text == "75% of the completions were cut off at rollout.max_tokens=12"


def test_every_skipped_update_is_told():
    found = alarms.skipped_updates(rows((3, {}), (2, {"skipped_updates": 0.5}), (1, {}), (1, {"skipped_updates": 1.0})))
    assert spans(found) == [("skipped updates", 3, 4, False), ("skipped updates", 6, 6, True)]
    assert found[1].text == "100% of the step's updates had no finite gradient and weren't applied"


def test_memory_is_near_its_limit_above_92_percent_of_it():
    assert alarms.memory_near_limit(rows((5, {"memory_gb": 73.5}))) == []
    found = alarms.memory_near_limit(rows((5, {}), (2, {"memory_gb": 74.0})))
    assert spans(found) == [("memory", 5, 6, True)]
    assert found[0].text == "74.0 GB at the peak, of 80.0 GB"


@pytest.mark.parametrize(("seconds", "silent", "told"), [(4, 60, None), (4, 61, "nothing for 1 min; a step takes 4 s")])
def test_a_run_is_late_after_ten_steps_time_and_a_minute_at_least(seconds, silent, told):
    found = alarms.stalled(rows((9, {"time/train": seconds - 3.0})), silent)
    assert (found.text if found else None) == told


def test_a_slow_step_has_its_time():
    slow = rows((9, {"time/rollout": 250.0, "time/train": 50.0}))
    assert alarms.stalled(slow, 3000.0) is None
    late = alarms.stalled(slow, 11_100.0)
    assert late is not None
    assert (late.first, late.text) == (8, "nothing for 3 h 05 min; a step takes 5 min")
    assert alarms.stalled([], 1e6) is None  # before the first step nobody knows what one takes


def test_alarms_that_are_on_come_first_and_then_the_latest(config):
    found = alarms.alarms(
        rows((2, {}), (1, {"skipped_updates": 1.0}), (20, {"finished": 0.0}), (20, {}), (2, {"skipped_updates": 1.0})),
        config(),
    )
    assert [(alarm.name, alarm.on) for alarm in found] == [
        *(("skipped updates", True), ("cut off", False), ("skipped updates", False))
    ]
