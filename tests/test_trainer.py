"""The trainer's step on a real, random model: what it adds to the equations, which have tests of their own."""

import copy
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue import branch
from vogue.config import ConfigError
from vogue.data import DataError
from vogue.groups import Group, sample_order, split
from vogue.metrics import Clock, Sums
from vogue.rollout import Completion
from vogue.trainer import _check_split, measure
from vogue_kernels import GuidanceConfig

TWO_BY_TWO = ("rollout.prompts=2", "rollout.n=2")


def with_settings(trainer, config):
    """`trainer` under other settings, with the same weights; it must not be stepped."""
    other = copy.copy(trainer)
    other.config = config
    other.guidance = GuidanceConfig(**config.guidance.model_dump())
    return other


def both_groups(trainer, prompts):
    """Raw and noisy group of the first prompts, with advantages as if one completion of each was right."""
    items = [trainer.item(trainer.samples[i], 0, i, (False, True)) for i in range(prompts)]
    groups = trainer.generate(items)
    assert [group.noisy for group in groups] == [False, True] * prompts
    return [replace(group, advantages=(1.0 + i, -0.5 - i)) for i, group in enumerate(groups)]


def drawn(groups, draws):
    """Of both groups of every prompt, what draws (P, G) train on."""
    kept = [replace(g, kept=tuple((draws[g.item.number] == g.noisy).tolist())) for g in groups]
    return [group for group in kept if any(group.kept)]


def loss_gradient(trainer, groups, normalise=True):
    """The gradient of an update's loss, flat, and the policy left as it was."""
    batches = trainer.batches(groups)
    loss = sum(trainer.loss(batch, *trainer.read(trainer.policy(batch)), Sums(), first=True) for batch in batches)
    if normalise:
        loss = loss / sum(batch.weights.sum() for batch in batches)
    parameters = list(trainer.policy.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients)])


# -------------------------------------------------------------------------------------------- branch granularity


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
def test_the_three_granularities_have_the_same_expected_gradient(new_trainer, config, aggregation):
    # The loss is a sum over completions of both groups, each with its own draw z as a factor, (z or 1 - z) times a term
    # that no draw enters: advantages come from all G completions of a branch, whatever is trained on. By linearity its
    # expectation knows only P(z = 1) = p of each completion, which is the same however the draws hang together.
    # The normaliser is the number of completions trained on, P G under any draw (sequence-mean), or the number of their
    # tokens (token-mean): that one varies with the draw, so there the sums agree and not the quotients.
    trainer = new_trainer(*TWO_BY_TWO, "perturb.sigma=0.8", f"loss.aggregation={aggregation}")
    groups, p = both_groups(trainer, 2), 0.3
    expected = {}
    for granularity in ("prompt", "response", "step"):
        count = {"prompt": 2, "response": 4, "step": 1}[granularity]  # draws of 2 prompts of 2 completions
        shape = {"prompt": (2, 1), "response": (2, 2), "step": (1, 1)}[granularity]
        assert branch.draw(granularity, 2, 2, p, 0, 0).unique().numel() <= 2**count
        expected[granularity] = 0
        for outcome in product((False, True), repeat=count):
            draws = torch.tensor(outcome).view(shape).expand(2, 2)
            chance = p ** sum(outcome) * (1 - p) ** (count - sum(outcome))
            gradient = loss_gradient(trainer, drawn(groups, draws), normalise=aggregation == "sequence-mean")
            expected[granularity] += chance * gradient
    scale = expected["prompt"].norm()
    assert scale > 1e-3
    assert (expected["response"] - expected["prompt"]).norm() < 1e-5 * scale
    assert (expected["step"] - expected["prompt"]).norm() < 1e-5 * scale
    # It isn't that the draw changes nothing.
    raw = loss_gradient(trainer, drawn(groups, torch.zeros(2, 2, dtype=torch.bool)), aggregation == "sequence-mean")
    assert (raw - expected["prompt"]).norm() > 1e-2 * scale


def test_advantages_come_from_all_completions_of_the_branch_whatever_is_trained_on(new_trainer):
    trainer = new_trainer(*TWO_BY_TWO)
    item = trainer.item(trainer.samples[0], 0, 0, (True, False, False))
    texts = [rf"<think></think>\boxed{{{item.prompt.sample.answer}}}", r"<think></think>\boxed{no}", "no"]
    completions = tuple(Completion((1,), (0.0,), text, True) for text in texts)
    (judged,) = trainer.judge([Group(item, True, completions, (), (), item.draws)])
    assert [score.reward for score in judged.scores] == pytest.approx([1.0, 0.1, 0.0])
    # mean 11/30, sample standard deviation sqrt((361 + 64 + 121) / 900 / 2) = 0.550757
    assert judged.advantages == pytest.approx([1.149932, -0.484182, -0.665750], abs=1e-5)
    (row,) = trainer.rows(judged)
    assert row.completions == completions[:1]
    assert row.view is item.noisy
    assert row.other is item.raw


