"""What ranks send each other, how one ends, and where one that is alone listens."""

import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from steps import listening

from vogue import distributed
from vogue.data import DataError
from vogue.data.dataset import OverlongError
from vogue.model.packing import Place
from vogue.rollout.engine import Completion, EngineError
from vogue.run.stacks import LostRank


def test_a_rank_that_is_alone_listens_for_nobody_but_this_machine():
    distributed.start()
    assert distributed.gather({"of": "this rank"}) == [{"of": "this rank"}]
    assert all(address.is_loopback for address in listening())


class Hostile:
    """An object that makes a file when it is read from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_ranks_send_each_other_is_read_as_the_classes_that_are_named_and_nothing_of_it_runs(tmp_path):
    distributed.start()
    with pytest.raises(pickle.UnpicklingError):
        distributed.gather([Hostile(tmp_path / "made")], Place)
    assert not (tmp_path / "made").exists()
    with pytest.raises(pickle.UnpicklingError, match=r"Completion"):
        distributed.gather(Completion((1,), (-0.5,), "", True), Place)


def test_what_ranks_send_each_other_comes_as_it_was():
    distributed.start()
    completions = (Completion((5, 2**40), (-0.1, -1e-300), "ä", True), Completion((), (), "", False))
    sent = {Place(0, 1): completions, "plain": [2**70, b"\0", {1}, None, 0.1], "tensor": torch.tensor([1.5, 2.5])}
    (got,) = distributed.gather(sent, Place, Completion)
    assert torch.equal(got.pop("tensor"), sent.pop("tensor"))
    assert got == sent
    (one,) = (place for place in got if place != "plain")
    assert type(one) is Place and {type(x) for c in got[one] for x in c.token_ids + c.logprobs} == {int, float}


def test_what_one_rank_meets_all_raise_as_the_kind_that_is_waited_for():
    distributed.start()
    with pytest.raises(DataError, match=r"^row 3: too long$") as raised, distributed.together(EngineError, DataError):
        raise OverlongError("row 3: too long")
    assert type(raised.value) is DataError
    with pytest.raises(KeyError), distributed.together(EngineError):
        raise KeyError("none of them")


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
