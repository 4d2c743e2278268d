"""Every flipped bit is found; `tests/robustness/flips.py --trials 10000` is the long campaign."""

import pytest
import torch
from robustness.flips import KINDS, campaign, found, make

pytestmark = pytest.mark.long


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_flipped_bit_is_found(dtype, tmp_path):
    folder = make(tmp_path, dtype=dtype)
    assert not found(folder)
    flips = list(campaign(folder, 150, seed=7))
    assert {flip.kind for flip in flips} == set(KINDS)
    assert [flip for flip in flips if not flip.found] == []
    assert not found(folder)
