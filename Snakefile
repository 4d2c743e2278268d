# One rule per notebook. `./run_all.sh` calls it with the run's folder as working directory; by hand:
#   snakemake --snakefile Snakefile --directory data/runs/tiny --cores 2 --config preset=tiny
#
# When a stage is redone: a stage that it reads was redone (its stage.json is newer), or `params.fingerprint` changed, which
# covers the notebook, the package modules that it imports, the preset's values, and the model and policy files. Times of
# source files do not count, so a fresh checkout of the same commit redoes nothing.
import os
import shlex
import sys

sys.path.insert(0, workflow.basedir)
from cdelta import paths
from cdelta.artifact import stages

preset, model, policy = (config.get(key, default) for key, default in (("preset", "tiny"), ("model", ""), ("policy", "")))
arguments = ["--preset", preset, "--run-dir", os.getcwd(), "--device", config.get("device", "auto")]
arguments += [f"--{key}={config[key]}" for key in ("model", "policy", "began") if key in config] + ["--retrain"] * ("retrain" in config)


def quoted(words):
    return shlex.join(words).replace("{", "{{").replace("}", "}}")


# `exec` makes the stage a child of Snakemake, so that it notices when Snakemake is killed.
RUN = f"exec {quoted([sys.executable, '-m', 'cdelta.artifact.stages'])} {{params.stage}} {quoted(arguments)}"


rule all:
    input:
        [f"{stage}/stage.json" for stage in stages.STAGES],


for position, stage in enumerate(stages.STAGES):

    rule:
        name:
            stages.rule_name(stage)
        input:
            ancient(stages.source(stage)),
            [f"{needed}/stage.json" for needed in stages.NEEDS[stage]],
        output:
            f"{stage}/stage.json",
            f"notebooks/{stage}.ipynb",
        params:
            stage=stage,
            fingerprint=stages.fingerprint(stage, preset, model, policy),
        threads: int(config.get("threads", 1))
        resources:
            mem_mb=stages.MEMORY_MB[stage],
        priority: len(stages.STAGES) - position
        shell:
            RUN