def test_only_what_a_draw_asks_for_is_generated_and_perturbed(new_trainer):
    trainer = new_trainer("branch.granularity=response", "branch.probability=0.5")
    items = trainer.items(trainer.step)
    groups = trainer.generate(items)
    assert {any(i.draws) for i in items} | {all(i.draws) for i in items} == {True, False}
    for item in items:
        branches = [group for group in groups if group.item is item]
        assert [g.noisy for g in branches] == sorted(set(item.draws))
        assert sum(sum(g.kept) for g in branches) == len(item.draws)
        assert (item.noisy is None) == (not any(item.draws))


# ------------------------------------------------------------------------------------------ methods and ablations


def test_grpo_is_vogue_without_branch_and_guidance(config, new_trainer):
    by_name = config("method=grpo").model_dump()
    by_hand = config("branch.probability=0", "guidance.alpha_out=0", "guidance.alpha_per=0").model_dump()
    assert by_name | {"method": "vogue"} == by_hand

    trainer = new_trainer("method=grpo", *TWO_BY_TWO)
    items = trainer.items(trainer.step)
    assert all(item.noisy is None for item in items)
    groups = [replace(group, advantages=(2.0, -1.0)) for group in trainer.generate(items)]
    (batch,) = trainer.batches(groups)
    logprob, entropy, divergence = trainer.read(trainer.policy(batch))
    assert divergence is None
    assert entropy.min() > 0.01
    loss = trainer.loss(batch, logprob, entropy, None, Sums(), first=True)
    # Ratio 1 and no bonus: minus the advantages of all tokens.
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    assert loss.item() == pytest.approx(-2 * (lengths[0] + lengths[2]) + lengths[1] + lengths[3])


def noisy_batch(trainer):
    """The noisy group of one prompt, both completions trained on."""
    (batch,) = trainer.batches(drawn(both_groups(trainer, 1), torch.ones(1, 2, dtype=torch.bool)))
    return batch


@pytest.mark.parametrize(
    ("override", "alpha_out", "alpha_per", "beta_out", "beta_per"),
    [
        ("guidance.alpha_out=0.4", 0.4, 1.0, 2.0, 2.0),  # the default, the paper's
        ("guidance.alpha_per=0", 0.4, 0.0, 2.0, 2.0),
        ("guidance.alpha_out=0", 0.0, 1.0, 2.0, 2.0),
        ("guidance.beta_out=8", 0.4, 1.0, 8.0, 2.0),
        ("guidance.beta_per=8", 0.4, 1.0, 2.0, 8.0),
    ],
)
def test_every_guidance_setting_reaches_the_loss(
    new_trainer, config, override, alpha_out, alpha_per, beta_out, beta_per
):
    trainer = new_trainer(*TWO_BY_TWO)
    batch = noisy_batch(trainer)
    count = len(batch.targets)
    entropy, divergence = torch.linspace(0.1, 3, count), torch.linspace(2, 0.05, count)
    trainer = with_settings(trainer, config(*TWO_BY_TWO, override))
    loss = trainer.loss(batch, torch.full((count,), -1.0), entropy, divergence, Sums(), first=True)
    expected = 0.0
    for advantage, h, u in zip(batch.advantages.tolist(), entropy.tolist(), divergence.tolist()):
        g_out = min(abs(advantage) / beta_out, alpha_out * h)
        g_per = min(abs(advantage) / beta_per, alpha_per * u)
        expected -= advantage + g_out + g_per
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_divergence_setting_chooses_which_one_is_read_and_nothing_else(new_trainer, config):
    trainer = new_trainer(*TWO_BY_TWO, "perturb.sigma=0.8")
    stats = trainer.policy(noisy_batch(trainer))
    read = {
        name: with_settings(trainer, config(f"uncertainty.divergence={name}")).read(stats)
        for name in ("symmetric", "forward", "reverse")
    }
    assert all(logprob is stats.logprob for logprob, _, _ in read.values())
    assert all(torch.equal(entropy, stats.entropy) for _, entropy, _ in read.values())
    assert torch.equal(read["forward"][2], stats.branches.kl_raw_noisy)  # KL(p || q), p the raw branch
    assert torch.equal(read["reverse"][2], stats.branches.kl_noisy_raw)
    torch.testing.assert_close(read["symmetric"][2], (read["forward"][2] + read["reverse"][2]) / 2)
    assert (read["forward"][2] - read["reverse"][2]).abs().max() > 1e-6
    assert not any(t.requires_grad for _, entropy, divergence in read.values() for t in (entropy, divergence))


def test_the_estimator_reaches_guidance_and_leaves_the_logged_uncertainties_exact(new_trainer, config):
    trainer = new_trainer(*TWO_BY_TWO, "perturb.sigma=0.8")
    batch = noisy_batch(trainer)
    stats = trainer.policy(batch)
    losses, logged = {}, {}
    for name in ("exact", "k3", "sampled"):
        chosen, sums = with_settings(trainer, config(*TWO_BY_TWO, f"uncertainty.estimator={name}")), Sums()
        logprob, u_out, u_per = chosen.read(stats)
        measure(batch, stats, sums, all_groups=False)
        losses[name] = chosen.loss(batch, logprob, u_out, u_per, sums, first=True).item()
        logged[name] = (sums.sums["entropy"], sums.sums["u_per"])
    q, p = stats.logprob.detach(), stats.branches.logprob_raw.detach()
    caps = batch.advantages.abs() / 2
    bonus = torch.minimum(caps, 0.4 * -q) + torch.minimum(caps, ((p - q).exp() - 1) * (p - q) / 2)
    assert losses["k3"] == pytest.approx(-float((batch.advantages + bonus).sum()), rel=1e-5)
    assert len(set(losses.values())) == 3
    assert set(logged.values()) == {
        (float(stats.entropy.detach().double().sum()), float(stats.branches.symmetric_kl.detach().double().sum()))
    }


