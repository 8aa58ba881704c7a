"""Training goes on with any number of ranks and any stage of ZeRO, with the bits of what was saved."""

import json
import re
from pathlib import Path

import pytest
import torch
from ranks import launch
from reshard import engine_of, read, skips, write

from vogue.model import optimizer_state
from vogue.settings import ConfigError

SCRIPT = Path(__file__).with_name("reshard.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resharding")


def assert_goes_on(folder, setup, ranks, name):
    """What was resumed is what was saved, and the update after it the one that would have come."""
    near = {"rtol": 2**-7, "atol": 1e-3} if "bfloat16" in setup else {"rtol": 1e-4, "atol": 1e-6}  # of gradients' sums
    saved, resumed = torch.load(folder / f"{name}.pt"), torch.load(folder / f"{setup}-{ranks}={name}.pt")
    same = saved["before"].keys() & resumed["before"].keys()
    assert {"steps", "rate", "skipped", "all", "first", "frozen"} <= same
    assert saved["before"]["skipped"] == skips(name) and saved["before"]["all"] == 2 + skips(name)
    for key in same:
        here, there = resumed["before"][key], saved["before"][key]
        assert torch.equal(here, there) if isinstance(here, torch.Tensor) else here == there, key
        here, there = resumed["after"][key], saved["after"][key]
        if isinstance(here, torch.Tensor):
            torch.testing.assert_close(here, there, **near)
        else:
            assert here == there, key


def test_two_ranks_and_one_go_on_from_one_another_with_other_stages(folder):
    own = ["3-bfloat16", "1-bfloat16", "1-float32"]
    for setup in own:
        write(folder, setup)
    others = [
        "3-bfloat16=3-bfloat16-1",
        "3-bfloat16=1-bfloat16-1",
        "1-bfloat16=3-bfloat16-1",
        "2-bfloat16=3-bfloat16-2",
    ]
    launch(2, SCRIPT, folder, *own, *others)
    alone = ["3-bfloat16=3-bfloat16-2", "3-bfloat16=1-bfloat16-2", "1-bfloat16=3-bfloat16-2", "3-float32=1-float32-2"]
    for pair in alone:
        read(folder, *pair.split("="))
    for ranks, pairs in ((2, others), (1, alone)):
        for pair in pairs:
            setup, name = pair.split("=")
            assert_goes_on(folder, setup, ranks, name)


REFUSED = {
    "trained other weights: first": lambda weights: weights.update(other=weights.pop("first")),
    "second is [9] there, here [5]": lambda weights: weights["second"].update(shape=[9]),
    "parts are missing of third": lambda weights: weights["third"]["places"][0].__setitem__(1, 60),
    "stage 0, which has updated some weights more often": lambda weights: weights["one"].update(updates=1),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_does_not_fit_the_weights_that_are_trained_is_refused(told, tmp_path):
    write(tmp_path, "1-float32")
    index = tmp_path / "1-float32-1" / optimizer_state.INDEX
    content = json.loads(index.read_text())
    REFUSED[told](content["weights"])
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"^--resume: {index.parent}.*{re.escape(told)}"):
        optimizer_state.read(engine_of("1-float32"), index.parent)


SETUPS = ("0-float32", "0-bfloat16", "1-float32", "1-bfloat16", "2-float32", "2-bfloat16", "3-float32", "3-bfloat16")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [3, 4])
def test_every_stage_goes_on_from_every_other_on_any_number_of_ranks(folder, ranks):
    launch(2, SCRIPT, folder, *SETUPS)
    pairs = [(to, f"{of}-2") for of in SETUPS for to in SETUPS if of.split("-")[1] == to.split("-")[1]]
    launch(ranks, SCRIPT, folder, *(f"{to}={name}" for to, name in pairs))
    for to, name in pairs:
        assert_goes_on(folder, to, ranks, name)


OFFLOADED = ("1-float32-offload", "2-bfloat16-offload", "3-float32-offload", "3-bfloat16-offload")


@pytest.mark.long  # DeepSpeed compiles its CPUAdam for minutes, once a machine
def test_what_is_offloaded_goes_on_where_it_is_not_and_the_other_way_round(folder):
    others = [setup.removesuffix("-offload") for setup in OFFLOADED]
    for setup in others:
        write(folder, setup)
    pairs = [(to, f"{of}-1") for of, to in zip(others, OFFLOADED, strict=True)]
    pairs += [(of, f"{to}-2") for of, to in zip(others, OFFLOADED, strict=True)]
    launch(2, SCRIPT, folder, *OFFLOADED, *(f"{to}={name}" for to, name in pairs))
    for to, name in pairs:
        assert_goes_on(folder, to, 2, name)
