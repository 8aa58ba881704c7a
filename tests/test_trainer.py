"""The trainer's step on a real, random model: what it adds to the equations, which have tests of their own."""

from dataclasses import replace

import pytest
import torch
from steps import (
    TWO_BY_TWO,
    batches_of,
    both_groups,
    drawn,
    generated,
    group_of,
    loss_gradient,
    noisy_batch,
    objective_of,
    rows_of,
    weights_after,
    with_settings,
)

from vogue.method.uncertainty import Signals
from vogue.metrics import Clock, Means
from vogue.model.packing import Place
from vogue.rollout.engine import Completion
from vogue.step.groups import in_updates

# ----------------------------------------------------------------------------------------------- loss and updates


def test_clipping_compares_with_the_old_log_probabilities(new_trainer, config):
    trainer = with_settings(new_trainer(*TWO_BY_TWO), config("method=grpo", "loss.clip_low=0.2", "loss.clip_high=0.3"))
    (batch,) = batches_of(trainer, drawn(both_groups(trainer, 1), torch.zeros(1, 2, dtype=torch.bool)))
    count = len(batch.targets)
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.2, 1.5]).repeat(count)[:count]
    old = torch.linspace(-3, -1, count)
    batch = replace(batch, old=Signals(old, torch.zeros(count), None))
    loss, sums = objective_of(trainer, batch, Signals(old + ratio.log(), torch.ones(count), None))
    expected, clipped = 0.0, 0
    for r, advantage in zip(ratio.tolist(), batch.advantages.tolist()):
        taken = min(r * advantage, min(max(r, 0.8), 1.3) * advantage)
        expected -= taken
        clipped += (advantage > 0 and r > 1.3) or (advantage < 0 and r < 0.8)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert clipped > 0
    assert sums["clip_fraction"].total == clipped
    assert sums["clip_fraction"].count == count


def test_old_statistics_and_not_new_ones_shape_the_advantage(new_trainer):
    trainer = new_trainer(*TWO_BY_TWO)
    batch = noisy_batch(trainer)
    zeros, ones = torch.zeros(len(batch.targets)), torch.ones(len(batch.targets))
    batch = replace(batch, old=Signals(zeros, zeros, zeros))  # no uncertainty when it was drawn
    loss = objective_of(trainer, batch, Signals(zeros, ones, ones)).loss
    assert loss.item() == pytest.approx(-float(batch.advantages.sum()), rel=1e-5)


def test_a_token_mean_and_a_sequence_mean_by_hand(new_trainer):
    trainer = new_trainer("method=grpo", *TWO_BY_TWO)
    item = trainer.loader.item(trainer.loader.samples[0], 0, 0, (False, False))
    long, short = Completion((60, 61, 62, 63), (0.0,) * 4, "", True), Completion((64,), (0.0,), "", True)
    group = group_of(item, (long, short), advantages=(1.0, -2.0))
    found = {}
    for how in ("token-mean", "sequence-mean"):
        config = trainer.config.model_copy(update={"loss": trainer.config.loss.model_copy(update={"aggregation": how})})
        chosen = with_settings(trainer, config)
        (batch,) = batches_of(chosen, [group])
        _, sums = objective_of(chosen, batch, Signals(torch.zeros(5), torch.zeros(5), None))
        found[how] = sums["loss"].total / sums["loss"].count
    assert found["token-mean"] == pytest.approx(-(4 * 1.0 - 2.0) / 5)
    assert found["sequence-mean"] == pytest.approx(-(1.0 - 2.0) / 2)


def test_a_constant_divisor_is_the_completions_times_the_most_tokens(new_trainer):
    trainer = new_trainer("method=dr_grpo", *TWO_BY_TWO)
    groups = groups_of_step(trainer)
    _, sums = weights_after(trainer, groups)
    batches = batches_of(trainer, groups)
    total = sum(float((batch.weights * batch.advantages).sum()) for batch in batches)  # at a ratio of 1
    assert sums["loss"].count == 2 * 2 * 12  # completions, and rollout.max_tokens
    assert sums["loss"].total == pytest.approx(-total, rel=1e-4, abs=1e-6)
    assert {float(weight) for batch in batches for weight in batch.weights} == {1.0}


