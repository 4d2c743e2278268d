"""Presets: subject, data, recipe and evaluation of one run.

A preset is a TOML file in ``cdelta/artifact/presets/`` over the dataclasses below, whose defaults
are what `tiny` runs; ``inherits = "tiny"`` begins from another one. ``--set section.field=value``
changes any field for a run of its own. Unknown names and wrong types are errors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from cdelta.edit.recipe import AnswersRecipe, AttributionRecipe, CircuitRecipe, EditRecipe, Recipe
from cdelta.errors import CdeltaError
from cdelta.files import read_toml
from cdelta.settings import changed, parse_overrides

FOLDER = Path(__file__).parent / "presets"
PAPER = "qwen2.5-0.5b,llama-3.2-1b,llama-3.2-3b,gemma-2-2b,qwen2.5-7b,llama-3.1-8b"
GROUPS = {"paper": PAPER.split(",")}
"""Names for several presets that run in one command: the paper's scale is six models, five
categories and three seeds."""


@dataclass(frozen=True)
class Organism:
    """Training of the embedded model, when notebook 00 retrains it."""

    steps: int = 1600
    """Training steps."""
    batch_size: int = 96
    """Samples in a step."""


@dataclass(frozen=True)
class Data:
    """How much of the policy set is used."""

    limit: int = 0
    """Prompts per category, role, skill, set and split that the base answers in stage 01, and that
    all later stages know (0: all)."""


@dataclass(frozen=True)
class Study:
    """What notebooks 02 and 03 measure beside the circuit that is edited."""

    convergence: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers of IG steps that notebook 02 compares."""
    exact_pairs: int = 3
    """Pairs that notebook 02 patches edge by edge, the slow oracle (hours on a real model); 0: a
    finer EAP-IG stands in."""
    pairs: int = 30
    """Held-out pairs per category (val split) that circuits are run on (0: all)."""
    fractions: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Sizes of the circuits of a faithfulness curve (MIB's): shares of all units' parameters, or of
    all edges."""
    seeds: int = 3
    """Samples of pairs, each with a circuit of its own, that meet the controls."""
    draws: int = 2
    """Random masks, and layer-matched ones, for each of these samples."""
    edge_pairs: int = 8
    """Pairs on which circuits of edges are run, one forward pass per size."""
    bootstrap: int = 50
    """Redrawn samples of pairs behind the intervals of stability and overlap."""
    again_pairs: int = 10
    """Pairs that are attributed again with other numbers of steps and with another metric, and on
    which single units are left out."""
    left_out: int = 100
    """Most of the circuit's units that are left out one at a time, evenly from all."""
    stable_at: float = 0.5
    """A circuit whose units' Jaccard overlap falls below this in any variation is called
    unstable."""


@dataclass(frozen=True)
class Evaluation:
    """Which methods stand beside C-ΔΘ, on how many test prompts, and what else is measured."""

    test_limit: int = 25
    """Test prompts per category, role, skill and set that every method answers (0: all)."""
    others_limit: int = 0
    """The same for methods that are not named in `measured_fully` (0: `test_limit`)."""
    measured_fully: tuple[str, ...] = ("base", "cdelta", "positive_only", "random", "random_layer")
    """Methods that answer `test_limit` prompts where `others_limit` is smaller."""
    methods: tuple[str, ...] = ("base", "cdelta", "random", "system_prompt", "as", "cast")
    """Keys of `methods.registry.METHODS`. Methods that draw nothing at random run on the first seed
    only."""
    layers: tuple[int, ...] = (3,)
    """Layers that steering at one layer chooses from; empty: a third, half and two thirds of the
    depth."""
    strengths: tuple[float, ...] = (0.0, 3.0, 6.0)
    """Strengths that steering chooses from; empty: the method's own. Weight deltas choose from
    `answers.grid`."""
    attacked: tuple[str, ...] = ("cdelta",)
    """Methods whose first seed is attacked afterwards."""
    attacks: tuple[str, ...] = ("ablated_direction",)
    """Keys of `methods.attacks.ATTACKS`."""
    trained_categories: int = 2
    """Methods that are trained beside C-ΔΘ run on the first so many categories (0: all)."""
    wrappers: tuple[str, ...] = ()
    """Texts around ``{prompt}`` for jailbreak tests of real models; the embedded set brings its own
    wrappers and paraphrases."""
    shift_prompts: int = 100
    """Benign prompts on which KL and perplexity against the base are measured."""
    judges: tuple[str, ...] = ()
    """Keys of `classifiers.CLASSIFIERS` to calibrate beside the rules: they load models of 7B
    parameters and more."""
    labels: str = ""
    """Folder of XSTest's labelled completions; empty: they are downloaded where that is
    possible."""
    rate_factors: tuple[float, ...] = (1.0,)
    """Factors on `edit.lr` from which every trained method beside C-ΔΘ chooses on validation; one
    factor: its learning rate is not tuned, and its title says so."""
    attack_rates: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01)
    """Factors on `edit.lr`, falling, from which the benign fine-tuning attack takes the first that
    does not break the base."""
    length_tokens: int = 0
    """Token limit at which the length of answers to the benign prompts is measured (0: not)."""
    data: str = ""
    """Folder of the local task files and of WikiText-2; empty: no tasks are measured."""
    harness_tasks: tuple[str, ...] = ()
    """Keys of `capability.TASKS`."""
    harness_limit: int = 100
    """Questions per task (0: all)."""
    text_windows: int = 0
    """Windows of 1,024 tokens of WikiText-2 whose perplexity is measured (0: all)."""


