"""`branch.rollout=raw`: completions of the raw image, trained on it, and a draw that decides where u_per is paid."""

from dataclasses import replace

import pytest
import torch
from steps import TWO_BY_TWO, batches_of, generated, loss_gradient, objective_of, rows_of, with_settings

from vogue.metrics import Clock, Means

RAW = ("branch.rollout=raw", "perturb.sigma=0.8")
EVERY = "branch.probability=1"


def with_advantages(groups):
    """As if one completion of each was right."""
    return [
        replace(g, advantages=tuple((1.0 + i) * (-1.0) ** j for j in range(len(g.kept)))) for i, g in enumerate(groups)
    ]


def one_batch(trainer):
    (batch,) = batches_of(trainer, with_advantages(generated(trainer, trainer.loader.items(0))))
    return batch


def test_whatever_is_drawn_grpos_completions_are_generated(new_trainer, config):
    grpo = new_trainer("method=grpo")
    expected = [group.completions for group in generated(grpo, grpo.loader.items(0))]
    raw = with_settings(grpo, config(*RAW, "branch.probability=0.5", "branch.granularity=response"))
    groups = generated(raw, raw.loader.items(0))
    assert [group.completions for group in groups] == expected
    assert all(all(group.kept) and group.view == "raw" for group in groups)
    assert [group.paid for group in groups] == [group.item.draws for group in groups]
    assert {draw for group in groups for draw in group.paid} == {False, True}


def test_what_is_paid_is_a_row_with_a_second_forward_on_the_noisy_image_and_what_is_not_one_without(new_trainer):
    trainer = new_trainer(*RAW, "rollout.prompts=2", "rollout.n=4")
    item = trainer.loader.item(trainer.loader.samples[0], 0, 0, (True, False, True, False))
    (group,) = generated(trainer, [item])
    group = replace(group, advantages=(1.0, -1.0, 0.0, 2.0))
    unpaid, paid = rows_of(trainer, group)
    assert paid.completions == group.completions[:1]  # the third has A = 0
    assert unpaid.completions == (group.completions[1], group.completions[3])
    assert paid.trained == unpaid.trained == "raw"
    assert paid.others == ("noisy",) and unpaid.others == ()
    (batch,) = batches_of(trainer, [group])
    assert batch.paid.tolist() == [True] * len(group.completions[0].token_ids) + [False] * sum(
        len(completion.token_ids) for completion in unpaid.completions
    )
    assert not batch.noisy.any()


def test_without_a_draw_nothing_is_perturbed_and_the_gradient_is_that_of_the_entropy_bonus(new_trainer, config):
    trainer = new_trainer(*RAW, *TWO_BY_TWO, "branch.probability=0")
    items = trainer.loader.items(0)
    assert all("noisy" not in item.views for item in items)
    groups = with_advantages(generated(trainer, items))
    entropy = with_settings(trainer, config("method=entropy", *TWO_BY_TWO))
    assert torch.equal(loss_gradient(trainer, groups), loss_gradient(entropy, groups))


