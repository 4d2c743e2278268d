"""Presets: model, data and budgets of one run, as frozen dataclasses. Unknown names, keys and types are errors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Mapping, TypeVar

from cdelta.errors import CdeltaError

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Organism:
    """Training of the embedded model, when notebook 00 retrains it."""

    steps: int = 1600
    batch_size: int = 96


@dataclass(frozen=True)
class Data:
    """How much of the policy set is used; 0 means all of it."""

    max_pairs: int = 64
    """Prompt pairs per category for attribution."""
    validation_limit: int = 40
    """Prompts per category, role and skill of the validation split that the stop rule and the choice of k see."""


@dataclass(frozen=True)
class Attribution:
    """Arguments of `cdelta.attribution.attribute`."""

    method: str = "eap-ig"
    steps: int = 5
    rule: str = "midpoint"
    micro_batch: int = 8
    convergence: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers of steps that notebook 02 compares."""
    exact_pairs: int = 4
    """Pairs that notebook 02 patches edge by edge, the slow oracle; 0 leaves it out."""


@dataclass(frozen=True)
class Circuit:
    """Selection of the circuit."""

    param_budget: float = 0.05
    """Largest share of all the model's parameters that the mask may own (the paper: < 5 %)."""
    selective: str = ""
    """How a category's scores are set against the other categories' (`circuit.selective_scores`: difference, ratio, orthogonalised); "" ranks the plain scores."""
    pairs: int = 30
    """Held-out pairs per category (val split) that circuits are run on; 0: all."""
    fractions: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Sizes of the circuits of a faithfulness curve (MIB's), shares of all units' parameters, or of all edges."""
    seeds: int = 3
    """Samples of pairs, each with a circuit of its own, that meet the controls ..."""
    draws: int = 2
    """... and random masks (and layer-matched ones) for each of them."""
    edge_pairs: int = 8
    """Pairs on which circuits of edges are run, one forward pass per size."""
    bootstrap: int = 50
    """Redrawn samples of pairs behind the intervals of stability and overlap."""
    again_pairs: int = 10
    """Pairs that are attributed again with other numbers of steps and with another metric; also those on which single units are left out ..."""
    left_out: int = 100
    """... and at most so many of the circuit's units, evenly from all."""
    stable_at: float = 0.5
    """A circuit whose units' Jaccard overlap falls below this in any variation is called unstable."""


@dataclass(frozen=True)
class Edit:
    """Fitting of the weight delta; `scales` are the candidates for k, tried on the validation split."""

    max_steps: int = 90
    check_every: int = 30
    lr: float = 7e-4
    batch_size: int = 48
    objective: str = "contrastive"
    retain_share: float = 0.65
    """Share of retain rows in every batch."""
    refuse_at: float = 0.95
    """A side is selective when it refuses (or answers) this share of the target on validation ..."""
    tolerance: float = 0.05
    """... and no other group's rate is further than this from the base's."""
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25)


@dataclass(frozen=True)
class Evaluation:
    """Greedy generation and scoring; `limit` is the number of prompts per category, role and set (0: all)."""

    max_new_tokens: int = 20
    batch_size: int = 128
    limit: int = 0


@dataclass(frozen=True)
class Ablation:
    """Values that notebook 07 varies, one at a time."""

    budgets: tuple[float, ...] = (0.01, 0.05)
    scales: tuple[float, ...] = (0.5, 0.7, 0.9)
    selective: tuple[str, ...] = ("difference",)


