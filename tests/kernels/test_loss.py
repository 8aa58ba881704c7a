"""The bonuses and weights against numbers worked out by hand, their properties for any numbers, and VogueLoss."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vogue_kernels import (
    IGNORE,
    GuidanceConfig,
    VogueLoss,
    guidance,
    shaped_advantage,
    token_weights,
)

advantages = st.floats(-10, 10, width=32)
uncertainties = st.floats(0, 20, width=32)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_guidance_is_the_scaled_uncertainty_capped_by_the_advantage():
    # min(|A| / 2, 0.4 u): A = 1, u = 0.5: min(0.5, 0.2); A = −1, u = 5: min(0.5, 2); A = 0: 0.
    close(guidance(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 5.0, 3.0]), 0.4, 2.0), [0.2, 0.5, 0.0])


def test_guidance_stops_the_gradient_of_the_uncertainty():
    uncertainty = torch.tensor([0.5], requires_grad=True)
    assert not guidance(torch.tensor([1.0]), uncertainty, 0.4, 2.0).requires_grad


def test_shaped_advantage_adds_the_perception_bonus_to_noisy_tokens_only():
    # token 0, raw:   A = 1,  H = 2:   g_out = min(0.5, 0.8) = 0.5 capped                              → 1.5
    # token 1, noisy: A = 1,  H = 0.5: g_out = min(0.5, 0.2) = 0.2; u = 0.1: g_per = min(0.5, 0.1)      → 1.3
    # token 2, noisy: A = −2, H = 3:   g_out = min(1, 1.2) = 1 capped; u = 4: g_per = min(1, 4) capped   → 0
    shaped = shaped_advantage(
        torch.tensor([1.0, 1.0, -2.0]),
        torch.tensor([2.0, 0.5, 3.0]),
        torch.tensor([9.0, 0.1, 4.0]),
        torch.tensor([False, True, True]),
        GuidanceConfig(),
    )
    close(shaped.advantage, [1.5, 1.3, 0.0])
    assert shaped.out_capped.tolist() == [True, False, True]
    assert shaped.per_capped.tolist() == [False, False, True]


@pytest.mark.parametrize(
    "order, sign, expected, out_capped",
    [
        # A = 1,  H = 2, u = 0.3: g_per = 0.3, g_out = min(0.5, 0.8), or min(1.3 / 2, 0.8), or min(0.7 / 2, 0.8)
        # A = −2, H = 3, u = 4:   g_per = 1,   g_out = min(1, 1.2), or min(1 / 2, 1.2), or min(3 / 2, 1.2)
        ("parallel", 1.0, [1.8, 0.0], [True, True]),
        ("sequential", 1.0, [1.95, -0.5], [True, True]),
        ("parallel", -1.0, [1.2, -2.0], [True, True]),
        ("sequential", -1.0, [1.05, -1.8], [True, False]),
        ("parallel", 0.0, [1.5, -1.0], [True, True]),
    ],
)
def test_the_bonuses_order_and_the_sign_of_the_perceptions(order, sign, expected, out_capped):
    shaped = shaped_advantage(
        torch.tensor([1.0, -2.0]),
        torch.tensor([2.0, 3.0]),
        torch.tensor([0.3, 4.0]),
        torch.tensor(True),
        GuidanceConfig(order=order),
        sign,
    )
    close(shaped.advantage, expected)
    assert shaped.out_capped.tolist() == out_capped
    assert shaped.per_capped.tolist() == [False, True]


def test_alpha_zero_switches_a_signal_off():
    off = GuidanceConfig(alpha_out=0, alpha_per=0)
    shaped = shaped_advantage(torch.tensor([1.5]), torch.tensor([2.0]), None, torch.tensor([True]), off)
    assert shaped.advantage.tolist() == [1.5] and not shaped.out_capped.any() and not shaped.per_capped.any()


def test_noisy_tokens_without_their_uncertainty_are_refused():
    with pytest.raises(ValueError, match="perception uncertainty"):
        shaped_advantage(torch.ones(1), torch.ones(1), None, torch.tensor([True]), GuidanceConfig())


@pytest.mark.parametrize(
    "setting", [dict(alpha_out=-0.1), dict(beta_per=0.0), dict(beta_out=float("nan")), dict(order="reverse")]
)
def test_a_guidance_setting_out_of_range_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GuidanceConfig(**setting)


PAPER = GuidanceConfig()


def shaped_value(advantage, entropy, perception, noisy, config=PAPER):
    row = [torch.tensor([x], dtype=torch.float32) for x in (advantage, entropy, perception)]
    return shaped_advantage(*row, torch.tensor([noisy]), config).advantage.item()


@given(uncertainties, uncertainties, st.booleans())
def test_there_is_no_bonus_where_the_advantage_is_zero(entropy, perception, noisy):
    assert shaped_value(0.0, entropy, perception, noisy) == 0


@given(advantages, uncertainties, uncertainties, st.booleans(), st.floats(0, 5), st.floats(0.1, 5))
def test_a_bonus_is_never_negative(advantage, entropy, perception, noisy, alpha, beta):
    assert shaped_value(advantage, entropy, perception, noisy, GuidanceConfig(alpha, beta, alpha, beta)) >= advantage


@given(advantages, uncertainties, uncertainties, st.booleans())
def test_with_beta_two_the_sign_never_changes_and_the_size_at_most_doubles(advantage, entropy, perception, noisy):
    shaped = shaped_value(advantage, entropy, perception, noisy)
    if advantage <= 0:
        assert advantage <= shaped <= 0
    else:
        assert advantage <= shaped <= 2 * advantage


def test_token_weights_are_the_reciprocals_they_should_be():
    # 4 tokens in 2 sequences that have any: token-mean 1/4; sequence-mean 1/(2 · 3), –, 1/(2 · 1)
    close(token_weights(torch.tensor([3, 0, 1]), "token-mean"), [0.25, 0.0, 0.25])
    close(token_weights(torch.tensor([3, 0, 1]), "sequence-mean"), [1 / 6, 0.0, 0.5])
    close(token_weights(torch.tensor([3, 0, 1]), "constant", max_tokens=8), [1 / 16, 0.0, 1 / 16])  # 1/(2 · 8)
    assert token_weights(torch.tensor([0, 0]), "sequence-mean").tolist() == [0, 0]
    with pytest.raises(ValueError, match="unknown aggregation 'sum'"):
        token_weights(torch.tensor([1]), "sum")


def test_token_weights_divide_by_the_number_from_outside():
    # 3 sequences of a batch of 4 that has 10 tokens: token-mean 1/10; sequence-mean 1/(4 · 3), –, 1/(4 · 1)
    close(token_weights(torch.tensor([3, 0, 1]), "token-mean", 10), [0.1, 0.0, 0.1])
    close(token_weights(torch.tensor([3, 0, 1]), "sequence-mean", torch.tensor(4)), [1 / 12, 0.0, 0.25])
    close(token_weights(torch.tensor([3, 0, 1]), "constant", 4, 8), [1 / 32, 0.0, 1 / 32])
    assert token_weights(torch.tensor([0]), "token-mean", 0).tolist() == [0]  # a batch with everything masked
    for wrong in (-1, math.nan):
        with pytest.raises(ValueError, match=f"must not be negative, got {wrong}"):
            token_weights(torch.tensor([1]), "token-mean", wrong)


@pytest.mark.parametrize("most", [None, 0])
def test_a_constant_divisor_needs_the_most_tokens_of_a_sequence(most):
    with pytest.raises(ValueError, match=f"aggregation=constant divides by .* max_tokens={most}"):
        token_weights(torch.tensor([1]), "constant", max_tokens=most)
    with pytest.raises(ValueError, match=f"max_tokens={most}"):
        VogueLoss(aggregation="constant", max_tokens=most)


@pytest.mark.parametrize("how", ["token-mean", "sequence-mean"])
def test_any_split_into_micro_batches_sums_to_the_loss_of_the_whole(how):
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])
    per_token = torch.randn(9)
    weights = token_weights(torch.bincount(ids), how)[ids]
    means = [per_token[ids == i].mean() for i in range(4)]
    whole = per_token.mean() if how == "token-mean" else sum(means) / 4
    for split in (1, 2, 5, 8):
        parts = (weights[:split] * per_token[:split]).sum() + (weights[split:] * per_token[split:]).sum()
        torch.testing.assert_close(parts, whole)


# ---------------------------------------------------------------------------------------------------- VogueLoss


def batch(n=10, d=8, v=60):
    hidden, other, weight = (torch.randn(*shape, requires_grad=True) for shape in ((n, d), (n, d), (v, d)))
    return hidden, other, weight, torch.randint(v, (n,)), torch.randn(n)


@pytest.mark.parametrize("divergence", ["symmetric", "forward", "reverse"])
def test_vogue_loss_equals_the_equations_on_full_logits(divergence, backend):
    hidden, other, weight, targets, advantage = batch()
    noisy = torch.arange(10) % 3 == 0
    targets[4] = IGNORE
    mask = torch.arange(10) != 7
    old = oracle.linear_logprob(hidden, weight, targets, temperature=0.9).logprob.detach() + 0.3 * torch.randn(10)
    padded_old = old.masked_fill(~mask, torch.nan)  # padding may hold anything
    loss, metrics = VogueLoss(divergence=divergence, rollout="drawn", temperature=0.9, clip_high=0.28, backend=backend)(
        hidden, weight, targets, advantage, old_logprob=padded_old, mask=mask, hidden_other=other, noisy=noisy
    )

    kept = mask & (targets != IGNORE)
    stats = oracle.linear_branch_stats(hidden, other, weight, targets, temperature=0.9)
    # The behaviour branch of a noisy token is q, so raw ‖ noisy is other ‖ behaviour.
    forward, reverse = stats.kl_qp.detach(), stats.kl_pq.detach()
    perception = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[divergence]
    g_out = torch.minimum(advantage.abs() / 2, 0.4 * stats.entropy_p.detach())
    g_per = torch.minimum(advantage.abs() / 2, perception) * noisy
    shaped = advantage + g_out + g_per
    ratio = (stats.logprob_p - old).exp()
    per_token = -torch.minimum(ratio * shaped, ratio.clamp(0.8, 1.28) * shaped)
    expected = per_token[kept].sum() / 8
    torch.testing.assert_close(loss, expected)
    leaves = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))

    torch.testing.assert_close(metrics["entropy"], stats.entropy_p[kept].mean().detach())
    torch.testing.assert_close(metrics["u_per"], perception[kept & noisy].mean())
    torch.testing.assert_close(metrics["ratio_mean"], ratio[kept].mean().detach())
    torch.testing.assert_close(metrics["ratio_max"], ratio[kept].max().detach())
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("entropy", ["trained", "drawn"])
@pytest.mark.parametrize("divergence", ["symmetric", "forward", "reverse"])
def test_with_raw_rollouts_the_draw_decides_where_the_divergence_of_raw_tokens_is_paid(divergence, entropy, backend):
    raw, other, weight, targets, advantage = batch()
    drawn = torch.arange(10) % 3 == 0
    criterion = VogueLoss(divergence=divergence, rollout="raw", entropy=entropy, clip_dual=3.0, backend=backend)
    old = oracle.linear_logprob(raw, weight, targets).logprob.detach() + torch.randn(10)
    loss, metrics = criterion(raw, weight, targets, advantage, old_logprob=old, hidden_other=other, noisy=drawn)

    stats = oracle.linear_branch_stats(raw, other, weight, targets)
    perception = {
        "forward": stats.kl_pq,
        "reverse": stats.kl_qp,
        "symmetric": (stats.kl_pq + stats.kl_qp) / 2,
    }[divergence].detach()
    u_out = stats.entropy_p if entropy == "trained" else torch.where(drawn, stats.entropy_q, stats.entropy_p)
    g_out = torch.minimum(advantage.abs() / 2, 0.4 * u_out.detach())
    shaped = advantage + g_out + torch.minimum(advantage.abs() / 2, perception) * drawn
    ratio = (stats.logprob_p - old).exp()
    objective = torch.minimum(ratio * shaped, ratio.clamp(0.8, 1.2) * shaped)
    expected = -torch.where(shaped < 0, objective.maximum(3 * shaped), objective).mean()
    torch.testing.assert_close(loss, expected)
    leaves = (raw, weight)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    torch.testing.assert_close(metrics["entropy"], u_out.mean().detach())
    torch.testing.assert_close(metrics["u_per"], perception[drawn].mean())


def test_vogue_loss_averages_over_sequences_when_told_to(backend):
    hidden, _, weight, targets, advantage = batch(5)
    ids = torch.tensor([0, 0, 0, 1, 1])
    criterion = VogueLoss(aggregation="sequence-mean", backend=backend)
    loss, _ = criterion(hidden, weight, targets, advantage, sequence_ids=ids)
    entropy = oracle.linear_logprob(hidden, weight, targets).entropy.detach()
    shaped = advantage + torch.minimum(advantage.abs() / 2, 0.4 * entropy)  # ratio 1: the loss is −Â
    torch.testing.assert_close(loss, -(shaped[:3].mean() + shaped[3:].mean()) / 2)
    with pytest.raises(ValueError, match="needs sequence_ids"):
        criterion(hidden, weight, targets, advantage)


def padded(b=4, t=5, d=8, v=60):
    """hidden, weight, targets, advantages (b, 1), mask; the second sequence has two tokens, the last one none."""
    mask = torch.ones(b, t, dtype=torch.bool)
    mask[1, 2:] = mask[-1] = False
    hidden, weight = torch.randn(b, t, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    return hidden, weight, torch.randint(v, (b, t)), torch.tensor([1.0, -2.0, 0.5, 3.0])[:b, None], mask


def test_the_losses_of_unequal_micro_batches_sum_to_that_of_the_batch(backend):
    hidden, weight, targets, advantages, mask = padded()
    old = -4 + 0.1 * torch.randn(4, 5)
    for aggregation, items in (("token-mean", 12), ("sequence-mean", 3), ("constant", 3)):
        criterion = VogueLoss(aggregation=aggregation, max_tokens=5, backend=backend)
        whole, _ = criterion(hidden, weight, targets, advantages, old_logprob=old, mask=mask)
        parts = sum(
            criterion(
                *(hidden[part], weight, targets[part], advantages[part]),
                **{"old_logprob": old[part], "mask": mask[part], "num_items_in_batch": torch.tensor(items)},
            )[0]
            for part in (slice(0, 1), slice(1, 4))  # of 5 tokens and of 7
        )
        torch.testing.assert_close(parts, whole)
        leaves = (hidden, weight)
        torch.testing.assert_close(torch.autograd.grad(parts, leaves), torch.autograd.grad(whole, leaves))


def test_padded_completions_have_the_loss_of_packed_ones(backend):
    hidden, weight, targets, advantages, mask = padded()
    other, ids = torch.randn(4, 5, 8), torch.arange(4).repeat_interleave(5)
    for aggregation in ("token-mean", "sequence-mean", "constant"):
        criterion = VogueLoss(aggregation=aggregation, max_tokens=5, backend=backend)
        options = {"noisy": True, "num_items_in_batch": 7}
        found = criterion(hidden, weight, targets, advantages, mask=mask, hidden_other=other, **options)
        packed = criterion(
            *(hidden.flatten(0, 1), weight, targets.flatten(), advantages.repeat_interleave(5)),
            **{"mask": mask.flatten(), "hidden_other": other.flatten(0, 1), "sequence_ids": ids, **options},
        )
        torch.testing.assert_close(found, packed)


def test_the_number_of_items_makes_the_means_of_dr_grpo_and_of_trl(backend):
    hidden, weight, targets, advantages, mask = padded()
    off = GuidanceConfig(alpha_out=0, alpha_per=0)  # at ratio 1 the loss of a token is −A

    def loss(aggregation, items):
        criterion = VogueLoss(off, aggregation=aggregation, max_tokens=16, backend=backend)
        return criterion(hidden, weight, targets, advantages, mask=mask, num_items_in_batch=items)[0].item()

    # 5 tokens of A = 1, 2 of −2, 5 of 0.5 and none of 3, in 4 sequences of at most 16 tokens
    assert loss("token-mean", None) == pytest.approx(-3.5 / 12)
    assert loss("token-mean", 4 * 16) == loss("constant", 4) == pytest.approx(-3.5 / 64)  # Dr. GRPO
    assert (
        loss("token-mean", 3 * 16) == loss("constant", None) == pytest.approx(-3.5 / 48)
    )  # of those that have a token
    assert loss("sequence-mean", None) == pytest.approx(0.5 / 3)  # of those that have a token
    assert loss("sequence-mean", 4) == pytest.approx(0.5 / 4)  # of all, as TRL's "grpo"


def test_one_advantage_a_sequence_needs_its_dimension():
    hidden, weight, targets, advantages, _ = padded(b=4, t=4)
    with pytest.raises(ValueError, match=r"advantages must have the shape of targets, \(4, 4\), got \(4,\)"):
        VogueLoss()(hidden, weight, targets, advantages[:, 0])
    with pytest.raises(ValueError, match=r"mask must have the shape of targets, \(4, 4\), got \(4, 3\)"):
        VogueLoss()(hidden, weight, targets, advantages, mask=torch.ones(4, 3))


def test_the_other_branch_gets_no_gradient():
    hidden, other, weight, targets, advantage = batch()
    loss, _ = VogueLoss()(hidden, weight, targets, advantage, hidden_other=other, noisy=True)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None and other.grad is None


def test_the_other_branch_is_needed_only_where_a_token_is_noisy_and_perception_counts():
    hidden, _, weight, targets, advantage = batch()
    VogueLoss()(hidden, weight, targets, advantage, noisy=False)
    VogueLoss(GuidanceConfig(alpha_per=0))(hidden, weight, targets, advantage, noisy=True)
    VogueLoss(GuidanceConfig(alpha_per=0), rollout="drawn")(hidden, weight, targets, advantage, noisy=True)
    with pytest.raises(ValueError, match="hidden_other"):  # whose entropy is paid
        loss = VogueLoss(GuidanceConfig(alpha_per=0), rollout="raw", entropy="drawn")
        loss(hidden, weight, targets, advantage, noisy=True)
    with pytest.raises(ValueError, match="hidden_other"):
        VogueLoss()(hidden, weight, targets, advantage, noisy=True)


def test_the_ratios_that_are_told_are_those_of_the_tokens_that_are_not_skipped():
    hidden, weight, targets = torch.zeros(4, 2), torch.zeros(8, 2), torch.tensor([3, 5, 7, IGNORE])
    old = torch.tensor([0.25, 0.5, 0.01, 0.01]).log()  # where the policy gives every token 1/8: ratios 0.5, 0.25
    mask = torch.tensor([True, True, False, True])
    _, metrics = VogueLoss()(hidden, weight, targets, torch.ones(4), old_logprob=old, mask=mask)
    assert metrics["ratio_max"].item() == pytest.approx(0.5)
    assert metrics["ratio_mean"].item() == pytest.approx(0.375)


def test_a_batch_with_every_token_masked_has_a_loss_and_gradient_of_zero():
    hidden, _, weight, targets, advantage = batch()
    loss, _ = VogueLoss()(hidden, weight, targets, advantage, mask=torch.zeros(10, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize(
    "setting",
    [
        *(dict(aggregation="mean"), dict(divergence="js"), dict(rollout="noisy"), dict(entropy="raw")),
        *(dict(kind="trpo"), dict(importance_level="group"), dict(importance_mode="mask")),
    ],
)
def test_vogue_loss_refuses_a_name_it_does_not_know(setting):
    with pytest.raises(ValueError, match="choose one of"):
        VogueLoss(**setting)


def one_loss_of_liger(hidden, weight, targets, advantages, old_logprob, mask):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
    return loss(hidden, weight, targets, mask.long(), advantages, old_per_token_logps=old_logprob)[0]


def test_without_guidance_the_loss_of_completions_is_that_of_ligers_grpo(backend):
    pytest.importorskip("liger_kernel")
    hidden, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, advantages = torch.randint(50, (4, 5)), torch.tensor([1.0, -0.5, 2.0, -2.0])
    with torch.no_grad():
        old = torch.log_softmax(hidden @ weight.T, -1).gather(2, targets[..., None])[..., 0] + 0.3 * torch.randn(4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 3:] = False
    expected = one_loss_of_liger(hidden, weight, targets, advantages, old, mask)

    plain = VogueLoss(GuidanceConfig(alpha_out=0, alpha_per=0), aggregation="sequence-mean", backend=backend)
    per_token = advantages.repeat_interleave(5)  # which Liger's kernel doesn't take: its advantages are (4,)
    loss, _ = plain(
        hidden.flatten(0, 1),
        weight,
        targets.flatten(),
        per_token,
        old_logprob=old.flatten(),
        mask=mask.flatten(),
        sequence_ids=torch.arange(4).repeat_interleave(5),
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    )


def test_the_gradient_of_a_token_is_proportional_to_its_own_shaped_advantage(backend):
    # At ratio 1 the loss of a token is −Â, whose gradient is −Â ∂ log π; all tokens here are the same one, so that
    # their gradients are as their advantages: 1 and −0.5 of one completion, shaped by the same entropy.
    hidden = torch.full((2, 3), 0.7).requires_grad_()
    weight, targets = torch.randn(20, 3), torch.tensor([4, 4])
    guided = VogueLoss(GuidanceConfig(alpha_out=0.4, beta_out=2.0), backend=backend)
    loss, _ = guided(hidden, weight, targets, torch.tensor([1.0, -0.5]))
    (gradient,) = torch.autograd.grad(loss, hidden)
    logits = weight @ torch.full((3,), 0.7)
    entropy = -(logits.softmax(0) * logits.log_softmax(0)).sum()
    shaped = 1 + min(0.5, 0.4 * entropy), -0.5 + min(0.25, 0.4 * entropy)
    torch.testing.assert_close(gradient[0] / gradient[1], torch.full((3,), float(shaped[0] / shaped[1])))


@pytest.mark.parametrize("noisy", [False, True])
def test_logits_that_are_kept_change_no_gradient(noisy, backend):
    hidden, other = torch.randn(2, 9, 8)
    weight, targets, advantages = torch.randn(3000, 8), torch.randint(3000, (9,)), torch.randn(9)
    leaves, found = [hidden.requires_grad_(), weight.requires_grad_()], []
    for keep in (0, 1 << 30):
        criterion = VogueLoss(backend=backend, keep_logits_bytes=keep)
        loss, _ = criterion(hidden, weight, targets, advantages, hidden_other=other, noisy=noisy)
        weight.data = -weight.data  # what the backward pass reads only where it computes logits again
        found.append(torch.autograd.grad(loss, leaves)[1])
        weight.data = -weight.data
    loss, _ = VogueLoss(backend=backend)(hidden, weight, targets, advantages, hidden_other=other, noisy=noisy)
    expected = torch.autograd.grad(loss, leaves)[1]
    torch.testing.assert_close(found[1], expected)
    assert (found[0] - expected).abs().max() > 1e-3
