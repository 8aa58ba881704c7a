"""`vogue_kernels` at the seams that other packages have: a module a package, none of which is imported from here.

liger   in the place of LigerFusedLinearScaledCrossEntropyFunction; needs no Liger
verl    a plugin of verl: a backend of its fused head and a policy loss

TRL's trainer needs the perturbation and the draws as well, and is `vogue.trl`.
"""
