"""How a rank ends, and where one that is alone listens."""

import subprocess
import sys

import pytest
import torch.distributed as dist
from steps import listening

from vogue import distributed
from vogue.rollout.engine import EngineError
from vogue.run.stacks import LostRank


def test_a_rank_that_is_alone_listens_for_nobody_but_this_machine():
    distributed.start()
    assert distributed.gather({"of": "this rank"}) == [{"of": "this rank"}]
    assert all(address.is_loopback for address in listening())


def test_a_rank_that_has_failed_is_gone_though_an_exit_function_waits_for_ever():
    script = "import atexit, time; atexit.register(time.sleep, 600); from vogue import distributed; "
    script += "distributed.PATIENCE = 0.5; distributed.leave(3)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 3


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_leaves_with_its_exit_code_after_all_that_is_registered_for_the_exit(code):
    script = f"import atexit; atexit.register(print, 'done'); from vogue.distributed import leave; leave({code})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "done\n")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError("[gloo] Connection closed by peer"), LostRank),
        (dist.DistBackendError("NCCL communicator was aborted: timed out"), LostRank),
        (EngineError("no server is left: timed out"), EngineError),  # whose sentence it is to tell
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_only_what_the_ranks_back_ends_raise_is_the_loss_of_a_rank(monkeypatch, error, found):
    monkeypatch.setattr("vogue.run.launch.ranks", lambda: 2)
    with pytest.raises(found) as raised, distributed.heeding_losses():
        raise error
    assert type(raised.value) is found and str(error) in str(raised.value)
