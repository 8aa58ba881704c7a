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
            if bool(((selected_token_ids < 0) | (selected_token_ids >= len(weight))).any()):
                raise ValueError(f"selected_token_ids must be in [0, {len(weight)}), got {selected_token_ids.tolist()}")
            # In the dtype of the log-normaliser: logits that were rounded to bfloat16 would not fit it.
            hidden, rows = _input.to(stats.lse.dtype), weight[selected_token_ids].to(stats.lse.dtype)
            selected = hidden @ rows.T / temperature - stats.lse.unsqueeze(1)
            results = (*results, selected.masked_fill(skipped.unsqueeze(1), 0.0))
        return results if len(results) > 1 else results[0]
