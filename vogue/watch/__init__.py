"""`vogue watch`: a run in a terminal or on a live page, from what it leaves in its folder and from nothing else."""
