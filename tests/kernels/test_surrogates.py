"""A token's loss and its corrections against numbers worked out by hand, and VogueLoss with each of them."""

import math

import oracle
import pytest
import torch

from vogue_kernels import (
    CorrectionConfig,
    GuidanceConfig,
    Sequences,
    SurrogateConfig,
    VogueLoss,
    clipped_surrogate,
    engine_correction,
    policy_loss,
)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),  # rises no further than (1 + 0.2) · 2
        (1.5, -2.0, 3.0, False),  # a worse loss is never clipped away
        (0.5, -2.0, 1.6, True),  # (1 − 0.2) · 2
        (0.5, 2.0, -1.0, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_the_clipped_surrogate_takes_the_smaller_term(ratio, advantage, loss, clipped):
    old = torch.tensor([-1.0])
    actual, was_clipped = clipped_surrogate(old + math.log(ratio), old, torch.tensor([advantage]), 0.2, 0.2)
    close(actual, [loss])
    assert was_clipped.tolist() == [clipped]


def test_clip_higher_moves_the_upper_bound_alone():
    # A = 1: ratio 1.25 is inside 1.28 but beyond 1.2. A = −1: ratio 0.75 is below 0.8 either way.
    logprob = torch.tensor([math.log(1.25), math.log(0.75)])
    loss, clipped = clipped_surrogate(logprob, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, 0.28)
    close(loss, [-1.25, 0.8])
    assert clipped.tolist() == [False, True]


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [
        (5.0, -2.0, 6.0, True),  # min(5 · 2, 3 · 2)
        (2.0, -2.0, 4.0, False),
        (0.5, -2.0, 1.6, True),  # the other clip: (1 − 0.2) · 2
        (5.0, 2.0, -2.4, True),  # a positive advantage has no third bound
    ],
)
def test_dual_clipping_bounds_the_loss_of_a_negative_advantage(ratio, advantage, loss, clipped):
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    actual, was_clipped = clipped_surrogate(logprob, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2, 3.0)
    close(actual.detach(), [loss])
    assert was_clipped.tolist() == [clipped]
    assert (torch.autograd.grad(actual.sum(), logprob)[0] == 0).item() == clipped


def test_without_an_old_logprob_the_ratio_is_one_and_the_gradient_the_policy_gradient():
    logprob = torch.tensor([-3.0, -0.5], requires_grad=True)
    loss, clipped = clipped_surrogate(logprob, None, torch.tensor([2.0, -1.0]), 0.2, 0.2)
    close(loss, [-2.0, 1.0])
    close(torch.autograd.grad(loss.sum(), logprob)[0], [-2.0, 1.0])
    assert not clipped.any()


def test_a_clipped_token_sends_no_gradient():
    logprob = torch.tensor([0.5, -0.5], requires_grad=True)
    loss, _ = clipped_surrogate(logprob, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, 0.2)
    assert torch.autograd.grad(loss.sum(), logprob)[0].tolist() == [0, 0]


@pytest.mark.parametrize("apart", [20.5, 100.0, math.inf])
@pytest.mark.parametrize("advantage, loss", [(2.0, -2.4), (-2.0, 2 * math.exp(20))])
def test_a_ratio_beyond_all_bounds_has_a_finite_loss_and_no_gradient(apart, advantage, loss):
    logprob = torch.tensor([-1.0], requires_grad=True)
    actual, _ = clipped_surrogate(logprob, torch.tensor([-1.0 - apart]), torch.tensor([advantage]), 0.2, 0.2)
    close(actual.detach(), [loss])
    assert torch.autograd.grad(actual.sum(), logprob)[0].tolist() == [0]


def test_a_ratio_below_the_bound_is_exact():
    logprob = torch.tensor([-1.0], requires_grad=True)
    loss, _ = clipped_surrogate(logprob, torch.tensor([-20.5]), torch.tensor([-2.0]), 0.2, 0.2)
    close(torch.autograd.grad(loss.sum(), logprob)[0], [2 * math.exp(19.5)])


# ------------------------------------------------------------------------------------------------ other surrogates


