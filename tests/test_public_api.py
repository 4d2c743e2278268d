"""What `import cdelta` offers, and what it costs."""

import subprocess
import sys
import time

import pytest

import cdelta
from cdelta import cli
from cdelta.delta.weight_delta import OVERLAPS

NAMES = """
load_model ModelSpec UnsupportedArchitecture PromptPairs attribute Scores Circuit ParameterMask
fit_delta WeightDelta save_edited verify revert VerifyReport Recipe find_circuit train choose_scale
training_rows Policy build_policy CdeltaError
""".split()  # noqa: SIM905


def python(*words: str) -> tuple[str, float]:
    """Output and seconds of user time of a fresh interpreter."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return done.stdout, time.perf_counter() - start


@pytest.mark.parametrize("name", NAMES)
def test_public_names(name):
    assert getattr(cdelta, name).__name__ == name and name in dir(cdelta)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cdelta.nothing


@pytest.mark.long
def test_scores_select_circuits_wherever_they_come_from():
    code = "from cdelta import Scores; assert Scores.select"
    python("-c", code)


@pytest.mark.parametrize(
    "command",
    [
        ["import cdelta; cdelta.__version__"],
        ["from cdelta import cli; cli.parser().format_help()"],
        ["from cdelta import cli\ntry: cli.main(['edit', '--help'])\nexcept SystemExit: pass"],
        ["from cdelta.edit.recipe import Recipe; from cdelta.settings import changed; Recipe()"],
    ],
)
def test_nothing_heavy_is_imported(command):
    """In processor time, so that busy machines do not matter: .3 s for the import."""
    heavy = "{'torch', 'transformers', 'pandas', 'numpy', 'scipy', 'safetensors'}"
    code = (
        f"{command[0]}\nimport sys, time\nassert not {heavy} & sys.modules.keys()\n"
        "print(time.process_time())"
    )
    out, _ = python("-c", code)
    assert float(out.splitlines()[-1]) < 0.3


def test_the_command_line_knows_the_rules_for_overlaps():
    commands = next(action for action in cli.parser()._actions if action.choices).choices
    (overlap,) = [a for a in commands["combine"]._actions if a.dest == "overlap"]
    assert set(overlap.choices) == set(OVERLAPS)
