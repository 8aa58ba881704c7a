r"""What guidance takes for a token's uncertainties: `uncertainty.estimator` and `uncertainty.divergence`.

v is the sampled token, q the branch that it was sampled from, p the raw one, r = p(v) / q(v).

             u_out               KL(q‖p) reverse   KL(p‖q) forward   u_per symmetric
    exact    H(q)                sums over the whole vocabulary
    k3       −log q(v)           r − 1 − log r     r log r − r + 1   ½ (r − 1) log r
    sampled  −q(v) log q(v)                                          ½ (p(v) − q(v)) (log p(v) − log q(v))

Under v ~ q the means of k3 are the exact values, and its divergences are never negative (k3 is the name of the reverse
one in J. Schulman, "Approximating KL divergence", 2020). `sampled` is what VOGUE's official code computes: one term of
each sum, which is no estimate of it; its entropy is at most 1/e.
"""

from torch import Tensor

from vogue_kernels import BranchStats


def output_uncertainty(entropy: Tensor, logprob: Tensor, estimator: str) -> Tensor:
    """u_out (N,) in nats from entropies and the sampled tokens' log-probabilities (N,)."""
    logprob = logprob.detach()
    return {"exact": entropy.detach(), "k3": -logprob, "sampled": -logprob.exp() * logprob}[estimator]


def perception_uncertainty(stats: BranchStats, estimator: str, divergence: str) -> Tensor:
    """u_per (N,) in nats of tokens sampled from the noisy branch; "sampled" is symmetric whatever `divergence` says."""
    p, q = stats.logprob_raw.detach(), stats.logprob_noisy.detach()
    if estimator == "sampled":
        return (p.exp() - q.exp()) * (p - q) / 2
    log_ratio = p - q
    ratio = log_ratio.exp()
    return {
        "exact": {
            "symmetric": stats.symmetric_kl.detach(),
            "forward": stats.kl_raw_noisy.detach(),
            "reverse": stats.kl_noisy_raw.detach(),
        },
        "k3": {
            "symmetric": (ratio - 1) * log_ratio / 2,
            "forward": ratio * log_ratio - log_ratio.expm1(),
            "reverse": log_ratio.expm1() - log_ratio,
        },
    }[estimator][divergence]