def test_a_fixed_branch_probability_replaces_the_schedule_and_nothing_else(new_trainer, config):
    trainer = new_trainer("rollout.prompts=16")
    fixed = with_settings(trainer, config("rollout.prompts=16", "branch.probability=0.5"))
    scheduled, half = trainer.items(trainer.step), fixed.items(fixed.step)
    assert all(item.draws == (True, True) for item in scheduled)  # step 0: p_noi = 1
    share = sum(item.draws[0] for item in half) / 16
    assert 0.2 < share < 0.8
    for a, b in zip(scheduled, half, strict=True):
        assert a.prompt.sample is b.prompt.sample
        assert b.noisy is None or torch.equal(a.noisy.pixel_values, b.noisy.pixel_values)
    trainer.step = 4  # of 4: the schedule has ended
    assert not any(any(item.draws) for item in trainer.items(trainer.step))


def test_sigma_changes_the_noisy_view_alone(new_trainer, config):
    trainer = new_trainer()
    strong = with_settings(trainer, config("perturb.sigma=0.8"))
    none = with_settings(trainer, config("perturb.sigma=0"))
    for a, b, c in zip(trainer.items(trainer.step), strong.items(strong.step), none.items(none.step), strict=True):
        assert torch.equal(a.raw.pixel_values, b.raw.pixel_values)
        assert torch.equal(a.prompt.token_ids, b.prompt.token_ids)
        assert torch.equal(c.raw.pixel_values, c.noisy.pixel_values)
        weak, large = ((x.noisy.pixel_values - x.raw.pixel_values).norm() for x in (a, b))
        assert 0 < weak < large


# ------------------------------------------------------------------------------------------------- noisy rollout

NOISY_ROLLOUT = ("method=noisy_rollout", "rollout.prompts=2", "rollout.n=5", "rollout.noisy_share=0.4")


def test_clean_and_noisy_completions_are_one_group_trained_on_the_clean_image(new_trainer):
    trainer = new_trainer(*NOISY_ROLLOUT, "perturb.sigma=0.8")
    groups = trainer.generate(trainer.items(0))
    assert [group.sources for group in groups] == [(False, False, False, True, True)] * 2
    groups = [replace(group, advantages=(1.0, -1.0, 0.5, 2.0, -0.5)) for group in groups]
    (batch,) = trainer.batches(groups)
    assert torch.equal(batch.view.pixel_values, torch.cat([group.item.raw.pixel_values for group in groups]))
    stats = trainer.policy(batch)
    assert stats.branches is None

    # The engine's log-probabilities are those of the view that it saw: they say which one it was.
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    source = torch.tensor([s for group in groups for s in group.sources]).repeat_interleave(torch.tensor(lengths))
    generated = torch.tensor([x for group in groups for c in group.completions for x in c.logprobs])
    assert (stats.logprob - generated)[~source].abs().max() < 1e-4
    assert (stats.logprob - generated)[source].abs().max() > 1e-3
    noisy_batch = trainer.batches([replace(group, noisy=True, foreign=()) for group in groups])[0]
    assert (trainer.policy(noisy_batch).logprob - generated)[source].abs().max() < 1e-4

    # The mismatch of trainer and engine is measured where both saw the same image, and nothing else knows of the rest.
    assert torch.equal(batch.rollout_logprob.isnan(), source)
    sums = Sums()
    loss = trainer.loss(batch, *trainer.read(stats), sums, first=True)
    assert loss.item() == pytest.approx(-float(batch.advantages.sum()), rel=1e-5)
    assert sums.counts["mismatch/logprob"] == int((~source).sum())
    assert sums.sums["mismatch/logprob"] / sums.counts["mismatch/logprob"] < 1e-5


def test_clean_and_noisy_completions_share_a_mean_and_a_deviation(new_trainer):
    trainer = new_trainer(*NOISY_ROLLOUT)
    item = trainer.items(0)[0]
    texts = [rf"<think></think>\boxed{{{item.prompt.sample.answer}}}"] + ["no"] * 4
    completions = tuple(Completion((1,), (0.0,), text, True) for text in texts)
    (found,) = trainer.judge([Group(item, False, completions, (), (), (True,) * 5, (False,) * 3 + (True,) * 2)])
    # rewards 1, 0, 0, 0, 0: mean 1/5, sample deviation sqrt(1/5) = 0.447214
    assert found.advantages == pytest.approx([1.788854] + [-0.447214] * 4, abs=1e-5)


