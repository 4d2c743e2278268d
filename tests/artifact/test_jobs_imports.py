"""The command that does jobs needs nothing that a plain machine with a GPU lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "matplotlib",
    "seaborn",
    "papermill",
    "jupytext",
    "nbformat",
    "nbconvert",
    "IPython",
    "snakemake",
    "datasets",
    "lm_eval",
    "peft",
    "transformer_lens",
)
SCRIPT = """
import sys

sys.modules.update(dict.fromkeys({heavy!r}))  # None: cannot be imported
from cdelta.artifact.jobs import main
sys.exit(main(["--run-dir", "nowhere", "--preset", "tiny", "--device", "cpu"]))
"""


@pytest.mark.long
def test_jobs_run_without_the_notebooks_packages(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(heavy=HEAVY)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "is not finished" in done.stderr, done.stderr
