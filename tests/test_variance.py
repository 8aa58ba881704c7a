"""MMR1's variance-aware sampling: scores and draws by hand, and what a run measures, remembers and draws."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import launch
from test_groups import group

from vogue.cli import main
from vogue.config import load_config
from vogue.method.variance import distinct, drawn, interleaved, outcome_variance, scores, unseen
from vogue.metrics import Means
from vogue.settings import ConfigError
from vogue.step.loader import SCORES, sample_order
from vogue.step.prompt_scores import TOKENS, refreshed, remembered

NEEDED = ["model.path=some/model", "data.train=train.parquet"]
MMR1 = ("method=mmr1", "rollout.n=4", "sampling.n=3", "sampling.every=2")  # measured before the steps 0 and 2


def test_outcome_and_score_by_hand():
    outcomes = [outcome_variance(right, 4) for right in (0, 1, 2, 4)]
    assert outcomes == [0, 0.1875, 0.25, 0]
    measured = torch.tensor(list(zip(outcomes, (0.5, 0.25, 0.0, 1.0))))
    assert scores(measured, 0.8, 0.2, normalise=False).tolist() == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert scores(measured, 1.0, 0.0, normalise=True).tolist() == pytest.approx([0, 0.75, 1, 0])
    alike = torch.full((3, 2), 0.2)
    assert scores(alike, 0.8, 0.2, normalise=True).tolist() == [0, 0, 0]


def test_distinct_trigrams_are_counted_over_all_completions_of_a_prompt():
    assert distinct([[1, 2, 3, 1, 2, 3]]) == 3 / 4  # 123 231 312 123
    assert distinct([[1, 2, 3, 1], [2, 3, 1, 2]]) == 3 / 4  # 123 231 231 312, and none across the two
    assert distinct([[1, 2], [3]]) == 0
    assert distinct([[1, 2, 3, 1, 2, 3]], n=2) == 3 / 5


def test_prompts_are_drawn_in_proportion_to_their_scores():
    weights = torch.tensor([0.1, 0.2, 0.0, 0.2, 0.5], dtype=torch.float64)
    counts = Counter(drawn(weights, 10_000, np.random.default_rng(0)))
    expected = {0: 1000, 1: 2000, 3: 2000, 4: 5000}
    assert counts.keys() == expected.keys()
    assert sum((counts[i] - e) ** 2 / e for i, e in expected.items()) < 16.3  # chi-square, 3 degrees of freedom, 0.1%
    assert sorted(set(drawn(torch.zeros(3, dtype=torch.float64), 100, np.random.default_rng(0)))) == [0, 1, 2]


def test_both_parts_are_spread_evenly():
    assert interleaved([1, 2], [7, 8]) == [7, 1, 8, 2]
    assert interleaved([1], [6, 7, 8]) == [6, 7, 8, 1]
    assert interleaved([], [7, 8]) == [7, 8]
    assert interleaved([1, 2, 3], []) == [1, 2, 3]
    found = interleaved(range(100, 106), range(10))
    assert [sum(i >= 100 for i in found[8 * k : 8 * k + 8]) for k in (0, 1)] == [3, 3]


def test_the_share_of_the_prompts_is_rounded_down():
    def scored(share, prompts):
        given = [*NEEDED, "sampling.kind=variance", f"sampling.share={share}", f"rollout.prompts={prompts}"]
        return load_config(None, given).sampling.scored(prompts)

    assert [scored(0.5, 4), scored(0.3, 4), scored(0.29, 100), scored(1, 4), scored(0, 4)] == [2, 1, 29, 4, 0]


# ---------------------------------------------------------------------------------------------------- which prompts


def places(items):
    return [item.prompt.sample.place for item in items]


def test_without_scores_and_with_a_share_of_0_the_order_is_the_uniform_one(new_loader):
    plain = new_loader("rollout.rounds=2", "rollout.n=4")
    none = new_loader("rollout.rounds=2", "rollout.n=4", "sampling.kind=variance", "sampling.share=0")
    for step in range(4):
        for number in range(2):
            assert places(none.items(step, number)) == places(plain.items(step, number))


def test_half_of_the_prompts_are_drawn_by_score_and_the_others_go_on_through_the_epoch(new_loader):
    loader = new_loader(*MMR1, "rollout.prompts=8")
    known = torch.zeros(24, 2)
    known[5] = torch.tensor([0.25, 0.5])
    loader.state.settled = {SCORES: known}
    uniform = []
    for step in range(6):
        indices = [item.index for item in loader.items(step)]
        assert indices[1::2] == [5, 5, 5, 5]
        uniform += indices[::2]
        assert len({item.number for item in loader.items(step)}) == 8  # repeated prompts are answered anew
    assert uniform == sample_order(24, 0, 24, 0)


def test_prompts_do_not_depend_on_the_number_of_ranks(new_loader):
    known = torch.rand(24, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for ranks in (1, 2):
        loaders = [new_loader(*MMR1, rank=rank, ranks=ranks) for rank in range(ranks)]
        for loader in loaders:
            loader.state.settled = {SCORES: known}
        items = [item for loader in loaders for item in loader.items(3)]
        found.append(sorted((item.number, item.index) for item in items))
    assert found[0] == found[1]


def test_nothing_is_loaded_ahead_of_a_measurement(new_loader):
    loader = new_loader(*MMR1)
    loader.load_ahead(0)
    assert loader._ahead[0] == 1
    loader.load_ahead(1)  # step 2 measures
    assert loader._ahead is None
    loader.load_ahead(2)
    assert loader._ahead[0] == 3


# ------------------------------------------------------------------------------------------- measured and remembered


def test_a_measurement_asks_every_sample_and_its_result_is_what_its_completions_say(new_trainer):
    trainer = new_trainer(*MMR1)
    means = Means()
    found = refreshed(trainer.engine, trainer.loader, 0, means)
    assert found.shape == (24, 2)
    # With three completions a sample P (1 - P) is 0 or 2/9.
    assert {round(value, 6) for value in found[:, 0].tolist()} == {0, round(2 / 9, 6)}
    assert 0 < found[:, 1].min() <= found[:, 1].max() <= 1
    assert means["refresh/outcome"].total == pytest.approx(found[:, 0].mean().item())
    assert 24 * 3 <= means[TOKENS].total <= 24 * 3 * 12
    assert torch.equal(refreshed(trainer.engine, trainer.loader, 0, Means()), found)
    assert not torch.equal(refreshed(trainer.engine, trainer.loader, 2, Means()), found)


def test_a_sample_that_cannot_be_read_is_skipped_where_that_is_asked_for(new_trainer):
    trainer = new_trainer(*MMR1, "data.broken=skip")
    trainer.loader.samples = list(trainer.loader.samples)
    trainer.loader.samples[3] = replace(trainer.loader.samples[3], images=(b"not an image",))
    found = refreshed(trainer.engine, trainer.loader, 0, Means())
    assert found[3].tolist() == [0, 0]
    assert (found[:, 1] > 0).sum() == 23


def test_a_step_chooses_its_prompts_by_what_it_has_just_measured_and_counts_the_cost(new_trainer):
    trainer = new_trainer(*MMR1, "sampling.share=1", "sampling.outcome=1", "sampling.diversity=0")
    metrics, groups = trainer.run_step()
    known = trainer.state.current[SCORES]
    assert (known[:, 0] == 0).sum() > 12  # samples that aren't drawn by what is known now, and would be without it
    assert all(known[found.item.index, 0] > 0 for found in groups)
    trained = sum(len(completion.token_ids) for found in groups for completion in found.completions)
    assert metrics["generated_tokens"] == trained + metrics[TOKENS]
    assert metrics[TOKENS] > 24 * 3
    assert metrics["time/refresh"] > 0
    after, _ = trainer.run_step()  # step 1 of every 2: nothing is measured
    assert after[TOKENS] == 0
    assert torch.equal(trainer.state.current[SCORES], known)


def seen(index, *accuracies, number=0, tokens=(1, 2, 3, 1, 2, 3)):
    some = group(number, *accuracies)
    completions = tuple(replace(completion, token_ids=tokens) for completion in some.completions)
    return replace(some, item=replace(some.item, index=index), completions=completions)


def test_the_latest_groups_count_and_a_sample_not_seen_has_the_highest_score(new_trainer):
    new_trainer()  # one rank
    first = remembered(None, 4, [seen(1, 1, 0, 0, 0), seen(2, 1, 1, 1, 1)])
    assert first.tolist() == [[0.25, 1], [0.1875, pytest.approx(3 / 16)], [0, pytest.approx(3 / 16)], [0.25, 1]]
    then = remembered(first, 4, [seen(1, 1, 1), seen(3, 1, 1), seen(3, 0, 0, number=1)])
    # 3 was drawn twice: two of four are right
    assert then[:, 0].tolist() == [0.25, 0, 0, 0.25]
    assert first[1, 0] == 0.1875  # what was settled isn't changed
    assert torch.equal(unseen(2), torch.tensor([[0.25, 1.0]] * 2))


def test_history_costs_no_rollout_and_is_known_one_step_later(new_trainer):
    trainer = new_trainer("method=mmr1", "sampling.source=history", "rollout.n=4")
    metrics, groups = trainer.run_step()
    assert metrics[TOKENS] == 0
    known = trainer.state.current[SCORES]
    for found in groups:
        right = sum(score.accuracy == 1 for score in found.scores)
        assert known[found.item.index, 0] == pytest.approx(right / 4 * (1 - right / 4))
    others = sorted(set(range(24)) - {found.item.index for found in groups})
    assert torch.equal(known[others], unseen(len(others)))
    assert SCORES not in trainer.state.settled


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["sampling.kind=variance", "sampling.outcome=0", "sampling.diversity=0"],
            "sampling.outcome=0 and sampling.diversity=0: every score would be 0",
        ),
        (["method=mmr1", "sampling.share=0.01"], "sampling.share=0.01 of rollout.prompts=32 is none: method=mmr1"),
        (["method=mmr1", "sampling.kind=uniform"], "method=mmr1 fixes sampling.kind=variance, but it is set to"),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides, told):
    with pytest.raises(ConfigError) as error:
        load_config(None, [*NEEDED, *overrides])
    assert str(error.value).startswith(told)


# --------------------------------------------------------------------------- stopped and resumed, on one rank and two

CURVES = ("reward", "loss", "grad_norm", "entropy", "tokens", "generated_tokens", "reward/curiosity", "shuffled_share")
ALL = (*MMR1, "curiosity.weight=1", "reward.wrong=-1", "advantage.pairs=0.5", "trainer.shuffle=2", "trainer.updates=2")


@pytest.mark.slow
@pytest.mark.parametrize("source", [pytest.param("rollouts", marks=pytest.mark.long), "history"])
def test_two_ranks_that_were_stopped_draw_and_train_as_one_that_was_not(model_folder, digits_folder, tmp_path, source):
    def run(ranks, *settings):
        given = [
            *(f"model.path={model_folder}", "model.dtype=float32", f"data.train={digits_folder}/train.parquet"),
            *("data.system_prompt=Think.", "data.max_prompt_tokens=128", "rollout.engine=hf", "rollout.prompts=4"),
            *("rollout.max_tokens=12", "optimizer.lr=1e-4", "curiosity.schedule=none", *ALL),
            *(f"sampling.source={source}", f"trainer.output_dir={tmp_path / str(ranks)}"),
        ]
        if ranks == 1:
            assert main(["train", *given, *settings]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *given, *settings)
        return [json.loads(line) for line in (tmp_path / str(ranks) / "metrics.jsonl").read_text().splitlines()]

    straight = run(1, "trainer.steps=3")
    run(2, "trainer.steps=1")
    resumed = run(2, "trainer.steps=3", "--resume")
    assert [row["step"] for row in resumed] == [0, 1, 2]
    for one, two in zip(straight, resumed, strict=True):
        assert {name: two[name] for name in CURVES} == pytest.approx({name: one[name] for name in CURVES}, rel=1e-3)
    state = [torch.load(tmp_path / f"{n}/checkpoints/step_000003/training/run.pt")["current"][SCORES] for n in (1, 2)]
    torch.testing.assert_close(*state, rtol=0, atol=1e-6)