def surrogate_of(ratio, advantage, **settings):
    """Loss, gradient and whether it was clipped, of a token that had the probability e⁻² before."""
    old = torch.tensor([-2.0], dtype=torch.float64)
    logprob = (old + math.log(ratio)).requires_grad_()
    loss, clipped = policy_loss(logprob, old, torch.tensor([advantage]).double(), SurrogateConfig(**settings), None)
    return loss.item(), torch.autograd.grad(loss.sum(), logprob)[0].item(), clipped.item()


@pytest.mark.parametrize(
    "ratio, advantage, bounded, clipped",
    [
        (1.0, 2.0, 1.0, False),
        (3.0, 2.0, 3.0, False),
        (8.0, 2.0, 5.0, True),  # 1 + 4
        (8.0, -2.0, 5.0, True),  # whatever the sign of A
        (0.01, 2.0, 0.01, False),  # clip_low = 1: no bound from below
    ],
)
def test_cispo_weighs_the_log_probability_by_the_clipped_ratio(ratio, advantage, bounded, clipped):
    loss, gradient, was_clipped = surrogate_of(ratio, advantage, kind="cispo", clip_low=1.0, clip_high=4.0)
    assert loss == pytest.approx(-bounded * advantage * (-2 + math.log(ratio)))
    assert gradient == pytest.approx(-bounded * advantage)  # also beyond the clip, where PPO's is 0
    assert was_clipped == clipped


def test_cispos_lower_bound_is_one_too():
    assert surrogate_of(0.5, 1.0, kind="cispo", clip_low=0.2)[1:] == (pytest.approx(-0.8), True)


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        # At r = 1: −(4 / τ) σ(0) A and, as with any surrogate, −A.
        (1.0, 3.0, -6.0, -3.0),
        (1.0, -3.0, 6.0 / 1.05, 3.0),
        # τ = 1: σ(1) = 0.7310586; −4 · 0.7310586 and −4 · 0.7310586 · 0.2689414 · 2
        (2.0, 1.0, -2.9242343, -1.5728955),
        # τ = 1.05: σ(1.05) = 0.7407749; 4 / 1.05 · 0.7407749 and 4 · 0.7407749 · 0.2592251 · 2
        (2.0, -1.0, 2.8219996, 1.5362195),
        # τ = 1: σ(−0.5) = 0.3775407; −4 · 0.3775407 and −4 · 0.3775407 · 0.6224593 · 0.5
        (0.5, 1.0, -1.5101627, -0.4700074),
    ],
)
def test_sapo_fades_out_by_the_temperature_of_the_advantages_sign(ratio, advantage, loss, gradient):
    found = surrogate_of(ratio, advantage, kind="sapo")
    assert found == (pytest.approx(loss, rel=1e-6), pytest.approx(gradient, rel=1e-6), False)


@pytest.mark.parametrize("kind", ["cispo", "sapo"])
def test_a_ratio_beyond_all_bounds_is_finite_in_every_surrogate(kind):
    logprob = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, _ = policy_loss(
        logprob, torch.tensor([-101.0, -101.0]), torch.tensor([1.0, -1.0]), SurrogateConfig(kind), None
    )
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), logprob)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["ppo", "cispo", "sapo"])
def test_without_an_old_logprob_every_surrogate_has_the_policy_gradient(kind):
    logprob = torch.tensor([-3.0, -0.5], requires_grad=True)
    for level in ("token", "sequence"):
        sequences = Sequences(torch.tensor([0, 0]), torch.tensor([2]))
        config = SurrogateConfig(kind, importance_level=level)
        loss, clipped = policy_loss(logprob, None, torch.tensor([2.0, -1.0]), config, sequences)
        close(torch.autograd.grad(loss.sum(), logprob)[0], [-2.0, 1.0])
        assert not clipped.any()


