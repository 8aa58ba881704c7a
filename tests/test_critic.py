"""CDE's critic: advantages and the heads' loss by hand, what a step does with them, and what a resumed run keeps."""

import json

import numpy as np
import pytest
import torch
from ranks import launch
from steps import batches_of
from test_kl import with_rewards

from vogue.cli import main
from vogue.method.critic import (
    curious_advantages,
    dealt_prefixes,
    generalised_advantages,
    prefixes_of_a_head,
    value_loss,
)
from vogue.metrics import Clock, Means
from vogue.settings import ConfigError

HEADS = torch.tensor([[0.2, 0.4], [0.6, 0.2]])  # of the states before two tokens


def test_advantages_by_hand():
    # V̄ = .3, .4; r = 1: δ = .1, .6; Ã = .7, .6; after the first token the heads' std is .2, after the last it is over
    plain = generalised_advantages(HEADS.mean(dim=1), 1.0, 1.0, 1.0)
    assert plain.tolist() == pytest.approx([0.7, 0.6])
    given = {"gamma": 1.0, "lam": 1.0, "alpha": 0.5, "cap": 3.0}
    assert curious_advantages(HEADS, 1.0, weight=1.0, **given).tolist() == pytest.approx([0.8, 0.6])
    assert curious_advantages(HEADS, 1.0, weight=0.0, **given).tolist() == pytest.approx([0.7, 0.6])
    # |Ã| / κ caps: at κ = 14 it is .05
    assert curious_advantages(HEADS, 1.0, weight=2.0, **given | {"cap": 14.0}).tolist() == pytest.approx([0.8, 0.6])
    # γ = ½, λ = ½: δ = ½ · .4 − .3 = −.1, .6; Ã = −.1 + ¼ · .6, .6
    assert generalised_advantages(HEADS.mean(dim=1), 1.0, 0.5, 0.5).tolist() == pytest.approx([0.05, 0.6])
    assert generalised_advantages(torch.tensor([0.25]), -1.0, 1.0, 1.0).tolist() == pytest.approx([-1.25])


def test_each_head_learns_of_its_own_prefixes():
    dealt = dealt_prefixes(4, 2, 0.5, np.random.default_rng(0))
    assert dealt.sum(dim=0).tolist() == [2, 2] and prefixes_of_a_head(4, 0.5) == 2
    values = torch.arange(8.0).view(4, 2).requires_grad_()
    loss = value_loss(values, torch.tensor([1.0, 1.0, 1.0, 0.0]), dealt) / 4
    by_hand = sum((2.0 * t + j - (t < 3)) ** 2 for t in range(4) for j in range(2) if dealt[t, j]) / 4
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    assert ((values.grad != 0) <= dealt).all()
    assert dealt_prefixes(5, 3, 1.0, np.random.default_rng(0)).all()
    assert prefixes_of_a_head(1, 0.2) == 1
    shares = torch.stack([dealt_prefixes(5, 1, 0.4, np.random.default_rng(i))[:, 0] for i in range(400)]).double()
    assert shares.mean(dim=0).tolist() == pytest.approx([0.4] * 5, abs=0.08)


METHOD = ("method=cde_critic", "branch.rollout=raw", "critic.lr=1e-2", "critic.heads=3", "critic.share=0.5")


def test_a_step_trains_on_values_of_states_and_the_policy_isnt_the_heads(new_trainer):
    trainer = new_trainer(*METHOD, "critic.warmup_steps=0")
    groups = with_rewards(trainer, 1.0, -1.0)
    batches, means = batches_of(trainer, groups), Means()
    found = trainer.looked_at(batches, means, several=False)
    for batch, new in zip(batches, found, strict=True):
        with torch.no_grad():
            hidden = trainer.policy(batch).hidden
            values = hidden @ trainer.critic.weight.T + trainer.critic.bias
        for here in batch.slices:
            reward = float(batch.advantages[here][0])
            assert reward in (1.0, -1.0) and new.returns[here].eq(reward).all()
            mean, spread = values[here].mean(1), values[here].var(1, correction=0).sqrt()
            plain = reward - mean  # γ = λ = 1
            bonus = torch.minimum(plain.abs() / 3, 0.5 * torch.cat([spread[1:], torch.zeros(1)]))
            torch.testing.assert_close(new.advantages[here], plain + bonus, rtol=1e-4, atol=1e-5)
        assert (
            new.dealt.sum(dim=0).eq(sum(prefixes_of_a_head(len(new.returns[here]), 0.5) for here in new.slices)).all()
        )
    assert means["value_spread"].total > 0

    before = trainer.critic.weight.detach().clone()
    trainer.update(groups, means := Means(), Clock())
    assert not trainer.critic.weight.equal(before)
    assert means["value_loss"].total > 0
    first = means["value_loss"].total
    for _ in range(5):
        trainer.update(groups, means := Means(), Clock())
    assert means["value_loss"].total < 0.8 * first  # they learn
    assert not any("critic" in name for name, _ in trainer.policy.named_parameters())


def test_in_the_warm_up_the_heads_learn_and_the_policy_waits(new_trainer):
    trainer = new_trainer(*METHOD, "critic.warmup_steps=1", "optimizer.weight_decay=0")
    policy = [p.detach().clone() for p in trainer.policy.parameters()]
    heads = trainer.critic.weight.detach().clone()
    metrics, _ = trainer.run_step()
    assert all(new.equal(old) for new, old in zip(trainer.policy.parameters(), policy, strict=True))
    assert metrics["grad_norm"] == 0 and metrics["value_loss"] > 0
    assert not trainer.critic.weight.equal(heads)
    trainer.run_step()
    assert not all(new.equal(old) for new, old in zip(trainer.policy.parameters(), policy, strict=True))


def test_settings_that_nothing_reads_are_refused(config):
    assert config("method=cde_critic").reward.wrong == -1
    for wrong, told in (
        (("critic.heads=8",), r"^critic\.heads=8: advantage\.kind=group has no value heads$"),
        (("method=cde_critic", "advantage.shape=0.3"), r"^advantage\.shape=0\.3 goes by a completion's advantage"),
        (("method=cde_critic", "advantage.pairs=0.5"), r"^advantage\.pairs=0\.5 goes by a completion's advantage"),
        (("method=cde_critic", "advantage.kind=group"), "method=cde_critic fixes advantage.kind=gae"),
    ):
        with pytest.raises(ConfigError, match=told):
            config(*wrong)


CURVES = ("reward", "loss", "entropy", "value", "value_spread", "value_loss", "grad_norm", "tokens")


@pytest.mark.long
@pytest.mark.parametrize("updates", [1, 2])
def test_two_ranks_train_as_one_does_and_go_on_as_if_they_had_not_stopped(settings, mixed_data, tmp_path, updates):
    (tmp_path / "varied.py").write_text(
        "def varied(completions, samples):\n    return [sum(map(ord, text)) % 2 for text in completions]\n"
    )
    chosen = [*settings, *METHOD, "critic.warmup_steps=1", f"data.train={mixed_data}", "rollout.n=4"]
    chosen += [f"reward.function={tmp_path}/varied.py:varied", "reward.wrong=0", f"trainer.updates={updates}"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *chosen, f"trainer.output_dir={one}", "trainer.steps=3"]) == 0
    for more in (("trainer.steps=2",), ("trainer.steps=3", "--resume")):
        launch(2, "--module", "vogue.train", *chosen, f"trainer.output_dir={two}", *more)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows):
        assert {name: b.get(name, -1.0) for name in CURVES} == pytest.approx(
            {name: a.get(name, -1.0) for name in CURVES}, rel=2e-3
        )
