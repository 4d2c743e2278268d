"""Faults that users met elsewhere, each with a small input; named by their numbers in the list."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import given as drawn
from hypothesis import settings as limits
from hypothesis import strategies as st
from test_cli import edit_arguments, names, save_editable, write_policy
from toys import family_folder

from cdelta.circuit.controls import random_mask
from cdelta.cli import main, parser
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.fit import fit_delta
from cdelta.models.checkpoint import Checkpoint
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A folder with a base, a policy and an edited checkpoint `out`."""
    folder = tmp_path_factory.mktemp("edited")
    save_editable(folder / "base")
    write_policy(folder / "policy.csv")
    assert main(edit_arguments(folder, grid="0.8")) == 0
    return folder


@pytest.fixture
def folder(tmp_path):
    save_editable(tmp_path / "base")
    write_policy(tmp_path / "policy.csv")
    return tmp_path


def refused(folder, capsys, arguments, message):
    before = names(folder)
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and re.search(message, said) and said.count("\n") == 1
    assert names(folder) == before


@pytest.mark.parametrize("command", ["apply", "lora"])
def test_fault_04_the_deltas_own_k_is_used_and_printed(edited, tmp_path, capsys, command):
    delta = str(edited / "out" / "cdelta" / "delta")
    places = [str(edited / "base"), delta] if command == "apply" else [delta]
    assert main([command, *places, str(tmp_path / "own")]) == 0
    assert "at scale k = 0.8" in capsys.readouterr().out
    assert main([command, *places, str(tmp_path / "one"), "--scale", "1"]) == 0
    assert "at scale k = 1" in capsys.readouterr().out
    if command == "apply":
        own, same = (Checkpoint(path) for path in (tmp_path / "own", edited / "out"))
        assert all((a == b).all() for (_, a), (_, b) in zip(own.parameters(), same.parameters()))


@pytest.mark.parametrize("refusal", ["", "  ", "…!"])
def test_fault_06_an_empty_refusal_is_refused(folder, capsys, refusal):
    refused(folder, capsys, edit_arguments(folder, refusal=refusal), "refusal")


def test_fault_06_a_refusal_longer_than_the_answers_is_known_by_its_beginning(folder, capsys):
    """Sixty words where answers have six tokens."""
    long = "please tell me about a cake poem song story " * 6
    assert main(edit_arguments(folder, refusal=long.strip())) == 0
    target = next(line for line in capsys.readouterr().out.splitlines() if line[:6] == "target")
    assert float(target.split()[4]) > 50


def test_fault_06_an_edit_without_effect_writes_nothing(folder, capsys):
    message = r"no effect on validation .*--steps.*--param-budget.*--refusal"
    refused(folder, capsys, edit_arguments(folder, steps=1, lr=1e-9), message)


def test_fault_12_the_dtype_of_the_fit_does_not_decide_about_the_base(folder, capsys):
    arguments = edit_arguments(folder, dtype="bfloat16")
    assert main(arguments) == 0
    delta = WeightDelta.load(folder / "out" / "cdelta" / "delta")
    assert delta.check_base(folder / "base")


def test_fault_24_every_flag_that_a_message_names_exists():
    commands = next(a for a in parser()._actions if a.choices)
    known = {
        option
        for command in commands.choices.values()
        for action in command._actions
        for option in action.option_strings
    }
    workflow = (ROOT / "cdelta" / "artifact" / "flags.py").read_text(encoding="utf-8")
    for path in sorted((ROOT / "cdelta").rglob("*.py")):
        if "artifact" in path.parts:
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8")):
            assert flag in known | PLACEHOLDERS or flag in workflow, f"{path}: {flag}"


PLACEHOLDERS = {"--help", "--field", "--section-field"}
FLAGS = sorted(
    {
        option
        for action in next(a for a in parser()._actions if a.choices).choices["edit"]._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
)


@limits(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@drawn(
    st.sampled_from(["edit", "check", "apply", "verify", "lora", "combine", "revert", "ask", "x"]),
    st.lists(
        st.sampled_from(FLAGS) | st.text(max_size=8) | st.sampled_from(["1", "nan", "a=b", "--"]),
        max_size=8,
    ),
)
def test_any_command_line_is_one_sentence(capsys, command, words):
    """No model is given, so nothing can be done: exit code 2 (or help), one line, no traceback."""
    try:
        code = main([command, *words])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    assert code == 2 or (code == 0 and "usage" in said.out)
    assert said.err.count("\n") <= 1 and "Traceback" not in said.err


def test_fault_03_the_date_of_a_template_is_recorded_with_the_delta(tmp_path):
    folder = family_folder("llama", tmp_path / "llama")
    model, tok = load_model(folder, dtype="float32", device="cpu")
    mask = random_mask(ModelSpec.from_model(model), 0.2, 0)
    rows = [("one two", "no"), ("three four", "never")]
    delta = fit_delta(model, tok, mask, rows, rows, rows, steps=1)
    assert "2024" in delta.metadata["template_date"]