@dataclass(frozen=True)
class Preset:
    """One run's settings. `model` and `policy` may be empty: then a run must name them (``--model``, ``--policy``)."""

    name: str
    description: str
    model: str = "organism"
    """``organism`` (the embedded model), a checkpoint folder, or a hub id."""
    revision: str = ""
    """Commit of a hub model; a hub id without one is not reproducible."""
    policy: str = "synthetic"
    """``synthetic``, ``cast=PATH`` or the path of a user's file."""
    categories: tuple[str, ...] = ("crime", "hate", "health", "legal", "sexual")
    threads: int = 1
    """CPU threads of a stage (0: all cores, divided by --jobs). The embedded model's operations are so small that a second
    thread costs more than it brings, and on busy cores over ten times as much."""
    seeds: tuple[int, ...] = (0,)
    organism: Organism = field(default_factory=Organism)
    data: Data = field(default_factory=Data)
    attribution: Attribution = field(default_factory=Attribution)
    circuit: Circuit = field(default_factory=Circuit)
    edit: Edit = field(default_factory=Edit)
    evaluation: Evaluation = field(default_factory=Evaluation)
    ablation: Ablation = field(default_factory=Ablation)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """A copy with `changes` in it, nested as the sections are; raises `CdeltaError` on an unknown key or a wrong type."""
    known = {f.name: getattr(settings, f.name) for f in fields(settings)}
    for key in changes:
        if key not in known:
            raise CdeltaError(f"unknown setting '{key}' of {type(settings).__name__}: known are {', '.join(known)}.")
    return replace(settings, **{key: _converted(key, known[key], value) for key, value in changes.items()})


def _converted(key: str, old: Any, new: Any) -> Any:
    """`new` as a value of `old`'s type: sections merge, lists become tuples, an int may stand for a float."""
    if is_dataclass(old) and isinstance(new, Mapping):
        return changed(old, new)
    if isinstance(old, tuple) and isinstance(new, (list, tuple)):
        return tuple(_converted(key, old[0], item) for item in new) if old else tuple(new)
    if isinstance(old, float) and type(new) is int:
        return float(new)
    if type(new) is not type(old):
        raise CdeltaError(f"setting '{key}' is {new!r}: it must be of type {type(old).__name__}.")
    return new


TINY = Preset("tiny", "the embedded model, all five categories (default)")

_BRIEF = {
    "organism": {"steps": 30, "batch_size": 16},
    "data": {"max_pairs": 8, "validation_limit": 3},
    "attribution": {"steps": 2, "convergence": [1, 2], "exact_pairs": 1},
    "circuit": {"pairs": 3, "fractions": [0.05, 0.5, 1.0], "seeds": 1, "draws": 1, "edge_pairs": 1, "bootstrap": 3, "again_pairs": 2, "left_out": 10},
    "edit": {"max_steps": 4, "check_every": 2, "batch_size": 8, "scales": [0.0, 1.0]},
    "evaluation": {"max_new_tokens": 12, "limit": 3},
    "ablation": {"budgets": [0.05], "scales": [1.0], "selective": ["difference"]},
}

PRESETS = {
    preset.name: preset
    for preset in (
        TINY,
        changed(TINY, {
            "name": "smoke", "description": "every cell in minutes, for tests: too little of everything to conclude from",
            "categories": ["crime", "hate"], "seeds": [0], **_BRIEF,
        }),
        changed(TINY, {
            "name": "smoke-cast", "description": "like smoke, on CAST's prompts: needs --model DIR --policy cast=PATH",
            "model": "", "policy": "", "seeds": [0], **_BRIEF,
        }),
        changed(TINY, {
            "name": "llama-3.1-8b", "description": "Llama-3.1-8B-Instruct on CAST's prompts: needs --policy cast=PATH and a GPU",
            "threads": 0, "model": "meta-llama/Llama-3.1-8B-Instruct", "revision": "0e9e39f249a16976918f6564b8830bc894c89659", "policy": "",
            "data": {"max_pairs": 256},
            "circuit": {"pairs": 16, "edge_pairs": 2, "bootstrap": 5},
            "edit": {"lr": 1e-5, "batch_size": 8},
            "evaluation": {"max_new_tokens": 64, "batch_size": 32},
        }),
    )
}


def resolve(name: str, model: str = "", policy: str = "") -> Preset:
    """The preset `name` with the run's own model and policy in it.

    Raises `CdeltaError` for an unknown name and for a preset that lacks what the run must give.
    """
    if name not in PRESETS:
        raise CdeltaError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    if model:
        preset = replace(preset, model=model, revision="")
    if policy:
        preset = replace(preset, policy=policy)
    missing = [flag for flag, value in (("--model", preset.model), ("--policy", preset.policy)) if not value]
    if missing:
        raise CdeltaError(f"preset '{name}' has no default for {' and '.join(missing)}: give {'them' if missing[1:] else 'it'}.")
    return preset


def as_dict(preset: Preset) -> dict[str, Any]:
    """Plain values, for JSON."""
    return asdict(preset)