def test_its_ratio_starts_at_one_on_the_clean_image_in_several_updates_too(new_trainer):
    metrics, _ = new_trainer(*NOISY_ROLLOUT, "trainer.updates=2", "perturb.sigma=0.8").run_step()
    assert metrics["ratio_error"] < 1e-6
    assert metrics["noisy_share"] == pytest.approx(2 / 5)
    assert metrics["mismatch/logprob"] < 1e-5


def test_the_noise_is_annealed_with_the_step_and_falls_by_half_where_that_is_asked(new_trainer):
    trainer = new_trainer(*NOISY_ROLLOUT, "trainer.steps=6", "perturb.sigma=0.1")
    distances = []
    for step in (0, 4, 6):
        item = trainer.item(trainer.samples[0], step, 0, (False,) * 5)
        distances.append(float((item.noisy.pixel_values - item.raw.pixel_values).norm()))
    assert distances[1] / distances[0] == pytest.approx(0.5, abs=0.1)
    assert distances[2] < 0.02 * distances[0]


# ---------------------------------------------------------------------------------------------- dynamic sampling

DAPO = ("method=dapo", "rollout.prompts=2", "rollout.n=4")


@pytest.mark.parametrize("rounds", [2, 12])
def test_rounds_go_on_until_enough_groups_are_mixed_and_fill_up_after_the_last(new_trainer, rounds):
    trainer = new_trainer(*DAPO, f"rollout.rounds={rounds}", "trainer.updates=2")
    expected, mixed = [], []
    for number in range(rounds):
        expected += trainer.judge(trainer.generate(trainer.items(0, number)))
        mixed = [g.item.number for g in expected if len({score.accuracy for score in g.scores}) == 2]
        if len(mixed) >= 2:
            break
    others = [g.item.number for g in expected if g.item.number not in mixed]
    chosen = sorted((mixed + others)[:2])

    sums = Sums()
    found = trainer.rounds(sums, Clock())
    assert sums.sums["rounds"] == number + 1
    assert sums.sums["filled_share"] == max(0, 2 - len(mixed)) / 2
    assert [g.completions for g in found] == [g.completions for g in expected]
    assert [g.item.number for g in found if any(g.kept)] == chosen
    assert [g.item.part for g in found if any(g.kept)] == [0, 1]
    if rounds == 12:
        assert number > 0  # otherwise this says nothing: choose another seed
        assert len(mixed) >= 2


def test_every_round_has_prompts_draws_and_completions_of_its_own_and_no_history(new_trainer):
    settings = ("rollout.prompts=4", "rollout.rounds=3", "branch.probability=0.5")
    trainer, again = new_trainer(*settings), new_trainer(*settings)
    trainer.rounds(Sums(), Clock())
    seen = [item for number in range(3) for item in trainer.items(1, number)]
    trainer.step = again.step = 1
    assert [item.number for item in seen] == list(range(12))
    order = [sample.place for sample in (trainer.samples[i] for i in sample_order(24, 12, 12, 0))]
    assert [item.prompt.sample.place for item in seen] == order
    fresh = again.items(1, 2)
    assert [item.draws for item in fresh] == [item.draws for item in seen[8:]]
    completions = [group.completions for group in trainer.generate(seen[8:])]
    assert [group.completions for group in again.generate(fresh)] == completions


def test_what_is_not_trained_on_counts_in_the_metrics_of_the_rollout_and_moves_no_weight(new_trainer):
    trainer = new_trainer(*DAPO, "rollout.rounds=3")
    metrics, groups = trainer.run_step()
    accuracy = [score.accuracy for group in groups for score in group.scores]
    assert len(accuracy) == 8 * metrics["rounds"] > 8
    assert metrics["accuracy"] == pytest.approx(sum(accuracy) / len(accuracy))
    plain, dropped = new_trainer(*DAPO), new_trainer(*DAPO)
    first, _ = weights_after(plain, [group for group in groups if any(group.kept)])
    second, _ = weights_after(dropped, groups)
    assert torch.equal(first, second)


# ----------------------------------------------------------------------------------------------- loss and updates


def test_clipping_compares_with_the_old_log_probabilities(new_trainer, config):
    trainer = with_settings(new_trainer(*TWO_BY_TWO), config("method=grpo", "loss.clip_low=0.2", "loss.clip_high=0.3"))
    (batch,) = trainer.batches(drawn(both_groups(trainer, 1), torch.zeros(1, 2, dtype=torch.bool)))
    count = len(batch.targets)
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.2, 1.5]).repeat(count)[:count]
    old = torch.linspace(-3, -1, count)
    batch = replace(batch, old=(old, torch.zeros(count), None))
    sums = Sums()
    loss = trainer.loss(batch, old + ratio.log(), torch.ones(count), None, sums, first=True)
    expected, clipped = 0.0, 0
    for r, advantage in zip(ratio.tolist(), batch.advantages.tolist()):
        taken = min(r * advantage, min(max(r, 0.8), 1.3) * advantage)
        expected -= taken
        clipped += (advantage > 0 and r > 1.3) or (advantage < 0 and r < 0.8)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert clipped > 0
    assert sums.sums["clip_fraction"] == clipped
    assert sums.counts["clip_fraction"] == count


