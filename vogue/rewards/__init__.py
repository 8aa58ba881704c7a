"""Rewards say what a completion earns: by one of several designs, or by a function of the user's own."""

from vogue.rewards.correctness import verifier
from vogue.rewards.designs import Score, check_function, score, score_batch
from vogue.rewards.function import RewardError

__all__ = ["RewardError", "Score", "check_function", "score", "score_batch", "verifier"]
