"""The policy: a model of transformers that DeepSpeed holds, rows that share a prompt, and its statistics per token.

loading       from its checkpoint, partitioned          optimizer    AdamW and DeepSpeed's engine
packing       rows, micro-batches, batches              attention    of rows that share a prompt
policy        hidden states to statistics               checkpoint   saved and found again, of
weights       whole ones, gathered and written          fragments    of weights that a rank trains, and their
varlen        the attention on GPUs                     vision       the vision tower's attention and patches
liger         Liger's kernels in the text model         lora         adapters

optimizer_state: of those fragments, written and read by any number of ranks.
"""