def test_old_statistics_and_not_new_ones_shape_the_advantage(new_trainer):
    trainer = new_trainer(*TWO_BY_TWO)
    batch = noisy_batch(trainer)
    zeros, ones = torch.zeros(len(batch.targets)), torch.ones(len(batch.targets))
    batch = replace(batch, old=(zeros, zeros, zeros))  # no uncertainty when it was drawn
    loss = trainer.loss(batch, zeros, ones, ones, Sums(), first=True)
    assert loss.item() == pytest.approx(-float(batch.advantages.sum()), rel=1e-5)


def test_a_token_mean_and_a_sequence_mean_by_hand(new_trainer):
    trainer = new_trainer("method=grpo", *TWO_BY_TWO)
    item = trainer.item(trainer.samples[0], 0, 0, (False, False))
    long, short = Completion((60, 61, 62, 63), (0.0,) * 4, "", True), Completion((64,), (0.0,), "", True)
    group = Group(item, False, (long, short), (), (1.0, -2.0), (True, True))
    found = {}
    for how in ("token-mean", "sequence-mean"):
        config = trainer.config.model_copy(update={"loss": trainer.config.loss.model_copy(update={"aggregation": how})})
        chosen = with_settings(trainer, config)
        (batch,) = chosen.batches([group])
        sums = Sums()
        chosen.loss(batch, torch.zeros(5), torch.zeros(5), None, sums, first=True)
        found[how] = sums.sums["loss"] / sums.counts["loss"]
    assert found["token-mean"] == pytest.approx(-(4 * 1.0 - 2.0) / 5)
    assert found["sequence-mean"] == pytest.approx(-(1.0 - 2.0) / 2)


def test_the_importance_cap_multiplies_by_the_truncated_ratio_to_the_engine(new_trainer, config):
    trainer = with_settings(new_trainer(*TWO_BY_TWO), config("method=grpo", "loss.importance_cap=2"))
    (batch,) = trainer.batches(drawn(both_groups(trainer, 1), torch.zeros(1, 2, dtype=torch.bool)))
    count = len(batch.targets)
    weights = torch.tensor([0.5, 1.0, 3.0]).repeat(count)[:count]
    logprob = torch.full((count,), -2.0)
    batch = replace(batch, rollout_logprob=logprob - weights.log())
    loss = trainer.loss(batch, logprob, torch.zeros(count), None, Sums(), first=True)
    assert loss.item() == pytest.approx(-float((weights.clamp(max=2) * batch.advantages).sum()), rel=1e-5)


def weights_after(trainer, groups):
    sums = Sums()
    trainer.update(groups, sums, Clock())
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]), sums


def groups_of_step(trainer):
    """This step's groups, with advantages that differ."""
    groups = trainer.generate(trainer.items(trainer.step))
    return [replace(g, advantages=tuple((-1.0) ** (i + j) * (1 + i) for j in range(2))) for i, g in enumerate(groups)]


MIXED = ("branch.probability=0.5", "branch.granularity=response", "perturb.sigma=0.8")


@pytest.mark.parametrize(
    "override",
    [
        "trainer.micro_batch_tokens=1",  # a row a micro-batch
        "trainer.micro_batch_tokens=150",
        "trainer.shared_prefix=false",
        "model.gradient_checkpointing=true",
    ],
)
def test_how_an_update_is_computed_does_not_change_it(new_trainer, override):
    plain, other = new_trainer(*MIXED), new_trainer(*MIXED, override)
    groups = groups_of_step(plain)
    before = torch.cat([p.detach().flatten() for p in plain.policy.parameters()])
    first, sums = weights_after(plain, groups)
    second, other_sums = weights_after(other, groups)
    moved = first - before
    assert moved.abs().max() > 5e-4
    # AdamW's first step is lr times the sign of the gradient: rounding turns a few of the smallest gradients around.
    assert ((first - second).abs() > 1e-5).float().mean() < 0.01
    for name in ("loss", "entropy", "u_per"):
        assert other_sums.sums[name] / other_sums.counts[name] == pytest.approx(
            sums.sums[name] / sums.counts[name], rel=1e-4
        )


def test_gradient_checkpointing_computes_a_layer_twice(new_trainer):
    calls = {}
    for checkpointing in (False, True):
        trainer = new_trainer("method=grpo", *TWO_BY_TWO, f"model.gradient_checkpointing={checkpointing}")
        calls[checkpointing] = 0

        def count(*_, key=checkpointing):
            calls[key] += 1

        trainer.policy.model.model.language_model.layers[0].mlp.register_forward_pre_hook(count)
        weights_after(trainer, groups_of_step(trainer))
    assert calls == {False: 1, True: 2}


def test_rows_that_cannot_share_a_prompt_are_separate_and_that_is_said_once(new_trainer):
    with pytest.warns(UserWarning, match="every completion is a row of its own: eager attention") as said:
        trainer = new_trainer(*TWO_BY_TWO, "model.attention=eager")
    trainer.run_step()
    assert len([warning for warning in said if "a row of its own" in str(warning.message)]) == 1
    (group,) = both_groups(trainer, 1)[:1]
    assert [len(row.completions) for row in trainer.rows(replace(group, kept=(True, True)))] == [1, 1]


