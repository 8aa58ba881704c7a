"""The signature of Liger's fused linear scaled cross entropy, on `linear_logprob`.

    nll = −log softmax(W h / τ)_y        entropy = −Σ p log p

per token, as `LigerFusedLinearScaledCrossEntropyFunction` of liger-kernel 0.8.5 has them. Liger itself isn't needed.
"""

from torch import Tensor

from ..operator import IGNORE, linear_logprob


class FusedLinearScaledCrossEntropyFunction:
    """A drop-in for `liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction`; call `apply`."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = IGNORE,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The negative log-likelihood of each target, and what else is asked for, in Liger's order.

        _input: (N, D). weight: (V, D). target: (N,) int64, ignore_index to skip. temperature: τ, divides the logits.
        return_entropy: the entropy (N,) in nats too. selected_token_ids: (K,) int64, whose log-probabilities (N, K) are
        appended. m_tiles_per_cluster: accepted and without effect, a tile size of Liger's kernel for sm_90.

        Every result is float32 (float64 for float64 inputs), where Liger rounds the entropy to the input's dtype;
        exact and differentiable in _input and weight, and 0 where the target is skipped.

        Raises what `linear_logprob` raises; ValueError for a target of -100 that ignore_index doesn't name, and for
        selected_token_ids outside [0, V).
        """
        skipped = target == ignore_index
        if ignore_index != IGNORE and (target == IGNORE).any():
            raise ValueError(f"target contains {IGNORE}, which is neither a token nor ignore_index={ignore_index}")
        stats = linear_logprob(_input, weight, target, temperature=temperature, ignore_index=ignore_index)
        results = (-stats.logprob, stats.entropy) if return_entropy else (-stats.logprob,)
        if selected_token_ids is not None:
            selected = _selected_logprobs(
                _input, weight, target, skipped, temperature, selected_token_ids, stats.logprob
            )
            results = (*results, selected)
        return results if len(results) > 1 else results[0]


def _selected_logprobs(_input, weight, target, skipped, temperature, token_ids, logprob) -> Tensor:
    """Log-probabilities (N, K) of chosen tokens: their logits less the log-normaliser that the target's tells."""
    if bool(((token_ids < 0) | (token_ids >= len(weight))).any()):
        raise ValueError(f"selected_token_ids must be in [0, {len(weight)}), got {token_ids.tolist()}")
    # In the results' dtype: products that were rounded to bfloat16 would not cancel.
    hidden = _input.to(logprob.dtype) / temperature
    logits = hidden @ weight[token_ids].to(logprob.dtype).T
    target_logit = (hidden * weight[target.masked_fill(skipped, 0)].to(logprob.dtype)).sum(-1)
    return (logits - (target_logit - logprob).unsqueeze(1)).masked_fill(skipped.unsqueeze(1), 0.0)
