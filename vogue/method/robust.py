r"""How far a policy is from itself on degraded views of an image: ROMA (arXiv 2605.09262).

    D_t = max_k KL(π(·|x, o_<t) ‖ π(·|x_k, o_<t))          k = 1 … K degraded views x_k of the image x

The completion o is one that x gave, teacher-forced on each view. The worst view may be another one at each token. Which
of the two policies moves is the caller's: ROMA's clean one is the target.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def worst_divergence(divergences: Sequence[Tensor]) -> Tensor:
    """D (M,) in nats of K views' divergences (M,) each; the largest one alone has a gradient, the first among equals.

    Raises ValueError for no view.
    """
    if not divergences:
        raise ValueError("there is no degraded view to find the worst of")
    stacked = torch.stack(tuple(divergences))
    return stacked.gather(0, stacked.detach().argmax(dim=0, keepdim=True))[0]
