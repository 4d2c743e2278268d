import dataclasses
import json

import pytest

from cdelta.artifact.presets import PRESETS, TINY, as_dict, changed, resolve
from cdelta.errors import CdeltaError


def test_every_preset_is_frozen_named_by_its_key_and_plain_data():
    for name, preset in PRESETS.items():
        assert preset.name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset.name = "other"
        assert json.loads(json.dumps(as_dict(preset)))["edit"]["lr"] == preset.edit.lr


def test_changes_reach_one_setting_and_leave_the_rest():
    new = changed(TINY, {"edit": {"lr": 1}, "categories": ["crime"]})
    assert new.edit.lr == 1.0 and isinstance(new.edit.lr, float) and new.categories == ("crime",)
    assert dataclasses.replace(new, edit=TINY.edit, categories=TINY.categories) == TINY


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"editt": {}}, "editt"),
        ({"edit": {"speed": 1}}, "speed"),
        ({"edit": {"lr": "fast"}}, "lr"),
        ({"edit": 3}, "edit"),
        ({"data": {"max_pairs": 1.5}}, "max_pairs"),
        ({"data": {"max_pairs": True}}, "max_pairs"),
    ],
)
def test_unknown_keys_and_wrong_types_are_errors_that_name_them(changes, named):
    with pytest.raises(CdeltaError, match=named):
        changed(TINY, changes)


def test_resolve_names_what_is_unknown_or_missing():
    with pytest.raises(CdeltaError, match="unknown preset 'nope'.*tiny"):
        resolve("nope")
    with pytest.raises(CdeltaError, match="--model and --policy"):
        resolve("smoke-cast")
    with pytest.raises(CdeltaError, match="--policy: give it"):
        resolve("smoke-cast", model="somewhere")


def test_resolve_puts_the_runs_own_model_and_policy_in():
    preset = resolve("llama-3.1-8b", policy="cast=file.json")
    assert preset.policy == "cast=file.json" and len(preset.revision) == 40
    assert resolve("llama-3.1-8b", "folder", "x.csv").revision == "", (
        "a pinned revision belongs to its own model"
    )
