"""What a step measures."""

from vogue.metrics import Clock


def test_what_a_phase_waits_for_other_ranks_is_in_wait_and_not_in_the_phase(monkeypatch):
    times = iter((10.0, 11.0, 14.0, 20.0, 30.0, 31.5))
    monkeypatch.setattr("vogue.metrics.time.perf_counter", lambda: next(times))
    clock = Clock()
    with clock("pack"), clock.waiting():  # from 10 to 20, of which from 11 to 14 it waits
        pass
    with clock("pack"):
        pass
    assert clock.seconds == {"wait": 3.0, "pack": 7.0 + 1.5}
