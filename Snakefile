# One rule per notebook. `./run_all.sh` writes the run's settings into run.json in the run's folder and calls Snakemake
# there; by hand, in that folder:
#   snakemake --snakefile Snakefile --cores 2
#
# When a stage is redone: a stage that it reads was redone (its stage.json is newer), or `params.fingerprint` changed, which
# covers the notebook, the package modules that it imports, the settings that it reads, and the model and policy files.
# Times of source files do not count, so a fresh checkout of the same commit redoes nothing.
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from cdelta.artifact.run import SETTINGS, read_settings
from cdelta.artifact.stages import STAGES, fingerprint

run_dir = os.getcwd()
facts = json.loads(Path(SETTINGS).read_text(encoding="utf-8"))
preset = read_settings(Path(run_dir))
arguments = ["--preset", facts["preset_file"], "--run-dir", run_dir, "--device", facts["device"], "--began", str(facts["began"])]
arguments += ["--retrain"] * facts["retrain"]


def quoted(words):
    return shlex.join(words).replace("{", "{{").replace("}", "}}")


# `exec` makes the stage a child of Snakemake, so that it notices when Snakemake is killed.
command = f"exec {quoted([sys.executable, '-m', 'cdelta.artifact.execution'])} {{params.stage}} --fingerprint {{params.fingerprint}} {quoted(arguments)}"


rule all:
    input:
        [f"{stage.name}/stage.json" for stage in STAGES],


for position, stage in enumerate(STAGES):

    rule:
        name:
            stage.rule
        input:
            [f"{needed}/stage.json" for needed in stage.needs],
        output:
            f"{stage.name}/stage.json",
            f"notebooks/{stage.name}.ipynb",
        params:
            stage=stage.name,
            fingerprint=fingerprint(stage.name, preset),
        threads: facts["threads"]
        resources:
            mem_mb=preset.resources.memory_mb,
            gpus=preset.resources.gpus,
            runtime=preset.resources.minutes,
        priority: len(STAGES) - position
        shell:
            command
