"""Credit of a token by how much the image matters to it: VPPO and PGPO on numbers worked by hand, and in a step."""

import json
from dataclasses import replace

import pytest
import torch
from ranks import launch
from steps import batches_of
from test_kl import with_rewards

from vogue.cli import main
from vogue.method.credit import completion_factors, kept_tokens, pgpo_factors, token_factors
from vogue.metrics import Clock, Means
from vogue.settings import ConfigError
from vogue.step.objective import dependence


def alone(found):
    return [found]


def test_vppos_tokens_are_those_that_the_image_matters_to_most():
    assert kept_tokens(torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3]), 0.4).tolist() == [True, False, True, False, False]
    assert kept_tokens(torch.tensor([0.2]), 0.4).tolist() == [True]
    assert kept_tokens(torch.full((6,), 0.1), 0.4).tolist() == [True] * 3 + [False] * 3  # ⌈2.4⌉, the first of equals
    assert kept_tokens(torch.arange(10.0), 1.0).all()


def test_vppos_factors_have_a_mean_of_one_over_the_update():
    means = [0.1, 0.3, 0.5]
    assert completion_factors(means, 0.9, means) == pytest.approx([0.9, 1.0, 1.1])
    assert completion_factors([0.3], 0.9, means[::-1]) == completion_factors(means, 0.9, means)[1:2]
    assert completion_factors([0.2, 0.2], 0.9, [0.2, 0.2]) == [1.0, 1.0]


@pytest.mark.parametrize(("divisor", "scale"), [("all", 1.0), ("kept", 5 / 2)])
def test_both_together_by_hand(divisor, scale):
    tokens = [torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3]), torch.tensor([0.0, 0.0, 0.1, 0.4, 0.0])]  # S̄ 0.3 and 0.1
    found = token_factors(tokens, alone, "vppo", divisor=divisor)
    assert found[0].tolist() == pytest.approx([1.1 * scale, 0, 1.1 * scale, 0, 0])
    assert found[1].tolist() == pytest.approx([0, 0, 0.9 * scale, 0.9 * scale, 0])
    # A rank with one of them alone, when the other rank's is gathered, and one with none.
    other = [(0.1, (5, 2))]
    assert (
        token_factors(tokens[:1], lambda mine: [mine, other], "vppo", divisor=divisor)[0].tolist() == found[0].tolist()
    )
    assert token_factors([], lambda mine: [mine, other], "vppo") == []


def test_pgpos_factors_by_hand():
    # log(1 + S) = 0, 1, 2: I = 0, ½, 1 and m = 0, 1⅓, 3, which are scaled to a sum of 3
    found = pgpo_factors(torch.tensor([0, 1, 2.0]).expm1(), 0.4, 2.0)
    assert found.tolist() == pytest.approx([0, 0.923077, 2.076923], abs=1e-6)
    assert pgpo_factors(torch.full((4,), 0.3), 0.4, 2.0).tolist() == [1.0] * 4


METHOD = ("branch.rollout=raw", "perturb.share=0.9", "rollout.rounds=1", "rollout.n=4")


@pytest.mark.parametrize("method", ["vppo", "pgpo"])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_trains_on_advantages_of_tokens(new_trainer, method, updates):
    trainer = new_trainer(f"method={method}", *METHOD, f"trainer.updates={updates}")
    batches = batches_of(trainer, with_rewards(trainer, 1.0, 0.0, 0.0, 1.0))
    found = trainer.looked_at(batches, Means(), several=updates > 1)
    assert all((batch.old is not None) == (updates > 1) and not batch.others for batch in found)
    dependences = []
    for batch in batches:
        with torch.no_grad():
            stats = trainer.policy(batch)
        known = dependence(batch, stats, "exact")
        assert known.equal(stats.other.kl_own_other)
        dependences += [known[here] for here in batch.slices]
    factors = token_factors(dependences, alone, method)
    before = [batch.advantages[here] for batch in batches for here in batch.slices]
    after = [batch.advantages[here] for batch in found for here in batch.slices]
    for old, new, factor in zip(before, after, factors, strict=True):
        torch.testing.assert_close(new, old * factor)
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_what_sends_no_gradient_counts_for_nothing(new_trainer):
    trainer = new_trainer("method=vppo", *METHOD, "trainer.measure_every=1", "credit.floor=0.1")
    groups = with_rewards(trainer, 1.0, 0.0, 0.0, 1.0)
    equal = [replace(group, advantages=(0.0,) * 4) for group in groups[2:]]
    sums = []
    for chosen in (groups[:2], [*groups[:2], *equal]):
        batches = trainer.micro_batches(dict(enumerate(chosen)), groups[0], Means(), Clock())
        found = trainer.looked_at(batches, Means(), several=False)
        sums.append(sorted(float(batch.advantages[here].sum()) for batch in found for here in batch.slices))
    assert [x for x in sums[1] if x] == pytest.approx([x for x in sums[0] if x], rel=1e-3)
    assert len(sums[1]) == 2 * len(sums[0]) == 16


def test_settings_that_nothing_reads_are_refused(config):
    for wrong, told in (
        (("credit.tokens=0.2",), r"^credit\.tokens=0\.2: credit\.kind=none doesn't read it$"),
        (("credit.kind=pgpo", "branch.rollout=raw", "credit.floor=0.5"), r"credit\.kind=pgpo doesn't read it$"),
        (
            ("credit.kind=vppo",),
            r"^credit\.kind=vppo: with branch\.rollout=drawn completions are trained on T.x. itself$",
        ),
        (("credit.kind=vppo", "branch.rollout=raw", "credit.tokens=0"), "nothing would be trained"),
    ):
        with pytest.raises(ConfigError, match=told):
            config(*wrong)


CURVES = ("reward", "loss", "entropy", "grad_norm", "tokens")


@pytest.mark.slow
@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.long), 2])
def test_two_ranks_train_as_one_does(settings, mixed_data, tmp_path, updates):
    (tmp_path / "varied.py").write_text(
        "def varied(completions, samples):\n    return [sum(map(ord, text)) % 7 / 6 for text in completions]\n"
    )
    chosen = [*settings, "method=vppo", *METHOD, f"data.train={mixed_data}", f"trainer.updates={updates}"]
    chosen.append(f"reward.function={tmp_path}/varied.py:varied")
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *chosen, f"trainer.output_dir={one}", "trainer.steps=2"]) == 0
    launch(2, "--module", "vogue.train", *chosen, f"trainer.output_dir={two}", "trainer.steps=2")
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=2e-3)
