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
from cdelta.artifact.stages import NAMES, SETTINGS, SHARED, fingerprint, needs, short_name
from cdelta.files import read_json

told = read_json(SETTINGS)
preset = read_settings(Path.cwd())
python = shlex.quote(sys.executable).replace("{", "{{").replace("}", "}}")


def processes(stage):
    return told["workers"] if stage in SHARED else 1


def parts(stage):
    """A file per category and seed whose jobs are done on a node of their own."""
    pairs = [(category, seed) for category in preset.categories for seed in preset.seeds]
    return [f".parts/{stage}/{category}-{seed}" for category, seed in pairs]


fan_out = SHARED if told.get("executor") else ()


def memory(stage):
    needed = preset.resources.memory_mb * processes(stage)
    return lambda wildcards, attempt: attempt * needed


rule all:
    input:
        [f"{stage}/stage.json" for stage in NAMES],


for position, stage in enumerate(NAMES):

    rule:
        name:
            short_name(stage)
        input:
            [f"{needed}/stage.json" for needed in needs(stage)],
            parts(stage) if stage in fan_out else [],
        output:
            f"{stage}/stage.json",
            f"notebooks/{stage}.ipynb",
        params:
            stage=stage,
            fingerprint=fingerprint(stage, preset),
        threads: max(told["threads"], processes(stage))
        resources:
            mem_mb=memory(stage),
            gpu=preset.resources.gpus,
            runtime=preset.resources.minutes,
        priority: len(NAMES) - position
        shell:
            # `exec` makes the stage a child of Snakemake, so that it notices when Snakemake is killed.
            f"exec {python} -m cdelta.artifact.stages {{params.stage}}"

# On a cluster, the jobs of a shared stage run in parallel, a category and seed on each node; the stage's own rule then
# collects them. The files are temporary, so that a finished stage does not miss them.
for stage in fan_out:

    rule:
        name:
            f"{short_name(stage)}_part"
        input:
            [f"{needed}/stage.json" for needed in needs(stage)],
        output:
            temp(touch(f".parts/{stage}/{{category}}-{{seed}}")),
        params:
            number=stage[:2],
            fingerprint=fingerprint(stage, preset),
        wildcard_constraints:
            seed=r"\d+",
        threads: max(told["threads"], processes(stage))
        resources:
            mem_mb=memory(stage),
            gpu=preset.resources.gpus,
            runtime=preset.resources.minutes,
        shell:
            f"exec {python} -m cdelta.artifact.jobs --run-dir . --stage {{params.number}} "
            "--categories {wildcards.category:q} --seeds {wildcards.seed}"
