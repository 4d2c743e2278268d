"""The recorded masks of the embedded model, computed anew: the method's localisation from end to
end."""

import json

import pytest

from cdelta.attribution.metrics import refusal_log_odds
from cdelta.attribution.scores import attribute
from cdelta.circuit.selection import select_units, unit_scores
from cdelta.models.loading import load_model
from cdelta.paths import ORGANISM, ROOT
from cdelta.policy.build import build_policy
from cdelta.policy.pairs import category_pairs

GOLDEN = json.loads((ROOT / "tests" / "fixtures" / "tiny_masks.json").read_text())


@pytest.fixture(scope="module")
def subject():
    model, tok = load_model(ORGANISM, dtype="float32", device="cpu", attn_implementation="eager")
    return model, tok, build_policy("synthetic", tok=tok, max_tokens=100).records


@pytest.mark.slow
@pytest.mark.parametrize("category", GOLDEN["masks"])
def test_the_recorded_mask_is_found_again(subject, category):
    model, tok, records = subject
    expected = GOLDEN["masks"][category]
    pairs, _ = category_pairs(records, category, tok, GOLDEN["max_pairs"])
    assert pairs.hash() == expected["pairs_hash"]
    metric = refusal_log_odds(GOLDEN["token_sets"]["refuse"], GOLDEN["token_sets"]["comply"])
    scores = attribute(model, pairs, metric, per_pair=True)
    circuit = select_units(scores.spec, *unit_scores(scores), GOLDEN["param_budget"])
    assert len(circuit.nodes) == expected["units"]
    assert circuit.to_mask(scores.spec).hash() == expected["sha256"]