@dataclass(frozen=True)
class Serving:
    """Timings of notebook 08."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Requests answered together."""
    new_tokens: int = 16
    """Tokens of every answer."""
    repeats: int = 8
    """Rounds in which every method answers once."""


@dataclass(frozen=True)
class Deployment:
    """What notebooks 06 and 07 measure on the edited checkpoints."""

    limit: int = 8
    """Test prompts per category and role (a third as many per skill) on which compositions and
    quantised models are judged (0: all)."""
    quantised: int = 1
    """How many of the categories' edits, the first ones, are quantised (0: all)."""
    subsets: tuple[int, ...] = (1,)
    """Sizes of the subsets of categories whose deltas are added up, beside the whole set; empty:
    all subsets."""
    common_scales: tuple[float, ...] = (0.85, 0.7, 0.5)
    """Common scales for a sum of deltas that breaks the caps on validation at 1."""
    joint: tuple[int, ...] = ()
    """How many of the categories, the first ones, are also trained together."""
    runtimes: tuple[str, ...] = ("transformers",)
    """External runtimes that answer in a process without cdelta: `deployment.RUNTIMES`."""
    formats: tuple[str, ...] = ("bfloat16 in 4", "float16 in 4")
    """Dtypes, and numbers of files, in which a small model is saved and edited."""


@dataclass(frozen=True)
class Ablation:
    """Values that notebook 09 varies, one at a time."""

    budgets: tuple[float, ...] = (0.01,)
    """Sizes of circuits and random masks beside the preset's own, for the first category (none: no
    random masks either)."""
    smaller: tuple[float, ...] = ()
    """Sizes of circuits for all other categories."""
    updates: tuple[str, ...] = ()
    """Names of notebook 09's changes to the training."""
    rankings: tuple[str, ...] = ()
    """Other ways to rank units (`circuit.ranking`)."""
    factors: tuple[float, ...] = (0.0,)
    """Factors on k that every layer tries."""
    layer_limit: int = 20
    """Validation prompts per category, role and skill that they are tried on."""


@dataclass(frozen=True)
class Resources:
    """What the largest stage needs, for a scheduler and for the reader."""

    workers: int = 2
    """Processes that share the jobs of stages 04 and 05 on a CPU; each holds the model."""
    memory_mb: int = 3000
    """Main memory."""
    gpus: int = 0
    """GPUs of a stage."""
    gpu_memory_gb: int = 0
    """Memory of that GPU."""
    minutes: int = 30
    """Time of the longest stage."""


