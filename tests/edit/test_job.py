"""`cdelta edit` goes on after a kill, at any moment, to the same bytes; a check says beforehand
what it meets.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import edit_arguments, save_editable, write_policy

from cdelta.attribution.scores import Totals
from cdelta.cli import main
from cdelta.edit.check import check_edit, duration
from cdelta.edit.job import EditJob
from cdelta.edit.recipe import Recipe
from cdelta.settings import changed

HERE = Path(__file__).parent
STEPS = ("answers", "circuit", "circuit.json", "training", "scale")
"""What an edit leaves behind in its work folder, in order."""


@pytest.fixture
def folder(tmp_path):
    save_editable(tmp_path / "base")
    write_policy(tmp_path / "policy.csv")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cdelta.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_fault_28_an_edit_that_is_killed_goes_on_to_the_same_bytes(folder):
    """Killed as soon as each step has left its first trace, then run to the end."""
    whole = [*edit_arguments(folder, out=folder / "whole", **{"check-every": 5})]
    assert main(whole) == 0
    arguments, work = edit_arguments(folder, **{"check-every": 5}), folder / ".out.work"
    for step in STEPS:
        process = start(arguments)
        while process.poll() is None and not (work / step).exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].decode()
        assert process.returncode in (0, -signal.SIGKILL), said
        finished = (folder / "out").exists()  # it was faster than the kill
        assert finished != work.exists()
        shutil.rmtree(folder / "out", ignore_errors=True)
    process = start(arguments)
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    assert finished or "Going on with the edit that was begun" in said
    assert contents(folder / "out") == contents(folder / "whole")
    assert {p.name for p in folder.iterdir()} == {"base", "policy.csv", "whole", "out"}


@pytest.mark.long
def test_another_recipe_begins_anew(folder, capsys, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cdelta.edit.job.choose_scale", killed)
    assert main(edit_arguments(folder)) == 130
    assert "goes on where it was" in capsys.readouterr().err and (folder / ".out.work").exists()
    monkeypatch.undo()
    assert main(edit_arguments(folder, lr=0.015)) == 0
    assert "Going on" not in capsys.readouterr().out and not (folder / ".out.work").exists()


@pytest.mark.long
def test_a_damaged_circuit_of_a_begun_edit_is_found_again(folder, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cdelta.edit.job.choose_scale", killed)
    assert main(edit_arguments(folder)) == 130
    found = folder / ".out.work" / "circuit.json"
    whole = found.read_bytes()
    found.write_bytes(whole[: len(whole) // 2])
    monkeypatch.undo()
    assert main(edit_arguments(folder)) == 0
    assert (folder / "out" / "cdelta" / "circuit.json").read_bytes() == whole


@pytest.mark.long
def test_a_killed_attribution_goes_on_after_its_last_micro_batch(folder, monkeypatch):
    few = {"micro-batch": 2}
    assert main(edit_arguments(folder, out=folder / "whole", **few)) == 0
    batches, add = [], Totals.add

    def killed_in_the_third(self, *given):
        if self.per_pair:  # an estimate of the cost keeps none
            batches.append(given)
        if len(batches) == 3 and self.per_pair:
            raise KeyboardInterrupt
        add(self, *given)

    monkeypatch.setattr(Totals, "add", killed_in_the_third)
    assert main(edit_arguments(folder, **few)) == 130
    assert main(edit_arguments(folder, **few)) == 0
    monkeypatch.undo()
    assert len(batches) == 6 // 2 + 1  # the third again, no other
    assert contents(folder / "out") == contents(folder / "whole")


@pytest.mark.long
def test_a_circuit_found_on_a_refusing_model_is_another_one(folder, capsys):
    given = {"localise-on": "refusing", "refusing-budget": 0.5, "metric": "sequence"}
    assert main(edit_arguments(folder, out=folder / "other", **given)) == 0
    assert main(edit_arguments(folder, metric="sequence")) == 0
    first, second = (
        (folder / name / "cdelta" / "circuit.json").read_bytes() for name in ("other", "out")
    )
    assert first != second


# ---------------------------------------------------------------------- check


def findings(folder, **recipe):
    values = {"attribution": {"min_pairs": 4}, **recipe}
    job = EditJob(
        str(folder / "base"), str(folder / "policy.csv"), "weapons", str(folder / "out"),
        changed(Recipe(), values),
    )  # fmt: skip
    return check_edit(job)


def test_check_says_what_an_edit_would_meet(folder):
    found = findings(folder)
    texts = {finding.topic: finding.text for finding in found}
    assert not [each for each in found if each.level == "problem"]
    assert texts["pairs"].startswith("weapons: 6 of equal length")
    assert texts["cost"].startswith("Estimate: model of 29,408 parameters")
    assert "24 edit" in texts["prompts"]


def test_check_names_every_problem_at_once(folder, capsys):
    (folder / "policy.csv").write_text("prompt,benign\n")
    (folder / "base" / "model.safetensors").write_bytes(b"")
    problems = [each for each in findings(folder) if each.level == "problem"]
    assert {"policy", "weights"} <= {each.topic for each in problems}
    command = ["check", "--model", str(folder / "base"), "--policy", str(folder / "policy.csv")]
    assert main([*command, "--category", "weapons"]) == 1
    assert "problem" in capsys.readouterr().out


def test_check_of_a_model_alone(folder, capsys):
    assert main(["check", "--model", str(folder / "base")]) == 0
    assert "Nothing stands in the way" in capsys.readouterr().out


def test_check_tells_too_few_pairs(folder):
    found = findings(folder, attribution={"min_pairs": 99})
    assert any("99 needed" in each.text for each in found if each.level == "problem")


@pytest.mark.parametrize("seconds, text", [(5.4, "5 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------------- ask


@pytest.mark.long
def test_ask_shows_both_models_side_by_side(folder, capsys, monkeypatch):
    assert main(edit_arguments(folder)) == 0
    (folder / "prompts.txt").write_text("w0 w1 w2 w3 w4 bomb\n\nw0 w1 w2 w3 w4 cake\n")
    capsys.readouterr()
    command = ["ask", str(folder / "base"), str(folder / "out"), "--max-new-tokens", "6"]
    assert main([*command, "--prompts", str(folder / "prompts.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == 2 * [">", "base", "edited"]
    assert "'please tell me'" in lines[2] and "please" not in lines[5]
    monkeypatch.setattr(sys, "stdin", io.StringIO((folder / "prompts.txt").read_text()))
    assert main(command) == 0 and capsys.readouterr().out.splitlines() == lines
    (folder / "prompts.txt").write_text("\n")
    assert main([*command, "--prompts", str(folder / "prompts.txt")]) == 2
    assert "holds no prompt" in capsys.readouterr().err
