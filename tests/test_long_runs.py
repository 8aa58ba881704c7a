"""A run of many steps holds no more at its end than after its first hundred steps."""

import os
import sys
from pathlib import Path

import pytest
from ranks import environment

pytestmark = pytest.mark.long

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_threads_files_and_processes_stay_as_they_are(monkeypatch, tmp_path, capsys, ranks):
    monkeypatch.syspath_prepend(BENCH)
    for name in os.environ.keys() - environment().keys():  # the run is one of its own
        monkeypatch.delenv(name)
    for name in ("long_run", "contestants", "turns"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import long_run

    found = long_run.main(["--steps", "400", "--ranks", str(ranks)])
    change = {name: after - before for name, (before, after) in long_run.growth(found).items()}
    assert change["threads"] <= 0
    assert change["files"] <= 0
    assert change["processes"] <= 0
    assert change["shm_mb"] < 1
    assert change["memory_mb"] < 15 * ranks  # of some 1,000 a rank