def test_the_importance_cap_multiplies_by_the_truncated_ratio_to_the_engine(new_trainer, config):
    trainer = with_settings(new_trainer(*TWO_BY_TWO), config("method=grpo", "loss.importance_cap=2"))
    (batch,) = batches_of(trainer, drawn(both_groups(trainer, 1), torch.zeros(1, 2, dtype=torch.bool)))
    count = len(batch.targets)
    weights = torch.tensor([0.5, 1.0, 3.0]).repeat(count)[:count]
    logprob = torch.full((count,), -2.0)
    batch = replace(batch, engine_logprob=logprob - weights.log())
    loss = objective_of(trainer, batch, Signals(logprob, torch.zeros(count), None)).loss
    assert loss.item() == pytest.approx(-float((weights.clamp(max=2) * batch.advantages).sum()), rel=1e-5)


def groups_of_step(trainer):
    """This step's groups, with advantages that differ."""
    groups = generated(trainer, trainer.loader.items(trainer.step))
    return [replace(g, advantages=tuple((-1.0) ** (i + j) * (1 + i) for j in range(2))) for i, g in enumerate(groups)]


MIXED = ("branch.probability=0.5", "branch.granularity=response", "perturb.sigma=0.8")


@pytest.mark.parametrize(
    "override",
    [
        "trainer.micro_batch_tokens=1",  # a completion a row, a row a micro-batch
        "trainer.micro_batch_tokens=150",
        "trainer.shared_prefix=false",
        "model.gradient_checkpointing=true",
        "model.keep_logits_gb=0.001",
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
        assert other_sums[name].total / other_sums[name].count == pytest.approx(
            sums[name].total / sums[name].count, rel=1e-4
        )


def test_gradient_checkpointing_computes_a_layer_twice(new_trainer):
    calls = {}
    for checkpointing in (False, True):
        trainer = new_trainer("method=grpo", *TWO_BY_TWO, f"model.gradient_checkpointing={checkpointing}")
        calls[checkpointing] = 0

        def count(*_, key=checkpointing):
            calls[key] += 1

        groups = groups_of_step(trainer)  # generated by the same layers
        trainer.policy.model.model.language_model.layers[0].mlp.register_forward_pre_hook(count)
        weights_after(trainer, groups)
    assert calls == {False: 1, True: 2}


def test_rows_that_cannot_share_a_prompt_are_separate_and_that_is_said_once(new_trainer):
    with pytest.warns(UserWarning, match="every completion is a row of its own: eager attention") as said:
        trainer = new_trainer(*TWO_BY_TWO, "model.attention=eager")
    trainer.run_step()
    assert len([warning for warning in said if "a row of its own" in str(warning.message)]) == 1
    (group,) = both_groups(trainer, 1)[:1]
    assert [len(row.completions) for row in rows_of(trainer, replace(group, kept=(True, True)))] == [1, 1]


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
    first, second = (list(part.values()) for part in in_updates(groups, 2))
    with torch.no_grad():
        old = [once.signals(batch, once.policy(batch)) for batch in batches_of(once, second)]
    _, sums_once = weights_after(once, first)  # what the first of two updates must do
    sums_second = Means()
    for batch, before in zip(batches_of(once, second), old, strict=True):
        sums_second.add_all(objective_of(once, replace(batch, old=before), first=False).metrics)
    _, sums = weights_after(twice, groups)
    assert sums["ratio_error"].count == sums_once["loss"].count
    assert sums["ratio_error"].total / sums["ratio_error"].count < 1e-6
    assert sums_second["clip_fraction"].total > 0  # the step was large enough to say anything
    assert sums["clip_fraction"].total == sums_second["clip_fraction"].total
    assert sums["loss"].total == pytest.approx(sums_once["loss"].total + sums_second["loss"].total, rel=1e-4)


def test_parts_of_a_step_share_its_prompts_equally_and_keep_a_prompt_together(new_trainer):
    trainer = new_trainer(*MIXED, "trainer.updates=2")
    groups = generated(trainer, trainer.loader.items(trainer.step))
    parts = in_updates(groups, 2)
    assert [sorted({group.item.number for group in part.values()}) for part in parts] == [[0, 1], [2, 3]]
    assert {number: group for part in parts for number, group in part.items()} == dict(enumerate(groups))


def test_after_a_step_the_engine_has_the_policys_weights_and_their_version(new_trainer):
    trainer = new_trainer()
    before = dict(trainer.engine.model.named_parameters())["model.language_model.embed_tokens.weight"].clone()
    metrics, groups = trainer.run_step()
    assert trainer.step == trainer.engine.version == 1
    policy, engine = dict(trainer.policy.model.named_parameters()), dict(trainer.engine.model.named_parameters())
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
    batches = batches_of(trainer, groups)
    noisy = {id(c) for g in groups if g.view == "noisy" for c, keep in zip(g.completions, g.kept) if keep}
    compared = [{id(c) for other in batch.others for c in other.completions} for batch in batches]
    assert 0 < len(noisy) < sum(sum(group.kept) for group in groups)
    assert set().union(*compared) == noisy
    assert compared == sorted(compared, key=bool, reverse=True)  # noisy ones first, on every rank
    for batch, found in zip(batches, compared, strict=True):
        other = trainer.policy(batch).other
        assert (other is None) == (not found)
        if found:
            first = sum(len(c.token_ids) for c in batch.completions if id(c) in found)
            assert len(other.logprob) == first
            assert batch.noisy.tolist() == [True] * first + [False] * (len(batch.targets) - first)


def test_the_same_prompts_are_answered_anew_at_every_step(new_trainer):
    trainer = new_trainer("rollout.temperature=2")
    items = trainer.loader.items(0)
    found = {}
    for trainer.step in (0, 1):
        found[trainer.step] = [group.completions for group in generated(trainer, items)]
        assert [group.completions for group in generated(trainer, items)] == found[trainer.step]
    assert found[0] != found[1]


def test_what_is_trained_is_the_distribution_that_was_sampled_from_at_any_temperature(new_trainer):
    metrics, _ = new_trainer("rollout.temperature=0.6").run_step()
    assert metrics["mismatch/logprob"] < 1e-4


def test_an_update_is_one_step_after_its_last_micro_batch(new_trainer, monkeypatch):
    trainer = new_trainer(*MIXED, "trainer.micro_batch_tokens=1", "trainer.updates=2")
    backward, seen = trainer.deepspeed.backward, []

    def record(loss):
        seen.append(trainer.deepspeed.is_gradient_accumulation_boundary())
        backward(loss)

    monkeypatch.setattr(trainer.deepspeed, "backward", record)
    groups = groups_of_step(trainer)
    counts = [len(batches_of(trainer, list(part.values()))) for part in in_updates(groups, 2)]
    weights_after(trainer, groups)
    assert min(counts) > 1
    assert seen == [i == count - 1 for count in counts for i in range(count)]


def test_gradients_are_clipped_to_the_norm_that_is_set(new_trainer):
    # AdamW's first moment after one update is (1 - beta_1) times the gradient as it was clipped.
    for most in (1e-3, 1e3):
        partitions = "trainer.deepspeed.zero_optimization.stage=1"  # as by default
        trainer = new_trainer(*MIXED, partitions, f"optimizer.max_grad_norm={most}", "optimizer.betas=[0.9,0.99]")
        groups = groups_of_step(trainer)
        expected = loss_gradient(trainer, groups).norm().item()  # of the mean over all tokens
        _, means = weights_after(trainer, groups)
        norm = means["grad_norm"].total
        assert norm == pytest.approx(expected, rel=1e-3)
        assert 1e-3 < norm < 1e3
        moments = [state["exp_avg"].flatten() for state in trainer.deepspeed.optimizer.optimizer.state.values()]
        assert torch.cat(moments).norm().item() == pytest.approx(0.1 * min(norm, most), rel=1e-3)


def test_only_updates_in_a_row_without_a_finite_gradient_end_a_run(new_trainer):
    trainer, means = new_trainer("trainer.deepspeed.zero_optimization.stage=1"), Means()
    for norm in (float("inf"), float("nan"), 1.0, float("inf"), float("inf")):
        trainer.check_gradient(norm, means)
    assert means["skipped_updates"] == (4, 5)
    assert means["grad_norm"] == (1.0, 1)
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        trainer.check_gradient(float("inf"), means)


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
    return gradient, sum(len(batch.targets) for batch in batches_of(trainer, groups))


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_leaving_out_what_sends_no_gradient_leaves_the_gradient_as_it_is(new_trainer, config, aggregation):
    settings = ("rollout.n=3", "branch.probability=0.5", "perturb.sigma=0.8", f"loss.aggregation={aggregation}")
    everything = new_trainer(*settings, ALWAYS)
    needed = with_settings(everything, config(*settings, NEVER))
    groups = generated(everything, everything.loader.items(0))
    assert {group.view for group in groups} == {"raw", "noisy"}
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
        groups = generated(trainer, trainer.loader.items(0))
        groups = [replace(group, advantages=(1.5 * (i % 2), -0.5 * (i % 2))) for i, group in enumerate(groups)]
        _, sums = weights_after(trainer, groups)
        names = ("loss", "entropy", "u_per", "clip_fraction", "out_capped", "per_capped", "mismatch/logprob")
        found[every] = {name: sums[name].total / sums[name].count for name in names}
        share = sums["trained_share"].total / sums["trained_share"].count
        assert (share == 1) == (every == ALWAYS)
    assert found[NEVER] == pytest.approx(found[ALWAYS], rel=1e-4, abs=1e-7)


def test_the_other_branch_is_computed_only_where_its_divergence_is_rewarded(new_trainer, config):
    trainer = new_trainer(*TWO_BY_TWO)
    groups = both_groups(trainer, 1)
    assert [row.compared for group in groups for row in rows_of(trainer, group)] == [False, True]
    without = with_settings(trainer, config(*TWO_BY_TWO, "guidance.alpha_per=0"))
    assert [row.compared for group in groups for row in rows_of(without, group)] == [False, False]
    batches = batches_of(without, [groups[1]])
    assert torch.equal(batches[0].images.pixel_values, groups[1].item.views["noisy"].pixel_values)
    assert without.policy(batches[0]).other is None
    signals = without.signals(batches[0], without.policy(batches[0]))
    assert objective_of(without, batches[0], signals).loss.isfinite()


def test_a_step_without_any_gradient_is_still_an_update(new_trainer):
    trainer = new_trainer(*TWO_BY_TWO, "optimizer.weight_decay=0.1")
    groups = [replace(group, advantages=(0.0, 0.0)) for group in generated(trainer, trainer.loader.items(0))]
    before = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    after, sums = weights_after(trainer, groups)
    torch.testing.assert_close(after, before * (1 - 1e-3 * 0.1), rtol=1e-6, atol=1e-9)  # AdamW's decay alone
    assert sums["loss"].total == 0 < sums["loss"].count


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
    for a, b in zip(never.loader.items(0), always.loader.items(0), strict=True):
        assert (a.number, a.draws, a.prompt.sample.place) == (b.number, b.draws, b.prompt.sample.place)
        assert "noisy" in b.views
        assert "noisy" not in a.views or torch.equal(a.views["noisy"].pixel_values, b.views["noisy"].pixel_values)
    first, second = (generated(trainer, trainer.loader.items(0)) for trainer in (never, always))
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
    for number, group in enumerate(groups):
        for i in range(len(group.completions)):
            alone = replace(group, kept=tuple(j == i for j in range(2)))
            (batch,) = batches_of(trainer, [alone])
            stats = trainer.policy(batch)
            expected[Place(number, i)] = (stats.entropy.detach(), stats.other.symmetric_kl)
    kept = {Place(n, i) for n, group in enumerate(groups) for i, keep in enumerate(group.kept) if keep}
    traces = trainer.update(groups, Means(), Clock())
    assert traces.keys() == kept
    for key, trace in traces.items():
        torch.testing.assert_close(trace.entropy, expected[key][0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(trace.u_per, expected[key][1], rtol=1e-3, atol=1e-5)
