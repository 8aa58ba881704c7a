"""A cache of keys and values with room for the tokens to come, for the engine that generates with transformers.

transformers' own grows by one token at a time, and copies all that it holds to do so: T tokens cost T^2 / 2 copies of a
token. Here a layer writes into memory with room for more, and copies once in `ROOM` tokens.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens of a sequence for which memory is taken at a time


class RoomyLayer(DynamicLayer):
    """A layer of full attention: `keys` and `values` (S, H, T, D) are the beginning of longer tensors."""

    _room = 0  # tokens that the longer tensors hold

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values (S, H, t, D) of further tokens; returns those of all tokens (S, H, T + t, D)."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._room:
            self._room = end + ROOM
            self._whole = [x.new_empty(*x.shape[:2], self._room, x.shape[3]) for x in (key_states, value_states)]
            if start:
                held: Any = (self.keys, self.values)
                for whole, before in zip(self._whole, held, strict=True):
                    whole[:, :, :start] = before
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self._whole)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        """Put the sequences of these numbers (S',) int64 in the place of all."""
        super().reorder_cache(beam_idx)
        self._room = 0  # they are tensors of their own now


def roomy_cache(config: Any) -> DynamicCache:
    """An empty cache for the model of this configuration; layers that aren't full attention's are transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