@dataclass(frozen=True)
class Preset:
    """One run's settings. `model` and `policy` may be empty: then a run must name them."""

    name: str = "tiny"
    """The run's name: its folder in data/runs."""
    description: str = ""
    """One line for the list of presets."""
    model: str = "organism"
    """``organism`` (the embedded model), ``smollm2`` (the one that a package ships), a checkpoint
    folder, or a hub id."""
    revision: str = ""
    """Commit of a hub model; a hub id without one is not reproducible."""
    policy: str = "synthetic"
    """``synthetic``, ``cast`` (downloaded), ``cast=PATH`` or the path of a user's file."""
    categories: tuple[str, ...] = ("crime", "hate", "health", "legal", "sexual")
    """Categories that are edited, one by one."""
    external: tuple[str, ...] = ()
    """Test sets beside the policy, ``NAME`` or ``NAME=PATH``; one that cannot be had is skipped,
    with the reason."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of everything that draws at random."""
    threads: int = 1
    """CPU threads of a stage (0: all cores, divided by --jobs). The embedded model's operations are
    so small that a second thread costs more than it brings."""
    attribution: AttributionRecipe = AttributionRecipe()
    circuit: CircuitRecipe = CircuitRecipe()
    edit: EditRecipe = EditRecipe()
    answers: AnswersRecipe = AnswersRecipe()
    organism: Organism = Organism()
    data: Data = Data()
    study: Study = Study()
    evaluation: Evaluation = Evaluation()
    deployment: Deployment = Deployment()
    serving: Serving = Serving()
    ablation: Ablation = Ablation()
    resources: Resources = Resources()

    @property
    def recipe(self) -> Recipe:
        """The method's numbers, checked."""
        return Recipe(self.attribution, self.circuit, self.edit, self.answers)


def preset_names() -> list[str]:
    """Every preset, `tiny` first."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return sorted(names, key=lambda name: not name.startswith("tiny"))


def expand(text: str) -> list[str]:
    """``a,b`` or a group's name as preset names."""
    return [name for part in text.split(",") for name in GROUPS.get(part, [part])]


@cache
def load_preset(name: str) -> Preset:
    """The preset of a file, over the one that it inherits from.

    Raises `CdeltaError` for an unknown name and a wrong field.
    """
    path = FOLDER / f"{name}.toml"
    if not re.fullmatch(r"[\w.+-]+", name) or not path.exists():
        known = ", ".join([*preset_names(), *GROUPS])
        raise CdeltaError(f"unknown preset '{name}': choose one of {known}.")
    values = read_toml(path)
    parent = values.pop("inherits", "")
    try:
        return changed(load_preset(parent) if parent else Preset(), {**values, "name": name})
    except CdeltaError as error:
        raise CdeltaError(f"preset '{name}': {error}") from error


def resolve(
    name: str,
    model: str = "",
    policy: str = "",
    overrides: Iterable[str] = (),
    external: Iterable[str] = (),
    run_name: str = "",
) -> Preset:
    """The preset `name` with the run's own model, policy, test sets and ``--set`` fields in it.

    A run that overrides fields gets a name of its own: `run_name`, or the preset's with a hash. A
    user's policy file brings its own categories. Raises `CdeltaError` for an unknown name, a wrong
    field, and a preset that lacks what the run must give.
    """
    preset = load_preset(name)
    changes = parse_overrides(overrides)
    if model:
        preset = replace(preset, model=model, revision="")
    if policy:
        preset = replace(preset, policy=policy)
        if policy.partition("=")[0] not in ("synthetic", "cast"):
            preset = replace(preset, categories=file_categories(policy))
    if not (preset.model and preset.policy):
        flag = "--policy" if preset.model else "--model"
        raise CdeltaError(f"preset '{name}' has no default for {flag}: give it.")
    if changes and not run_name:
        changed_to = json.dumps(changes, sort_keys=True).encode()
        run_name = f"{name}-{hashlib.sha256(changed_to).hexdigest()[:8]}"
    sets = {text.partition("=")[0]: text for text in (*preset.external, *external)}
    preset = replace(preset, external=tuple(sets.values()), name=run_name or name)
    return changed(preset, changes)


def file_categories(path: str) -> tuple[str, ...]:
    """The categories of a user's policy file, in its order; a file without the column holds one
    category, named as the file is."""
    from cdelta.policy.user_file import read_user_rows

    rows = read_user_rows(path, Path(path).stem)
    return tuple(dict.fromkeys(row["category"] for row in rows if row["role"] == "target"))