@pytest.mark.parametrize("divergence", ["symmetric", "forward", "reverse"])
def test_the_bonus_is_the_divergence_at_the_raw_completions_tokens(new_trainer, config, divergence):
    trainer = new_trainer(*RAW, *TWO_BY_TWO, EVERY, "guidance.alpha_out=0", f"uncertainty.divergence={divergence}")
    batch = one_batch(trainer)
    with torch.no_grad():
        stats, swapped = trainer.policy(batch), trainer.policy(batch.others[0])  # the noisy image's own statistics
    forward, reverse = stats.other.kl_own_other, stats.other.kl_other_own  # KL(raw‖noisy), KL(noisy‖raw)
    assert (stats.other.logprob - swapped.logprob).abs().max() < 1e-5
    assert (forward - reverse).abs().max() > 1e-6
    u_per = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[divergence]
    expected = batch.advantages + torch.minimum(batch.advantages.abs() / 2, u_per)
    loss = objective_of(trainer, batch, trainer.signals(batch, stats)).loss
    assert loss.item() == pytest.approx(-float(expected.sum()), rel=1e-5)
    # and the gradient is that of the raw branch, with these advantages
    grpo = with_settings(trainer, config("method=grpo", *TWO_BY_TWO))
    plain = replace(batch, advantages=expected, others=())
    found, wanted = (
        torch.autograd.grad(objective_of(t, b, t.signals(b, t.policy(b))).loss, list(t.policy.parameters()))
        for t, b in ((trainer, batch), (grpo, plain))
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def test_the_entropy_of_the_drawn_branch_needs_its_forward_even_where_no_divergence_is_paid(new_trainer, config):
    alone = ("guidance.alpha_per=0", EVERY)
    trainer = new_trainer(*RAW, *TWO_BY_TWO, *alone, "uncertainty.entropy=drawn")
    batch = one_batch(trainer)
    with torch.no_grad():
        stats, noisy = trainer.policy(batch), trainer.policy(batch.others[0])
    expected = batch.advantages + torch.minimum(batch.advantages.abs() / 2, 0.4 * noisy.entropy)
    loss = objective_of(trainer, batch, trainer.signals(batch, stats)).loss
    assert loss.item() == pytest.approx(-float(expected.sum()), rel=1e-5)
    assert one_batch(with_settings(trainer, config(*RAW, *TWO_BY_TWO, *alone))).others == ()


def test_the_sign_of_the_bonus_turns_with_the_steps(new_trainer):
    transition = "guidance.sign_transition=[0.25,0.75]"
    trainer = new_trainer(*RAW, *TWO_BY_TWO, EVERY, "guidance.alpha_out=0", transition, "trainer.steps=4")
    batch = one_batch(trainer)
    signals = trainer.signals(batch, trainer.policy(batch))
    bonus = float(torch.minimum(batch.advantages.abs() / 2, signals.u_per).sum())
    found = []
    for trainer.step in range(4):
        loss = objective_of(trainer, batch, signals).loss
        found.append((-loss.item() - float(batch.advantages.sum())) / bonus)
    assert found == pytest.approx([1, 1, 0, -1], abs=1e-3)


def test_dual_clipping_and_the_order_of_the_bonuses_reach_the_loss(new_trainer, config):
    trainer = new_trainer(*RAW, *TWO_BY_TWO, EVERY)
    batch = one_batch(trainer)
    signals = trainer.signals(batch, trainer.policy(batch))._replace(u_per=torch.full_like(batch.advantages, 9.0))
    plain = objective_of(trainer, batch, signals).loss.item()
    ordered = with_settings(trainer, config(*RAW, *TWO_BY_TWO, EVERY, "guidance.order=sequential"))
    assert objective_of(ordered, batch, signals).loss.item() != pytest.approx(plain, rel=1e-3)
    # Of a ratio of e² and A = −1 without bonuses, the loss is e², or 3 where it is bounded.
    none = ("method=grpo", *TWO_BY_TWO)
    signals = signals._replace(logprob=torch.zeros_like(batch.advantages))
    old = signals._replace(logprob=torch.full_like(batch.advantages, -2.0))
    batch = replace(batch, advantages=torch.full_like(batch.advantages, -1.0), old=old)
    for bound, loss in (("null", 7.389), ("3", 3.0)):
        bounded = with_settings(trainer, config(*none, f"loss.clip_dual={bound}"))
        found = objective_of(bounded, batch, signals).loss.item()
        assert found == pytest.approx(loss * len(batch.targets), rel=1e-3)


def test_a_step_says_how_many_completions_are_paid_and_that_none_saw_the_noisy_image(new_trainer):
    half = ("branch.probability=0.5", "branch.granularity=response", "rollout.n=4")
    trainer = new_trainer(*RAW, *half, "trainer.updates=2", "uncertainty.estimator=k3")
    draws = [draw for item in trainer.loader.items(0) for draw in item.draws]
    metrics, groups = trainer.run_step()
    assert metrics["paid_share"] == sum(draws) / len(draws)
    assert metrics["noisy_share"] == 0
    assert metrics["ratio_error"] < 1e-5
    assert metrics["mismatch/logprob"] < 1e-4
    for group in groups:
        known = [trace is not None and trace.u_per is not None for trace in group.traces]
        assert known == [paid and a != 0 for paid, a in zip(group.paid, group.advantages, strict=True)]


def test_what_is_learned_is_the_same_however_rows_are_cut(new_trainer):
    mixed = (*RAW, "branch.probability=0.5", "branch.granularity=response", "rollout.n=4")
    weights = []
    for override in ("trainer.shared_prefix=true", "trainer.shared_prefix=false", "trainer.micro_batch_tokens=1"):
        trainer = new_trainer(*mixed, override, "optimizer.lr=1e-4")
        trainer.update(with_advantages(generated(trainer, trainer.loader.items(0))), Means(), Clock())
        weights.append(torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]))
    for other in weights[1:]:
        assert ((other - weights[0]).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("estimator", ["exact", "k3", "sampled"])
@pytest.mark.parametrize("granularity", ["prompt", "response", "step"])
def test_every_granularity_and_estimator_trains_on_raw_rollouts(new_trainer, granularity, estimator):
    settings = ("branch.probability=0.5", f"branch.granularity={granularity}", f"uncertainty.estimator={estimator}")
    trainer = new_trainer(*RAW, *settings, "rollout.n=4")
    before = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    trainer.step = 1  # whose draws are mixed, or all 1
    draws = [item.draws for item in trainer.loader.items(1)]
    metrics, groups = trainer.run_step()
    assert [group.paid for group in groups] == draws and any(map(any, draws))
    assert metrics["u_per"] > 0 and metrics["loss"] != 0
    assert not torch.equal(torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]), before)


@pytest.mark.parametrize(
    "base",
    [
        ("loss.clip_high=0.28", "rollout.rounds=3", "reward.overlong_buffer=0.2", "trainer.updates=2"),  # DAPO's parts
        ("advantage.kind=passk", "advantage.k=2"),
        ("method=dupl",),
    ],
    ids=["dapo", "passk", "dupl"],
)
def test_every_base_trains_on_raw_rollouts(new_trainer, base):
    trainer = new_trainer(*RAW, *base, "branch.probability=1", "rollout.n=4")
    metrics, groups = trainer.run_step()
    assert {group.view for group in groups} == {"raw"} and metrics["paid_share"] == 1
    assert metrics["noisy_share"] == 0 and metrics["u_per"] > 0
    assert metrics["ratio_error"] < 1e-5
