"""What a run remembers beside its weights: a stopped and resumed run equals a straight one, on any ranks."""

import json
import pickle
import subprocess

import pytest
import torch
from ranks import launch

from vogue.step.run_state import RunState


def test_the_loader_sees_what_had_happened_when_it_was_settled(tmp_path):
    state = RunState()
    state.current["rates"] = {"a": torch.ones(2)}
    state.settle()
    state.current["rates"]["a"] += 1
    assert state.settled["rates"]["a"].tolist() == [1, 1]
    state.save(tmp_path / "state.pt")
    again = RunState()
    again.load(tmp_path / "state.pt")
    assert again.settled["rates"]["a"].tolist() == [1, 1]
    assert again.current["rates"]["a"].tolist() == [2, 2]


def test_equal_states_have_equal_digests_and_others_differ_where_they_do():
    state, other = RunState(), RunState()
    for one in (state, other):
        one.current = {"seen": torch.arange(6).view(2, 3), "best": {"step": 3, "of": ["a", 1.5]}, "none": None}
        one.settle()
    assert state.digests() == other.digests()
    state.current["best"]["of"][1] = 1.25
    state.settled["seen"][1, 2] += 1
    mine, theirs = state.digests(), other.digests()
    assert {name for name in theirs if mine[name] != theirs[name]} == {"current['best']", "settled['seen']"}


def test_a_file_that_holds_more_than_values_is_refused(tmp_path):
    torch.save({"current": subprocess.Popen, "settled": {}}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        RunState().load(tmp_path / "state.pt")


# A toy user of the state: how often each rank's prompts were solved so far decides which sample comes next.
TOY = """
import sys
from vogue import distributed
from vogue.cli import main
from vogue.distributed import leave
from vogue.step.loader import Loader
from vogue.trainer import Trainer

own_order, own_update = Loader._order, Trainer.update

def order(self, step, number):
    right = self.state.settled.get("right", 0)  # read in the background, while the step before is trained
    return [(index + right) % len(self.samples) for index in own_order(self, step, number)]

def update(self, groups, means, clock):
    right = 0
    for group in groups:
        right += sum(score.reward > 0 for score in group.scores) + len(group.completions[0].token_ids)
    right = sum(distributed.gather(right))
    self.state.current["right"] = self.state.current.get("right", 0) + right
    traces = own_update(self, groups, means, clock)
    means.add("remembered", self.state.current["right"])
    return traces

Loader._order, Trainer.update = order, update
leave(main(["train", *[text for text in sys.argv[1:] if not text.startswith("--local_rank")]]))
"""
CURVES = ("remembered", "reward", "loss", "grad_norm", "entropy", "tokens")


@pytest.fixture(scope="module")
def straight_and_resumed(tmp_path_factory, model_folder, digits_folder):
    """A function: metrics of four steps in one go, and of two and two, each on so many ranks."""
    folder = tmp_path_factory.mktemp("state")
    script = folder / "toy.py"
    script.write_text(TOY)

    def run(ranks, name, *settings):
        given = [
            *(f"model.path={model_folder}", "model.dtype=float32", f"data.train={digits_folder}/train.parquet"),
            *("data.system_prompt=Think.", "data.max_prompt_tokens=128", "rollout.engine=hf", "rollout.prompts=4"),
            *("rollout.n=4", "rollout.max_tokens=12", "branch.probability=0.5"),
            *("optimizer.lr=1e-3", "optimizer.vision_lr=1e-4", "optimizer.projector_lr=5e-4"),
            *("optimizer.warmup_steps=3", f"trainer.output_dir={folder / name}"),
        ]
        launch(ranks, script, *given, *settings)
        return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]

    def both(ranks, others):
        name = f"{ranks}_{others}"
        straight = run(ranks, f"straight{name}", "trainer.steps=4")
        run(ranks, f"resumed{name}", "trainer.steps=2")
        return straight, run(others, f"resumed{name}", "trainer.steps=4", "--resume")

    return both


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "others"), [(1, 1), *(pytest.param(*pair, marks=pytest.mark.long) for pair in ((2, 2), (2, 1), (1, 4)))]
)
def test_a_run_goes_on_with_what_it_remembered_while_its_loader_works_ahead(straight_and_resumed, ranks, others):
    straight, resumed = straight_and_resumed(ranks, others)
    assert [row["step"] for row in resumed] == [0, 1, 2, 3]
    assert len({row["remembered"] for row in straight}) == 4
    for a, b in zip(straight, resumed, strict=True):
        rel = 1e-6 if ranks == others else 1e-3  # sums in another order
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=rel)
