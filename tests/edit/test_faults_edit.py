"""Faults that users met elsewhere, each with a small input; named by their numbers in the list."""

import re
import shlex
from pathlib import Path

import pytest
import toys
from edits import random_delta
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
from cdelta.errors import CdeltaError
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


@pytest.mark.long
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


@pytest.mark.long
def test_fault_06_a_refusal_longer_than_the_answers_is_known_by_its_beginning(folder, capsys):
    """Sixty words where answers have six tokens."""
    long = "please tell me about a cake poem song story " * 6
    assert main(edit_arguments(folder, refusal=long.strip())) == 0
    target = next(line for line in capsys.readouterr().out.splitlines() if line[:6] == "target")
    assert float(target.split()[4]) > 50


def test_fault_06_an_edit_without_effect_writes_nothing(folder, capsys):
    message = r"no effect on validation .*--steps.*--param-budget.*--refusal"
    refused(folder, capsys, edit_arguments(folder, steps=1, lr=1e-9), message)


@pytest.mark.long
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
    workflow = (ROOT / "cdelta" / "artifact" / "workflow.toml").read_text(encoding="utf-8")
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


@pytest.mark.long
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


def test_fault_03_keywords_of_a_template_are_flags_of_edit_check_and_ask(tmp_path, capsys):
    """Each by its own flag, beside those of the recipe; a value may hold a comma."""
    folder = save_editable(tmp_path / "base")
    template = "{{ 1 / 0 if tone != 'kind, short' }}" + toys.TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    told = ["--template-arg", "thinking=false", "--template-arg", "tone=kind, short"]
    assert main(["check", "--model", str(folder), "--recipe", "tiny"]) == 1
    assert main(["check", "--model", str(folder), "--recipe", "tiny", *told]) == 0
    (tmp_path / "asked.txt").write_text("make a cake")
    ask = ["ask", str(folder), str(folder), "--prompts", str(tmp_path / "asked.txt")]
    refused(tmp_path, capsys, ask, "chat template cannot write")
    assert main([*ask, *told, "--max-new-tokens", "2"]) == 0


def longrope_rows(lengths):
    return [(" ".join(["red"] * length), "song") for length in lengths]


def test_fault_07_training_rows_beyond_the_original_context_are_refused():
    """They would change the positions of every row that shares their batch."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    rope |= factors | {"original_max_position_embeddings": 16}
    model = toys.toy("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    tok, mask = toys.toy_tokenizer(), random_mask(ModelSpec.from_model(model), 0.2, 0)
    short, mixed, long = (longrope_rows(each) for each in ((4, 6), (4, 20), (20, 22)))
    with pytest.raises(CdeltaError, match="3 of 6 training rows exceed 16 tokens.*shorten"):
        fit_delta(model, tok, mask, mixed, mixed, mixed, steps=1)
    for rows in (short, long):
        assert fit_delta(model, tok, mask, rows, rows, rows, steps=1).count()


def test_fault_17_a_damaged_metric_is_one_sentence(edited, capsys):
    path = edited / "out" / "cdelta" / "metric.json"
    kept = path.read_text()
    (edited / "asked.txt").write_text("make a cake")
    ask = ["ask", edited / "base", edited / "out", "--prompts", edited / "asked.txt"]
    for content in ("", "[]", "{}", '{"refuse": 3, "comply": [4]}', "version https://git-lfs.g\n"):
        path.write_text(content)
        refused(edited, capsys, [str(part) for part in ask], "metric.json is (damaged|a Git LFS)")
    path.write_text(kept)
    assert main([*map(str, ask), "--max-new-tokens", "2"]) == 0


def test_fault_19_the_command_that_is_named_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "run #3 $x"
    folder.mkdir()
    base = save_editable(folder / "base")
    random_delta(load_model(base, dtype="float32", device="cpu")[0]).save(folder / "delta")
    assert main(["apply", *(str(folder / name) for name in ("base", "delta", "out"))]) == 0
    named = capsys.readouterr().out.partition("check it with: ")[2]
    assert shlex.split(named)[0] == "cdelta" and main(shlex.split(named)[1:]) == 0


def test_fault_24_too_few_pairs_are_said_before_any_answer(folder, capsys, monkeypatch):
    monkeypatch.setattr("cdelta.edit.job.evaluate", None)
    refused(folder, capsys, edit_arguments(folder, **{"min-pairs": 99}), r"\(--min-pairs\)")
