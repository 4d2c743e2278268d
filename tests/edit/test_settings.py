"""Settings by name: presets, overrides and flags give the same object, and every mistake is
named."""

import argparse
import json
import math
from dataclasses import asdict, dataclass, field

import pytest
from hypothesis import given as drawn
from hypothesis import settings as limits
from hypothesis import strategies as st

from cdelta.edit.recipe import EditRecipe, Recipe
from cdelta.errors import CdeltaError
from cdelta.settings import (
    add_flags,
    changed,
    field_help,
    field_types,
    given,
    load_toml,
    parse_overrides,
)

SECTIONS = field_types(Recipe)
FIELDS = [f"{part}.{name}" for part, kind in SECTIONS.items() for name in field_types(kind)]


def parsed(*words: str) -> Recipe:
    parser = argparse.ArgumentParser()
    add_flags(parser, Recipe)
    return given(parser.parse_args(words), Recipe())


def test_three_ways_give_the_same_recipe(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[edit]\nlr = 1e-3\nrefusal = "No."\n[answers]\ngrid = [0, 1]\n')
    flags = parsed("--lr", "1e-3", "--refusal", "No.", "--grid", "0,1")
    overrides = parsed(
        "--set", "edit.lr=1e-3", "--set", 'edit.refusal="No."', "--set", "answers.grid=[0, 1]"
    )
    assert load_toml(file, Recipe) == flags == overrides != Recipe()
    assert flags.edit.lr == 1e-3 and flags.answers.grid == (0.0, 1.0)
    assert flags.edit.steps == Recipe().edit.steps


def test_every_field_has_help_and_a_flag_of_its_own():
    for kind in SECTIONS.values():
        assert all(len(field_help(kind)[name]) > 10 for name in field_types(kind))
    parser = argparse.ArgumentParser()
    add_flags(parser, Recipe)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert {f"--{name.rsplit('.', 1)[1].replace('_', '-')}" for name in FIELDS} <= flags
    assert field_help(EditRecipe)["lr"] in " ".join(parser.format_help().split())


def test_a_recipe_survives_json_and_back():
    recipe = changed(Recipe(), {"edit": {"rank": 3}, "answers": {"template_args": ["a=1"]}})
    assert changed(Recipe(), json.loads(json.dumps(asdict(recipe)))) == recipe


@dataclass(frozen=True)
class Part:
    """A part."""

    size: int = 1
    """Its size."""


@dataclass(frozen=True)
class Both:
    """Two parts."""

    one: Part = field(default_factory=Part)
    two: Part = field(default_factory=Part)


def test_a_name_that_two_sections_share_is_told_by_its_section():
    parser = argparse.ArgumentParser()
    add_flags(parser, Both)
    assert given(parser.parse_args(["--two-size", "5"]), Both()) == Both(two=Part(5))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lr", "fast"], "'edit.lr' is 'fast': it must be a number"),
        (["--steps", "1.5"], "'edit.steps' is 1.5: it must be a whole number"),
        (["--steps", "true"], "must be a whole number"),
        (["--retain-loss", "mse"], "one of answers, kl"),
        (["--grid", "0,x"], "it must be a number"),
        (["--set", "edit.nosuch=1"], "unknown setting 'edit.nosuch': known here are .*lr"),
        (["--set", "nosuch.lr=1"], "unknown setting 'nosuch': known here are attribution, circuit"),
        (["--set", "edit=1"], "'edit' is a section"),
        (["--set", "edit.lr.x=1"], "unknown|number"),
        (["--set", "edit.lr"], "write section.field=value"),
        (["--set", "edit.lr=1", "--set", "edit.lr.x=1"], "no section"),
        (["--set", "edit.lr.x=1"], "'edit.lr' is .*: it must be a number"),
        (["--steps", "0"], "steps must be above 0"),
        (["--lr", "inf"], "lr must be finite"),
        (["--retain-share", "1.0"], r"retain_share must lie in \[0, 1\)"),
        (["--param-budget", "0"], r"param_budget must lie in \(0, 1\]"),
        (["--refuse-at", "2"], "share from 0 to 1"),
        (["--first-tokens", "-1"], "must not be negative"),
        (["--refusal", " "], "must not be empty"),
        (["--template-args", "thinking"], "NAME=VALUE"),
        (["--grid", ""], "at least one"),
    ],
)
def test_a_mistake_is_named_with_the_remedy(words, message):
    with pytest.raises(CdeltaError, match=message):
        parsed(*words)


@pytest.mark.parametrize(
    "text, message",
    [("[edit\n", "not valid TOML"), ("[edit]\nnosuch = 1\n", "nosuch"), ("edit = 3\n", "section")],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(CdeltaError, match=message) as error:
        load_toml(file, Recipe)
    assert str(file) in str(error.value)
    with pytest.raises(CdeltaError, match="cannot read"):
        load_toml(tmp_path / "nothing.toml", Recipe)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CdeltaError, match="not valid TOML"):
        load_toml(file, Recipe)


def test_overrides_are_nested():
    assert parse_overrides(["a.b=1", "a.c=2", "d=3"]) == {"a": {"b": 1, "c": 2}, "d": 3}
    assert parse_overrides(["edit.refusal=I can't.", "edit.lr=3"]) == {
        "edit": {"refusal": "I can't.", "lr": 3}
    }


NAMES = st.sampled_from([*FIELDS, "edit", "x", "edit.x", "", "edit..lr"])
VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["1", "0", "-1", "1e-3", "nan", "inf", "true", "[1, 2]", "[]", "{}", "1e400"]),
    st.floats().map(str),
    st.integers().map(str),
)


@limits(max_examples=400, deadline=None)
@drawn(st.lists(st.tuples(NAMES, VALUES), max_size=4))
def test_any_override_gives_a_recipe_or_one_sentence(pairs):
    try:
        recipe = changed(Recipe(), parse_overrides(f"{name}={value}" for name, value in pairs))
    except CdeltaError as error:
        assert str(error)
    else:
        values = [value for part in asdict(recipe).values() for value in part.values()]
        assert all(not isinstance(value, float) or math.isfinite(value) for value in values)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@limits(max_examples=300, deadline=None)
@drawn(st.dictionaries(st.sampled_from(["lr", "grid", "steps", "rank", "refusal", "x"]), JSON))
def test_any_mapping_gives_settings_or_one_sentence(values):
    try:
        assert isinstance(changed(EditRecipe(), values), EditRecipe)
    except CdeltaError as error:
        assert str(error)