@pytest.mark.parametrize("kind", ["ppo", "cispo", "sapo"])
def test_a_sequences_ratio_takes_the_place_of_its_tokens_in_every_surrogate(kind):
    ratios = torch.tensor([2.0, 0.5, 4.0, 1.0, 1.21], dtype=torch.float64)  # geometric means: 4^(1/3), and 1.1
    means = torch.tensor([4 ** (1 / 3)] * 3 + [1.1] * 2, dtype=torch.float64)
    old = torch.tensor([-1.0, -2.0, -3.0, -1.0, -2.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.5], dtype=torch.float64)  # shaped ones differ in a sequence
    logprob = (old + ratios.log()).requires_grad_()
    sequences = Sequences(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([3, 2]))
    loss, _ = policy_loss(logprob, old, advantages, SurrogateConfig(kind, importance_level="sequence"), sequences)
    # Of each token the loss is that of the mean's ratio, and its gradient goes to that token alone (GSPO-token).
    alone = (old + means.log()).requires_grad_()
    expected, _ = policy_loss(alone, old, advantages, SurrogateConfig(kind), None)
    gradient = torch.autograd.grad(loss.sum(), logprob)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), alone)[0])
    if kind == "cispo":  # whose log-probability stays the token's own
        expected = -means.clamp(0.8, 1.2) * advantages * logprob
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="importance_level=sequence needs sequence_ids"):
        policy_loss(logprob, old, advantages, SurrogateConfig(kind, importance_level="sequence"), None)


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(clip_dual=1.0), "clip_dual must be above 1, got 1.0"),
        (dict(kind="cispo", clip_dual=3.0), "clip_dual=3.0 bounds the loss of kind=ppo, not of cispo"),
        (dict(sapo_temperature_neg=0.0), "sapo_temperature_neg must be positive, got 0.0"),
        (dict(importance_floor=2.0, importance_cap=2.0), "importance_floor=2.0 must be below importance_cap=2.0"),
        (dict(importance_cap=0.0), "importance_cap must be positive, got 0.0"),
    ],
)
def test_constants_out_of_range_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        VogueLoss(**settings)


# ----------------------------------------------------------------------------------------- correction for the engine

RATIOS = [[4.0, 0.25, 1.0], [1.5, 1.5, 4.0], [0.3, 0.5, math.nan]]  # of three sequences, the last one of two tokens


@pytest.mark.parametrize(
    "mode, expected, outside",
    [
        # Each token's own; IcePop is the second.
        ("token_truncate", [2, 0.5, 1, 1.5, 1.5, 2, 0.5, 0.5], [1, 1, 0, 0, 0, 1, 1, 0]),
        ("token_mask", [0, 0, 1, 1.5, 1.5, 0, 0, 0.5], [1, 1, 0, 0, 0, 1, 1, 0]),
        # Products of 1, 9 and 0.15.
        ("sequence_truncate", [1] * 3 + [2] * 3 + [0.5] * 2, [0] * 3 + [1] * 5),
        ("sequence_mask", [1] * 3 + [0] * 5, [0] * 3 + [1] * 5),
        # Geometric means of 1, 9^(1/3) = 2.080084 and 0.15^(1/2) = 0.387298.
        ("geometric_truncate", [1] * 3 + [2] * 3 + [0.5] * 2, [0] * 3 + [1] * 5),
        ("geometric_mask", [1] * 3 + [0] * 5, [0] * 3 + [1] * 5),
    ],
)
def test_what_corrects_for_the_engine_within_two_bounds_by_hand(mode, expected, outside):
    ratios = torch.tensor([x for row in RATIOS for x in row if not math.isnan(x)], dtype=torch.float64)
    sequences = Sequences(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), torch.tensor([3, 3, 2]))
    factor, found = engine_correction(ratios.log(), CorrectionConfig(2.0, 0.5 - 1e-9, mode), sequences)
    assert factor.tolist() == pytest.approx(expected)
    assert found.tolist() == [bool(x) for x in outside]