def test_a_frozen_vision_tower_stays_as_it_is(new_trainer):
    trainer = new_trainer(*MIXED, "model.freeze_vision=true")
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    weights_after(trainer, groups_of_step(trainer))
    moved = {name for name, p in trainer.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".visual." not in name}


def test_several_updates_a_step_start_at_a_ratio_of_one_and_clip_against_the_weights_that_generated(new_trainer):
    settings = (*MIXED, "optimizer.lr=3e-3")
    twice, once = new_trainer(*settings, "trainer.updates=2"), new_trainer(*settings)
    groups = groups_of_step(twice)
    first, second = split(groups, 2)
    with torch.no_grad():
        old = [once.read(once.policy(batch)) for batch in once.batches(second)]
    _, sums_once = weights_after(once, first)  # what the first of two updates must do
    sums_second = Sums()
    for batch, statistics in zip(once.batches(second), old, strict=True):
        once.loss(replace(batch, old=statistics), *once.read(once.policy(batch)), sums_second, first=False)
    _, sums = weights_after(twice, groups)
    assert sums.counts["ratio_error"] == sums_once.counts["loss"]
    assert sums.sums["ratio_error"] / sums.counts["ratio_error"] < 1e-6
    assert sums_second.sums["clip_fraction"] > 0  # the step was large enough to say anything
    assert sums.sums["clip_fraction"] == sums_second.sums["clip_fraction"]
    assert sums.sums["loss"] == pytest.approx(sums_once.sums["loss"] + sums_second.sums["loss"], rel=1e-4)


def test_parts_of_a_step_share_its_prompts_equally_and_keep_a_prompt_together(new_trainer):
    trainer = new_trainer(*MIXED, "trainer.updates=2")
    groups = trainer.generate(trainer.items(trainer.step))
    parts = split(groups, 2)
    assert [sorted({group.item.number for group in part}) for part in parts] == [[0, 1], [2, 3]]
    assert [group for part in parts for group in part] == groups


