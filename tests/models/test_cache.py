"""A cache with room gives the keys and values that transformers' own gives."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from cdelta.models.cache import RoomyLayer, roomy


def states(rows: int, new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, new, 4, generator=made) for _ in range(2))


@pytest.mark.parametrize("room", [1, 7, 40])
def test_as_transformers_own_while_it_grows_and_rows_leave(llama, room):
    own, ours = DynamicCache(config=llama.config), roomy(llama, room)
    n_layers = llama.config.num_hidden_layers
    assert all(type(layer) is RoomyLayer for layer in ours.layers)
    kept = torch.tensor([0, 2])
    for step, new in enumerate((5, 1, 1, 3)):
        rows = 3 if step < 2 else 2
        for layer in range(n_layers):
            given = states(rows, new, 10 * step + layer)
            for found, wanted in zip(ours.update(*given, layer), own.update(*given, layer)):
                assert torch.equal(found, wanted)
        assert ours.get_seq_length() == own.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == own.get_mask_sizes(1, 0)
        if step == 1:
            ours.batch_select_indices(kept)
            own.batch_select_indices(kept)


def test_the_room_is_taken_once(llama):
    ours = roomy(llama, 8)
    places = set()
    for step in range(8):
        keys, _ = ours.update(*states(3, 1, step), 0)
        places.add(keys.data_ptr())
    assert len(places) == 1


def test_a_read_prefix_is_taken_over_and_windows_stay(llama):
    read = DynamicCache(config=llama.config)
    given = states(3, 5, 0)
    for layer in range(llama.config.num_hidden_layers):
        read.update(*given, layer)
    read.layers[1] = window = DynamicSlidingWindowLayer(4)
    ours = roomy(llama, 9, read)
    assert ours.layers[1] is window
    assert torch.equal(ours.layers[0].keys, given[0]) and ours.get_seq_length() == 5