@pytest.mark.parametrize("bounds", [(2.0, None), (None, 0.6), (2.0, 0.6)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_four_modes_are_trls_formulas_on_padded_completions(mode, bounds):
    cap, floor = bounds
    logs = torch.randn(6, 7, dtype=torch.float64) / 3
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 6, 2])[:, None]
    # Written out on (B, T): sums over the mask, then clamping, or zeros outside [min, max].
    logs_of = (logs * mask).sum(-1, keepdim=True).expand(6, 7) if mode.startswith("sequence") else logs * mask
    expected, low, high = logs_of.exp(), floor or 0.0, cap or math.inf
    expected = (
        expected.clamp(low, high) if mode.endswith("truncate") else expected * (low <= expected) * (expected <= high)
    )
    ids = torch.arange(6)[:, None].expand(6, 7)[mask]
    factor, _ = engine_correction(logs[mask], CorrectionConfig(cap, floor, mode), Sequences(ids, mask.sum(-1)))
    torch.testing.assert_close(factor, expected[mask])
    assert len(factor.unique()) > 3


def test_a_geometric_means_bounds_are_those_of_its_own_value_and_not_of_the_products():
    # 100 tokens of 1.01: the product is 2.7, the geometric mean 1.01.
    sequences = Sequences(torch.zeros(100, dtype=torch.int64), torch.tensor([100]))
    logs = torch.full((100,), math.log(1.01))
    for mode, expected in (("geometric_mask", 1.01), ("sequence_mask", 0.0)):
        close(engine_correction(logs, CorrectionConfig(2.0, 0.5, mode), sequences)[0], [expected] * 100)


def test_a_mode_of_sequences_needs_to_know_them_and_one_of_tokens_does_not():
    engine_correction(torch.zeros(3), CorrectionConfig(2.0))
    for mode in ("sequence_mask", "geometric_truncate"):
        with pytest.raises(ValueError, match=f"importance_mode={mode} needs sequence_ids"):
            engine_correction(torch.zeros(3), CorrectionConfig(2.0, None, mode))


# -------------------------------------------------------------------------------------------------------- VogueLoss

