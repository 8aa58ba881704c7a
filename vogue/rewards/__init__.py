"""Verifiable rewards: what a completion earns, decided by rules."""

from vogue.rewards.verifiable import Score, score, score_batch, verifier

__all__ = ["Score", "score", "score_batch", "verifier"]
