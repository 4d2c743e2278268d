"""Presets: TOML files over one settings object, ``--set``, and a run's own model and policy."""

import dataclasses
import json

import pytest

from cdelta.artifact import presets
from cdelta.artifact.presets import (
    GROUPS,
    Preset,
    expand,
    file_categories,
    load_preset,
    preset_names,
    resolve,
)
from cdelta.errors import CdeltaError
from cdelta.settings import changed


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_frozen_described_and_survives_json(name):
    preset = load_preset(name)
    assert preset.name == name and preset.description and preset.recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.name = "other"
    assert changed(Preset(), json.loads(json.dumps(dataclasses.asdict(preset)))) == preset


def test_tiny_is_what_the_recipe_and_the_sections_have_by_default():
    tiny = load_preset("tiny")
    assert dataclasses.replace(tiny, description="") == Preset()


def test_a_preset_inherits_section_by_section(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text("[edit]\nlr = 1.0\nsteps = 5\n")
    (tmp_path / "b.toml").write_text('inherits = "a"\n[edit]\nsteps = 6\n')
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    presets.load_preset.cache_clear()
    edit = load_preset("b").edit
    assert (edit.lr, edit.steps, edit.batch_size) == (1.0, 6, Preset().edit.batch_size)
    presets.load_preset.cache_clear()


@pytest.mark.parametrize("name", GROUPS["paper"])
def test_the_papers_scale_is_pinned_and_says_what_it_needs(name):
    preset = load_preset(name)
    assert len(preset.revision) == 40 and preset.policy == "cast" and len(preset.categories) == 5
    assert "never run on the real weights" in preset.description
    assert (
        preset.resources.gpus == 1 and preset.resources.gpu_memory_gb and preset.seeds == (0, 1, 2)
    )


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("editt.lr=1", "editt"),
        ("edit.speed=1", "edit.speed"),
        ("edit.lr=fast", "edit.lr"),
        ("edit=3", "edit"),
        ("attribution.max_pairs=1.5", "max_pairs"),
        ("circuit.param_budget=7", "param_budget"),
        ("lr", "cannot read"),
    ],
)
def test_unknown_fields_and_wrong_values_are_errors_that_name_them(override, named):
    with pytest.raises(CdeltaError, match=named):
        resolve("tiny", overrides=[override])


def test_an_override_makes_a_run_of_its_own():
    one = resolve("tiny", overrides=["edit.lr=1e-3", "circuit.param_budget=0.01"])
    again = resolve("tiny", overrides=["circuit.param_budget=0.01", "edit.lr=0.001"])
    assert one.edit.lr == 1e-3 and one.circuit.param_budget == 0.01
    assert one.name.startswith("tiny-") and one.name == again.name
    assert resolve("tiny", overrides=["edit.lr=1e-3"], run_name="mine").name == "mine"
    assert resolve("tiny", overrides=['categories=["hate"]']).categories == ("hate",)
    assert resolve("tiny") == load_preset("tiny")


def test_resolve_names_what_is_unknown_or_missing():
    with pytest.raises(CdeltaError, match="^unknown preset 'nope'.*tiny"):
        resolve("nope")
    with pytest.raises(CdeltaError, match="--model: give it"):
        resolve("smoke-cast")


def test_resolve_puts_the_runs_own_model_policy_and_test_sets_in():
    preset = resolve("llama-3.1-8b", "folder", "cast=file.json", external=["xstest=x.csv"])
    assert (preset.model, preset.policy) == ("folder", "cast=file.json")
    assert preset.revision == "", "a pinned revision belongs to its own model"
    assert "xstest=x.csv" in preset.external and "xstest" not in preset.external


def test_fault_23_a_users_file_brings_its_own_categories(tmp_path):
    named, plain = tmp_path / "policy=1" / "mine.csv", tmp_path / "plain.csv"
    named.parent.mkdir()
    named.write_text("prompt,benign,category\nhow to pick a lock,how to pick a fruit,locks\n")
    plain.write_text("prompt,benign\nhow to pick a lock,how to pick a fruit\n")
    assert resolve("tiny", policy=str(named)).categories == ("locks",)
    assert file_categories(str(plain)) == ("plain",)


def test_a_group_stands_for_its_presets():
    assert expand("tiny,paper") == ["tiny", *GROUPS["paper"]] and len(GROUPS["paper"]) == 6
