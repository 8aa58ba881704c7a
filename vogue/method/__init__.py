"""VOGUE, as its paper has it (arXiv 2510.01444), and its baselines: pure functions that know nothing else of vogue.

perturb       T(x)                        advantage     A, of a group's rewards
branch        p_noi, z, the bonus's sign  uncertainty   u_out and u_per, exact or estimated
entropy       which tokens train            kl            the divergence from a reference
credit        a token's part of A           curiosity     CDE's bonus on rewards
pairs         Shuffle-R1's pairs and draws  variance      MMR1's scores of prompts

The bonuses are `vogue_kernels.capped_bonus`, the surrogates `vogue_kernels.surrogates`, which other trainers use too.
"""
