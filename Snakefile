# One rule per notebook. `./run_all.sh` writes the run's settings into run.json in the run's folder and calls Snakemake
# there; by hand, in that folder:
#   snakemake --snakefile Snakefile --cores 2
#
# When a stage is redone: a stage that it reads was redone (its stage.json is newer), or `params.fingerprint` changed, which
# covers the notebook, the package modules that it imports, the settings that it reads, and the model and policy files.
# Times of source files do not count, so a fresh checkout of the same commit redoes nothing.
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from cdelta.artifact.run import read_settings
from cdelta.artifact.stages import SETTINGS, STAGES, fingerprint
from cdelta.files import read_json

threads_of_a_stage = read_json(SETTINGS)["threads"]
preset = read_settings(Path.cwd())
python = shlex.quote(sys.executable).replace("{", "{{").replace("}", "}}")


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
        threads: threads_of_a_stage
        resources:
            mem_mb=lambda wildcards, attempt: attempt * preset.resources.memory_mb,
            gpu=preset.resources.gpus,
            runtime=preset.resources.minutes,
        priority: len(STAGES) - position
        shell:
            # `exec` makes the stage a child of Snakemake, so that it notices when Snakemake is killed.
            f"exec {python} -m cdelta.artifact.stages {{params.stage}}"
