"""What a model reads in place of its tokens' embeddings, without a forward of its own.

The module's output is changed by a hook: its weight may be partitioned, and images are still placed by token ids.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`change` is applied to what the module returns."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))  # pyright: ignore
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reading(model: Any, positions: Tensor | None, states: Tensor | None) -> Iterator[None]:
    """A model of transformers reads the constants `states` (n, D) in place of tokens; None: tokens alone.

    positions  (n,) where, in the flat B L tokens of its input
    """
    if positions is None or states is None:
        yield
        return

    def placed(embeddings: Tensor) -> Tensor:
        flat = embeddings.flatten(0, 1)
        return flat.index_copy(0, positions, states.detach().to(flat.dtype)).view_as(embeddings)

    with changed(model.get_input_embeddings(), placed):
        yield
