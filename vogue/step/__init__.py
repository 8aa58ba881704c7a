"""The parts of a training step, from the samples of a prompt to the loss; `vogue.trainer` puts them together."""
