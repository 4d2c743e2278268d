"""Keys and values that are written where there is room for them.

transformers' own cache joins old and new ones anew for every token, in memory of its own each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    States = Float[Tensor, "row head pos d"]


class RoomyLayer(DynamicLayer):
    """One layer's keys and values: views of tensors that hold `room` positions, or more once they
    are full.
    """

    keys: Any
    values: Any

    def __init__(self, room: int):
        super().__init__()
        self._room = room
        self._whole: list[Tensor] = []

    def update(
        self, key_states: States, value_states: States, *args: object, **kwargs: object
    ) -> tuple[States, States]:
        """All keys and values, with the new ones at the end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, n = (key_states, value_states), self.get_seq_length()
        end = n + key_states.shape[-2]
        if not n or end > self._whole[0].shape[-2]:
            old = (self.keys, self.values) if n else new
            missing = max(self._room, end) - old[0].shape[-2]
            self._whole = [F.pad(states, (0, 0, 0, missing)) for states in old]
        for whole, states in zip(self._whole, new):
            whole[..., n:end, :] = states
        return self._shown(end)

    def batch_select_indices(self, indices: Int[Tensor, "row"]) -> None:
        """Keep these rows alone."""
        if n := self.get_seq_length():
            self._whole = [whole[indices] for whole in self._whole]
            self._shown(n)

    def _shown(self, n: int) -> tuple[States, States]:
        self.keys, self.values = (whole[..., :n, :] for whole in self._whole)
        return self.keys, self.values


def roomy(model, room: int, cache: Cache | None = None) -> Cache:
    """The cache, or an empty one, whose layers have room for so many positions; layers with a
    window or of another kind stay as they are.
    """
    cache = cache or DynamicCache(config=model.config)
    cache.layers = [_roomy_layer(layer, room) for layer in cache.layers]
    return cache


def _roomy_layer(layer: Any, room: int) -> Any:
    if type(layer) is not DynamicLayer:
        return layer
    found = RoomyLayer(room)
    old: Any = (layer.keys, layer.values)
    if layer.is_initialized:
        found.update(*old)
    return found
