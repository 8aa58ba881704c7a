"""Reinforcement learning of vision-language models from verifiable rewards, exploring where the image is ambiguous."""
