"""A training run around its trainer: what is looked for before it, what it writes, and how it ends."""
