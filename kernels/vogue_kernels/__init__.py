"""vogue_kernels computes exact statistics of one or two policy branches, and VOGUE's loss on them, without logits.

linear_branch_stats   log-probabilities, entropies and both KL directions of two branches
linear_logprob        log-probability and entropy of one
linear_logprob_of     log-probabilities of several given words a token
vocab_parallel_branch_stats, vocab_parallel_logprob    where each rank has a part of the vocabulary
VogueLoss             the loss for any trainer; its parts: guidance, shaped_advantage, policy_loss (of which the
                      default is clipped_surrogate), engine_correction, token_weights
"""

from .backends import available_backends
from .capped_bonus import GuidanceConfig, ShapedAdvantage, guidance, shaped_advantage
from .loss import VogueLoss, token_weights
from .operator import IGNORE, BranchStats, LogprobStats, linear_branch_stats, linear_logprob
from .parallel import vocab_parallel_branch_stats, vocab_parallel_logprob
from .surrogates import (
    CorrectionConfig,
    Sequences,
    SurrogateConfig,
    clipped_surrogate,
    engine_correction,
    policy_loss,
)
from .word_logprobs import linear_logprob_of

__version__ = "0.1.0"  # of both distributions, vogue and vogue-kernels, whose pyproject.toml read it here

__all__ = [
    "IGNORE",
    "BranchStats",
    "CorrectionConfig",
    "GuidanceConfig",
    "LogprobStats",
    "Sequences",
    "ShapedAdvantage",
    "SurrogateConfig",
    "VogueLoss",
    "available_backends",
    "clipped_surrogate",
    "engine_correction",
    "guidance",
    "linear_branch_stats",
    "linear_logprob",
    "linear_logprob_of",
    "policy_loss",
    "shaped_advantage",
    "token_weights",
    "vocab_parallel_branch_stats",
    "vocab_parallel_logprob",
]
