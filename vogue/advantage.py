r"""Advantages of a group's responses against each other, without a value model.

A_i = (r_i − mean(r)) / (std(r) + ε)          GRPO, arXiv 2402.03300
"""

from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO's advantages (P, G) of the rewards (P, G) of P groups of G responses; exactly 0 in a group of equals.

    std is the sample one (divided by G − 1). The papers only say "std"; TRL, verl and EasyR1,
    from whose runs the published settings come, all take torch.std's default, and at G = 5 the
    population's would make every advantage 12% larger.

    Raises ValueError for groups of fewer than two and for a reward that is not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; they must be (P, G) with G ≥ 2.")
    if not rewards.isfinite().all():
        group, response = (~rewards.isfinite()).nonzero()[0].tolist()
        value = rewards[group, response].item()
        raise ValueError(f"the reward of response {response} in group {group} is {value}.")
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = deviations / (rewards.std(dim=1, keepdim=True) + eps)
    # The mean of equal rewards may differ from them in the last bit.
    return advantages.where(mixed(rewards)[:, None], 0)


def mixed(rewards: Tensor) -> Tensor:
    """Which groups (P,) bool of scores (P, G) are not all equal, so that they carry a gradient.

    DAPO's dynamic sampling (arXiv 2503.14476) keeps these groups, and judges them by accuracy alone.
    """
    return rewards.amax(dim=1) != rewards.amin(dim=1)
