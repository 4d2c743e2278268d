"""Short campaigns of faults; CONTRIBUTING.md has the long ones."""

import pytest

from robustness import stages
from robustness.campaign import FAULTS, LOST, STAGES, campaign, can_mount


@pytest.mark.slow
@pytest.mark.e2e
def test_whatever_goes_wrong_nothing_is_lost(tmp_path):
    rows = list(campaign(tmp_path, trials=24, seed=11))
    n_faults = len(FAULTS) if can_mount() else len(FAULTS) - 2
    assert len({row[:2] for row in rows}) == min(24, n_faults * len(STAGES))
    assert [row for row in rows if row[2] == LOST] == []


@pytest.mark.slow
@pytest.mark.e2e
def test_whatever_disturbs_a_stage_nothing_is_lost(tmp_path):
    rows = list(stages.campaign(tmp_path, trials=2, seed=3, light=True))
    assert len({row[1] for row in rows}) == 2
    assert [row for row in rows if row[2] == LOST] == []
