"""One arena for all of the suite, and its table at the end."""

import os

import pytest
from arena import SETTINGS, Arena

ARENAS = []
# Alternating rewards, from a process of the user's own function: every group differs, and there is a worker to kill.
REWARD = "def own(completions, samples):\n    return [float(i % 2) for i in range(len(completions))]\n"


@pytest.fixture(scope="session")
def arena(model_folder, digits_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "rewards.py").write_text(REWARD)
    data = [f"data.{split}={digits_folder}/{split}.parquet" for split in ("train", "test")]
    settings = [f"model.path={model_folder}", *data, f"reward.function={folder}/rewards.py:own", *SETTINGS]
    ARENAS.append(Arena(folder, settings))
    yield ARENAS[-1]
    ARENAS[-1].end()


@pytest.fixture
def minutes():
    """Of the whole suite."""
    return float(os.environ.get("CHAOS_MINUTES", "60"))


def pytest_terminal_summary(terminalreporter):
    for arena in ARENAS:
        terminalreporter.section("chaos")
        terminalreporter.line(f"{'':18}{'tried':>8}{'disturbed':>11}{'survived':>10}{'equal':>8}{'slowest end':>13}")
        for kind, found in arena.outcomes.items():
            disturbed, equal = sum(one.disturbed for one in found), sum(one.equal for one in found)
            survived = sum(one.survived for one in found)
            slowest = max(one.seconds for one in found)
            numbers = f"{len(found):8}{disturbed:11}{survived:10}{equal:8}{slowest:11.0f} s"
            terminalreporter.line(f"{kind:18}{numbers}")