def test_after_a_step_the_engine_has_the_policys_weights_and_their_version(new_trainer):
    trainer = new_trainer()
    before = dict(trainer.rollout.model.named_parameters())["model.language_model.embed_tokens.weight"].clone()
    metrics, groups = trainer.run_step()
    assert trainer.step == trainer.rollout.version == 1
    policy, engine = dict(trainer.policy.model.named_parameters()), dict(trainer.rollout.model.named_parameters())
    assert policy.keys() == engine.keys()
    assert all(torch.equal(policy[name], engine[name]) for name in policy)
    assert not torch.equal(engine["model.language_model.embed_tokens.weight"], before)
    assert metrics["ratio_error"] == 0
    assert metrics["mismatch/logprob"] < 1e-5
    assert metrics["noisy_share"] == 1
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    assert metrics["tokens"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("budget", [8192, 150])
def test_raw_rows_need_one_forward_and_noisy_rows_two(new_trainer, budget):
    trainer = new_trainer(*MIXED, f"trainer.micro_batch_tokens={budget}")
    groups = groups_of_step(trainer)
    batches = trainer.batches(groups)
    noisy = {id(c) for group in groups if group.noisy for c, keep in zip(group.completions, group.kept) if keep}
    compared = [{id(c) for c in batch.other.completions} if batch.other else set() for batch in batches]
    assert 0 < len(noisy) < sum(sum(group.kept) for group in groups)
    assert set().union(*compared) == noisy
    assert compared == sorted(compared, key=bool, reverse=True)  # noisy ones first, on every rank
    for batch, found in zip(batches, compared, strict=True):
        branches = trainer.policy(batch).branches
        assert (branches is None) == (not found)
        if found:
            first = sum(len(c.token_ids) for c in batch.completions if id(c) in found)
            assert len(branches.logprob_raw) == first
            assert batch.noisy.tolist() == [True] * first + [False] * (len(batch.targets) - first)


def test_a_step_says_how_long_each_of_its_phases_took(new_trainer):
    metrics, _ = new_trainer("trainer.updates=2").run_step()
    seconds = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
    parts = ("pack", "old", "forward", "backward", "update")
    assert seconds.keys() == {"data", "rollout", "reward", "train", "sync", *parts}
    assert all(value > 0 for value in seconds.values())
    assert 0.5 * seconds["train"] < sum(seconds[part] for part in parts) <= seconds["train"]


# ------------------------------------------------------------------------------- what a step skips, what it measures

NEVER, ALWAYS = "trainer.measure_every=0", "trainer.measure_every=1"


def whole_gradient(trainer, groups):
    """The gradient of an update's summed loss, flat, and how many tokens it reads."""
    gradient = loss_gradient(trainer, groups, normalise=False)
    return gradient, sum(len(batch.targets) for batch in trainer.batches(groups))


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_leaving_out_what_sends_no_gradient_leaves_the_gradient_as_it_is(new_trainer, config, aggregation):
    settings = ("rollout.n=3", "branch.probability=0.5", "perturb.sigma=0.8", f"loss.aggregation={aggregation}")
    everything = new_trainer(*settings, ALWAYS)
    needed = with_settings(everything, config(*settings, NEVER))
    groups = everything.generate(everything.items(0))
    assert {group.noisy for group in groups} == {True, False}
    advantages = [(0.0, 0.0, 0.0), (1.0, -2.0, 0.5), (0.0, 1.0, -1.0), (0.0, 0.0, 0.0)]
    groups = [replace(group, advantages=a) for group, a in zip(groups, advantages, strict=True)]
    (first, read), (second, read_less) = whole_gradient(everything, groups), whole_gradient(needed, groups)
    assert first.norm() > 1e-3
    assert (first - second).norm() < 1e-5 * first.norm()
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    assert read == sum(map(sum, lengths))
    assert read_less == sum(lengths[1]) + sum(lengths[2][1:])


def test_the_loss_of_a_step_counts_what_was_left_out(new_trainer):
    found = {}
    for every in (NEVER, ALWAYS):
        trainer = new_trainer(*MIXED, every)
        groups = trainer.generate(trainer.items(0))
        groups = [replace(group, advantages=(1.5 * (i % 2), -0.5 * (i % 2))) for i, group in enumerate(groups)]
        _, sums = weights_after(trainer, groups)
        names = ("loss", "entropy", "u_per", "clip_fraction", "out_capped", "per_capped", "mismatch/logprob")
        found[every] = {name: sums.sums[name] / sums.counts[name] for name in names}
        share = sums.sums["trained_share"] / sums.counts["trained_share"]
        assert (share == 1) == (every == ALWAYS)
    assert found[NEVER] == pytest.approx(found[ALWAYS], rel=1e-4, abs=1e-7)


def test_the_other_branch_is_computed_only_where_its_divergence_is_rewarded(new_trainer, config):
    trainer = new_trainer(*TWO_BY_TWO)
    groups = both_groups(trainer, 1)
    assert [row.compared for group in groups for row in trainer.rows(group)] == [False, True]
    without = with_settings(trainer, config(*TWO_BY_TWO, "guidance.alpha_per=0"))
    assert [row.compared for group in groups for row in without.rows(group)] == [False, False]
    batches = without.batches([groups[1]])
    assert torch.equal(batches[0].view.pixel_values, groups[1].item.noisy.pixel_values)
    assert without.policy(batches[0]).branches is None
    assert without.loss(batches[0], *without.read(without.policy(batches[0])), Sums(), first=True).isfinite()


def test_a_step_without_any_gradient_is_still_an_update(new_trainer):
    trainer = new_trainer(*TWO_BY_TWO, "optimizer.weight_decay=0.1")
    groups = [replace(group, advantages=(0.0, 0.0)) for group in trainer.generate(trainer.items(0))]
    before = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    after, sums = weights_after(trainer, groups)
    torch.testing.assert_close(after, before * (1 - 1e-3 * 0.1), rtol=1e-6, atol=1e-9)  # AdamW's decay alone
    assert sums.sums["loss"] == 0 < sums.counts["loss"]


def test_a_step_that_drops_every_completion_is_still_an_update(new_trainer):
    none_ends = ("rollout.max_tokens=2", "loss.drop_unfinished=true")
    trainer = new_trainer(*TWO_BY_TWO, *none_ends, "optimizer.weight_decay=0.1")
    before = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    metrics, _ = trainer.run_step()
    after = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    torch.testing.assert_close(after, before * (1 - 1e-3 * 0.1), rtol=1e-6, atol=1e-9)
    assert metrics["finished"] == metrics["throughput/train"] == 0
    assert "loss" not in metrics  # a mean over nothing


def test_a_measuring_step_changes_nothing_that_is_drawn_generated_or_perturbed(new_trainer):
    never, always = (new_trainer("branch.probability=0.5", every) for every in (NEVER, ALWAYS))
    for a, b in zip(never.items(0), always.items(0), strict=True):
        assert (a.number, a.draws, a.prompt.sample.place) == (b.number, b.draws, b.prompt.sample.place)
        assert b.noisy is not None
        assert a.noisy is None or torch.equal(a.noisy.pixel_values, b.noisy.pixel_values)
    first, second = (trainer.generate(trainer.items(0)) for trainer in (never, always))
    assert [group.completions for group in first] == [group.completions for group in second]


def test_grpo_has_its_divergence_measured_on_every_kth_step_and_is_trained_without_it(new_trainer):
    trainer = new_trainer("method=grpo", "trainer.measure_every=2", "perturb.sigma=0.8")
    for step in range(3):
        metrics, groups = trainer.run_step()
        names = {name for name in metrics if name.startswith("measured/")}
        assert names == ({"measured/entropy", "measured/u_per"} if step % 2 == 0 else set())
        assert not {"u_per", "per_capped"} & metrics.keys()
        traces = [trace for group in groups for trace in group.traces]
        if step % 2 == 0:
            u_per = torch.cat([trace.u_per for trace in traces])
            assert metrics["measured/u_per"] == pytest.approx(float(u_per.mean()), rel=1e-5)
            assert u_per.max() > 1e-6
            assert metrics["trained_share"] == 1
        else:
            assert all(trace.u_per is None for trace in traces if trace)


@pytest.mark.parametrize("override", ["trainer.shared_prefix=true", "trainer.shared_prefix=false"])
def test_each_completion_gets_the_values_of_its_own_tokens(new_trainer, override):
    trainer = new_trainer(*MIXED, "trainer.micro_batch_tokens=150", override, ALWAYS)
    groups = groups_of_step(trainer)
    expected = {}
    for group in groups:
        for i, completion in enumerate(group.completions):
            alone = replace(group, kept=tuple(j == i for j in range(2)))
            (batch,) = trainer.batches([alone])
            stats = trainer.policy(batch)
            expected[id(completion)] = (stats.entropy.detach(), stats.branches.symmetric_kl.detach())
    kept = {id(c) for group in groups for c, keep in zip(group.completions, group.kept) if keep}
    traces = trainer.update(groups, Sums(), Clock())
    assert traces.keys() == kept
    for key, trace in traces.items():
        torch.testing.assert_close(trace.entropy, expected[key][0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(trace.u_per, expected[key][1], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- loading ahead


def test_a_step_trains_on_what_was_loaded_ahead_and_that_is_what_it_would_load_itself(new_trainer):
    trainer = new_trainer("branch.probability=0.5")
    for trainer.step in range(3):
        ahead, now = trainer.items_ahead(), trainer.items(trainer.step)
        assert [item.number for item in ahead] == [item.number for item in now]
        for a, b in zip(ahead, now, strict=True):
            assert a.prompt.sample is b.prompt.sample
            assert a.draws == b.draws
            assert torch.equal(a.raw.pixel_values, b.raw.pixel_values)
            assert (a.noisy is None) == (b.noisy is None)
            assert a.noisy is None or torch.equal(a.noisy.pixel_values, b.noisy.pixel_values)
        assert trainer._ahead[0] == trainer.step + 1
    trainer.step = 3  # the last of 4: nothing comes after it
    trainer.items_ahead()
    assert trainer._ahead is None


def test_loading_ahead_takes_one_thread_and_leaves_the_others_to_training(new_trainer):
    trainer, threads = new_trainer(), torch.get_num_threads()
    trainer.run_step()
    assert trainer._background.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == threads


def test_an_image_that_goes_missing_stops_the_step_that_needs_it_with_its_samples_name(new_trainer):
    trainer = new_trainer()
    order = sample_order(len(trainer.samples), 4, 4, 0)  # of step 1
    broken = trainer.samples[order[2]]
    trainer.samples[order[2]] = replace(broken, images=(Path("gone.png"),))
    trainer.items_ahead()  # step 0, while step 1 is loaded
    trainer.step = 1
    with pytest.raises(DataError, match=f"{re.escape(broken.place)}: image 1 of 1 .*gone.png"):
        trainer.items_ahead()


# ----------------------------------------------------------------------------------------------------- data order


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 9))
def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own(size, count, seed):
    steps = 3 * size // count + 1
    order = [i for step in range(steps) for i in sample_order(size, step * count, count, seed)]
    for epoch in range(len(order) // size):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert order == sample_order(size, 0, steps * count, seed)  # however it is cut into steps


def test_seeds_and_epochs_shuffle_differently():
    assert sample_order(50, 0, 50, seed=0) != sample_order(50, 0, 50, seed=1)
    assert sample_order(50, 0, 50, seed=0) != sample_order(50, 50, 50, seed=0)


def test_ranks_share_a_steps_prompts_without_overlap(new_trainer):
    trainer = new_trainer("branch.probability=0.5")
    alone = [(item.number, item.prompt.sample.place, item.draws) for item in trainer.items(trainer.step)]
    shared = []
    for rank in (1, 0):
        other = copy.copy(trainer)
        other.rank, other.ranks = rank, 2
        shared += [(item.number, item.prompt.sample.place, item.draws) for item in other.items(other.step)]
    assert sorted(shared) == alone


def test_ranks_share_each_updates_prompts_so_that_their_work_is_alike(new_trainer):
    trainer = new_trainer("method=grpo", "rollout.prompts=8", "trainer.updates=2")
    trainer.lengths = [10 + (7 * i) % 24 for i in range(len(trainer.samples))]
    work, numbers = [], []
    for rank in (0, 1):
        other = copy.copy(trainer)
        other.rank, other.ranks = rank, 2
        items = other.items(other.step)
        numbers.append([item.number for item in items])
        lengths = {sample.place: length for sample, length in zip(trainer.samples, trainer.lengths)}
        work.append(sum(lengths[item.prompt.sample.place] for item in items))
    assert [sum(number < 4 for number in mine) for mine in numbers] == [2, 2]
    assert sorted(numbers[0] + numbers[1]) == list(range(8))
    assert abs(work[0] - work[1]) <= 24


def test_prompts_that_ranks_cannot_share_are_refused(config):
    with pytest.raises(ConfigError, match=r"rollout.prompts / trainer.updates = 2 .* 3 ranks"):
        _check_split(config("trainer.updates=2"), 3)
