"""A user's edit on the embedded model, with the embedded set's rows, is the recorded edit of
notebook 04.

The fixture holds the mask, norms, some values, losses and k of crime's edit in figures/tiny. Equal
up to rounding on another processor.
"""

import json
from pathlib import Path

import pytest
import torch

from cdelta.artifact.presets import load_preset
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.job import EditJob, run_edit
from cdelta.paths import ORGANISM

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.slow
def test_an_edit_by_the_command_line_is_the_recorded_one(tmp_path):
    recorded = json.loads((FIXTURES / "tiny_crime_delta.json").read_text())
    out = tmp_path / "out"
    recipe = load_preset("tiny").recipe
    run_edit(EditJob(str(ORGANISM), "synthetic", "crime", str(out), recipe))
    delta = WeightDelta.load(out / "cdelta" / "delta")
    assert delta.mask_hash() == recorded["mask_sha256"]
    assert delta.k == recorded["k"]
    assert delta.metadata["training"]["steps"] == recorded["steps"]
    for name, norm in recorded["norms"].items():
        value = delta.values[name]
        assert value.norm().item() == pytest.approx(norm, rel=5e-3)
        first = torch.tensor(recorded["first_values"][name])
        torch.testing.assert_close(value.flatten()[:4], first, rtol=0, atol=2e-3)
    training = json.loads((out / "cdelta" / "training.json").read_text())
    for row in recorded["log"]:
        now = next(
            r for r in training["log"] if (r["side"], r["step"]) == (row["side"], row["step"])
        )
        assert now["target_loss"] == pytest.approx(row["target_loss"], rel=2e-2, abs=1e-4)
    curve = {row["k"]: row["target"] for row in training["curve"]}
    assert all(curve[k] == pytest.approx(rate, abs=0.051) for k, rate in recorded["target"])
