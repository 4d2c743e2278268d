"""A short campaign of faults; `campaign.py --trials 100` is the long one."""

import pytest

from robustness.campaign import FAULTS, LOST, STAGES, campaign, can_mount


@pytest.mark.slow
@pytest.mark.e2e
def test_whatever_goes_wrong_nothing_is_lost(tmp_path):
    rows = list(campaign(tmp_path, trials=24, seed=11))
    n_faults = len(FAULTS) if can_mount() else len(FAULTS) - 2
    assert len({row[:2] for row in rows}) == min(24, n_faults * len(STAGES))
    assert [row for row in rows if row[2] == LOST] == []