SETTINGS = [
    dict(kind="cispo", clip_low=1.0, clip_high=0.5),
    dict(kind="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=3.0),
    dict(importance_level="sequence", clip_low=0.1, clip_high=0.1),
    dict(kind="sapo", importance_level="sequence", importance_cap=1.5, importance_mode="sequence_truncate"),
    dict(kind="cispo", importance_cap=1.5, importance_floor=0.7, importance_mode="token_mask"),
    dict(importance_cap=1.1, importance_floor=0.9, importance_mode="geometric_mask"),
]


def padded():
    """Hidden states, weight, targets and a mask of three sequences of 4, 2 and 3 tokens, and (3, 4) other numbers."""
    hidden, weight = torch.randn(3, 4, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    return hidden, weight, torch.randint(40, (3, 4)), mask, 0.3 * torch.randn(2, 3, 4)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_vogue_loss_with_any_surrogate_and_correction_equals_the_equations_on_full_logits(settings, backend):
    hidden, weight, targets, mask, (shift, mismatch) = padded()
    advantages = torch.tensor([1.0, -2.0, 0.5])[:, None]
    found = oracle.linear_logprob(hidden.flatten(0, 1), weight, targets.flatten())
    logprob, entropy = found.logprob.view(3, 4), found.entropy.view(3, 4).detach()
    old = logprob.detach() + shift
    engine = (old - mismatch).masked_fill(~mask, torch.nan)
    engine[0, 1] = torch.nan  # unknown: its ratio is 1
    corrected = "importance_cap" in settings
    loss, metrics = VogueLoss(aggregation="constant", max_tokens=6, backend=backend, **settings)(
        *(hidden, weight, targets, advantages),
        **{"old_logprob": old.masked_fill(~mask, torch.nan), "mask": mask},
        engine_logprob=engine if corrected else None,
    )

    shaped = advantages + torch.minimum(advantages.abs() / 2, 0.4 * entropy)
    lengths = mask.sum(-1, keepdim=True)
    logs = (logprob - old) * mask
    if settings.get("importance_level") == "sequence":
        logs = logs.detach().sum(-1, keepdim=True) / lengths + logprob - logprob.detach()
    ratio, kind = logs.exp(), settings.get("kind")
    low, high = settings.get("clip_low", 0.2), settings.get("clip_high", 0.2)
    if kind == "cispo":
        per_token = -ratio.detach().clamp(1 - low, 1 + high) * shaped * logprob
    elif kind == "sapo":
        tau = torch.where(
            shaped > 0, *(settings.get(f"sapo_temperature_{x}", y) for x, y in (("pos", 1.0), ("neg", 1.05)))
        )
        per_token = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * shaped
    else:
        per_token = -torch.minimum(ratio * shaped, ratio.clamp(1 - low, 1 + high) * shaped)
    if corrected:
        logs, mode = torch.where(engine.isnan(), 0.0, mismatch), settings["importance_mode"]
        if not mode.startswith("token"):
            logs = logs.sum(-1, keepdim=True) / (lengths if mode.startswith("geometric") else 1)
        limits = settings.get("importance_floor", 0.0), settings["importance_cap"]
        bounded = logs.exp().clamp(*limits)
        outside = (bounded != logs.exp()).expand(3, 4)
        per_token = per_token * (bounded if mode.endswith("truncate") else bounded.where(bounded == logs.exp(), 0.0))
        assert metrics["importance_outside"].item() == pytest.approx(outside[mask].float().mean().item())
        assert 0 < metrics["importance_outside"] < 1
    expected = (per_token * mask).sum() / (3 * 6)
    torch.testing.assert_close(loss, expected)
    leaves = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("settings", SETTINGS[2:5], ids=lambda settings: "-".join(map(str, settings.values())))
def test_packed_sequences_have_the_loss_of_padded_ones(settings, backend):
    hidden, weight, targets, mask, (shift, mismatch) = padded()
    advantages = torch.tensor([1.0, -2.0, 0.5])[:, None].expand(3, 4)
    given = {"old_logprob": -3 + shift, "mask": mask}
    if "importance_cap" in settings:
        given["engine_logprob"] = -3 + shift - mismatch
    criterion = VogueLoss(aggregation="sequence-mean", backend=backend, **settings)
    expected = criterion(hidden, weight, targets, advantages, **given)
    order = torch.randperm(12)  # their tokens needn't stand side by side
    flat = [x.flatten(0, 1)[order] for x in (hidden, targets, advantages)]
    ids = torch.arange(3).repeat_interleave(4)[order]
    packed = {name: value.flatten()[order] for name, value in given.items()} | {"sequence_ids": ids}
    torch.testing.assert_close(criterion(flat[0], weight, *flat[1:], **packed), expected)
    if "sequence" in settings.values():
        with pytest.raises(ValueError, match="needs sequence_ids"):
            criterion(flat[0], weight, *flat[1:], **{**packed, "sequence_ids": None})


def test_an_engines_logprob_and_a_bound_for_it_need_one_another():
    hidden, weight, targets, _, (shift, _) = padded()
    with pytest.raises(ValueError, match="importance_cap and importance_floor need engine_logprob"):
        VogueLoss(importance_floor=0.5)(hidden, weight, targets, torch.ones(3, 4))
    with pytest.raises(ValueError, match="engine_logprob is read with importance_cap or importance_floor alone"):
        VogueLoss()(hidden, weight, targets, torch.ones(3, 4), engine_logprob=shift)


@pytest.mark.parametrize("kind", ["cispo", "sapo"])
def test_every_surrogate_takes_vogues_shaped_advantages(kind, backend):
    # At a ratio of 1 every gradient is −Â ∇ log π: that of PPO's surrogate, with its bonuses.
    hidden, weight, targets, _, _ = padded()
    other = torch.randn(3, 4, 8)
    guidance = GuidanceConfig(0.4, 2.0, 1.0, 2.0)
    gradients = [
        torch.autograd.grad(
            VogueLoss(guidance, kind=name, backend=backend)(
                hidden, weight, targets, torch.tensor([[1.0], [-2.0], [0.5]]), hidden_other=other, noisy=True
            )[0],
            (hidden, weight),
        )
        for name in ("ppo", kind)
    ]
    torch.testing.assert_close(*gradients)
