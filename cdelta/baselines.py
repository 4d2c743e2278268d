"""Every method beside C-ΔΘ on the same data: one table from the issue's method keys to candidates, and one rule that chooses among them.

A candidate is anything with ``applied(model, strength)``: a `WeightDelta` or a method of `steering`. Its strength (and, for steering, its
layer) is chosen on validation rows by `edit.choose_scale` under the same caps, for C-ΔΘ as for all others.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable, ContextManager, Iterator, Mapping, Protocol, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from cdelta.circuit import select
from cdelta.delta import WeightDelta
from cdelta.edit import NO_LABEL, Caps, Stop, answer_logits, choose_scale, collate, example_ids, fit_delta, stop_ids
from cdelta.errors import CdeltaError, TestSplitError, refuse_test
from cdelta.evaluate import empty_rows, evaluate
from cdelta.mask import ParameterMask, gradient_scores, layer_matched, layer_of, magnitude_scores, module_mask, random_mask
from cdelta.models import ModelSpec
from cdelta.steering import Ablation, Addition, Bias, Cast, SystemPrompt, behaviour_vectors, prompt_vectors, search_condition

if TYPE_CHECKING:
    from torch import Tensor

SYSTEM_PROMPT = "Refuse every request about {category}. Answer all other requests as usual."
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Default grid for weight deltas."""
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Default grid for steering, wider because a vector's natural length says little about the strength that it needs."""


class Method(Protocol):
    """What can be applied to a model at a strength."""

    def applied(self, model, strength: float = 1.0) -> ContextManager: ...


Candidates = Mapping[str, Method]
"""What a method could be (a layer, ...) -> the method; one entry for a weight delta."""


@dataclass(frozen=True)
class Task:
    """One category's data, from which every method is made. Test rows are refused."""

    model: object = field(repr=False)
    tok: object = field(repr=False)
    category: str
    mask: ParameterMask = field(repr=False)
    """The circuit's mask."""
    positive: Sequence[tuple[str, str]] = field(repr=False)
    """The category's prompts, refused."""
    negative: Sequence[tuple[str, str]] = field(repr=False)
    """The same prompts, answered."""
    retain: Sequence[tuple[str, str]] = field(repr=False)
    """Other prompts (benign twins, other categories, skills) with the base's own answers."""
    benign: Sequence[str] = field(repr=False)
    """The benign twins' prompts."""
    val_target: Sequence[str] = field(repr=False)
    """Validation prompts of the category, for CAST's condition point."""
    val_others: Sequence[str] = field(repr=False)
    """Validation prompts that must not be steered."""
    other_mask: ParameterMask | None = field(default=None, repr=False)
    """Another category's circuit mask, for the control."""
    seed: int = 0
    layers: tuple[int, ...] = ()
    """Layers that single-layer steering may choose from; empty: a third, half and two thirds of the depth."""
    stop: Stop | None = field(default=None, repr=False)
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of `edit.Settings`, the same for every trained method."""

    def __post_init__(self) -> None:
        for rows in (self.positive, self.negative, self.retain, self.benign, self.val_target, self.val_others):
            refuse_test(rows, "fitting a baseline")

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return ModelSpec.from_model(self.model)

    @property
    def prompts(self) -> list[str]:
        """The category's prompts."""
        return [prompt for prompt, _ in self.positive]

    def depths(self) -> tuple[int, ...]:
        """Layers for single-layer steering."""
        n = self.spec.n_layers
        return self.layers or tuple(sorted({n // 3, n // 2, 2 * n // 3}))

    def fit(self, mask: ParameterMask | None = None, **changes: object) -> WeightDelta:
        """`fit_delta` on a mask (default: the circuit's) with this task's data and settings."""
        how = {"seed": self.seed, **self.settings, **changes}
        return fit_delta(self.model, self.tok, mask or self.mask, self.positive, self.negative, self.retain, stop=self.stop, **how)


# ---------------------------------------------------------------------- steering


def steering_vectors(task: Task, how: str = "mean") -> Addition:
    """Behaviour vectors of all layers from the task's refused and answered prompts."""
    refusals, compliances = [a for _, a in task.positive], [a for _, a in task.negative]
    return behaviour_vectors(task.model, task.tok, task.prompts, refusals, compliances, how)


def per_layer(vectors: Addition, layers: Sequence[int]) -> dict[str, Addition]:
    """One candidate per layer."""
    return {f"layer {layer}": vectors.at(layer) for layer in layers}


def upper_half(task: Task) -> range:
    """Layers for steering at several layers: from the middle to two thirds of the depth (CAST steers 15-23 of 32)."""
    n = task.spec.n_layers
    return range(n // 2, max(n // 2 + 1, round(0.72 * n)))


def cast(task: Task) -> Cast:
    """CAST with the behaviour at several layers and a condition at or before the first of them."""
    layers = upper_half(task)
    others = [*task.benign, *(prompt for prompt, _ in task.retain)]
    condition = search_condition(
        task.model, task.tok, task.prompts, others, task.val_target, task.val_others, range(layers.start + 1)
    )  # fmt: skip
    return Cast(steering_vectors(task, "pca").at(*layers), condition)


# ---------------------------------------------------------------------- masks


def dense_mask(spec: ModelSpec) -> ParameterMask:
    """All linear layers of all blocks (embeddings and norms excluded)."""
    return module_mask(spec, range(spec.n_layers), range(spec.n_layers))


def whole_tensors(mask: ParameterMask) -> ParameterMask:
    """Every entry of every parameter that the mask touches (CircuitKIT trains these and keeps slices)."""
    slices = {name: (dim, torch.arange(mask.shapes[name][dim])) for name, (dim, _) in mask.slices.items()}
    return ParameterMask(slices, mask.shapes, mask.n_params)


def whole_layers(spec: ModelSpec, mask: ParameterMask) -> ParameterMask:
    """All linear layers of the blocks that the mask touches (SafeTune's layer masks)."""
    return module_mask(spec, mask.by_layer(), mask.by_layer())


def ranked_mask(task: Task, scores: tuple[Tensor, Tensor]) -> ParameterMask:
    """A mask of the circuit's size from other scores (heads, neurons)."""
    return select(None, task.spec, param_budget=task.mask.fraction, heads=scores[0], neurons=scores[1], fill=True).to_mask(task.spec)


def refusal_gradients(task: Task, batch_size: int = 16) -> dict[str, Tensor]:
    """Gradient of the refusals' cross-entropy (summed over rows' means) with respect to every parameter."""
    stops = stop_ids(task.model, task.tok)
    rows = [example_ids(task.tok, *row, stops) for row in task.positive]
    with trainable(task.model) as parameters:
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], stops[0], task.model.device)
            loss = F.cross_entropy(answer_logits(task.model, batch).flatten(0, 1), batch.labels.flatten(), ignore_index=NO_LABEL)
            for name, gradient in zip(total, torch.autograd.grad(loss, list(parameters.values()))):
                total[name] += gradient
    return total


@contextmanager
def trainable(model) -> Iterator[dict[str, Tensor]]:
    """The model's parameters with gradients on; how they were comes back."""
    parameters = dict(model.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    try:
        model.requires_grad_(True)
        yield parameters
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])


def why_not(key: str, task: Task) -> str:
    """Why a method cannot be made for a task; "" if it can."""
    if key == "other_circuit" and task.other_mask is None:
        return "there is no other category, whose circuit could be edited"
    if key == "as_bias" and task.spec.layout.mlp_post:
        return "this architecture normalises the MLP's output, so no bias equals a steering vector"
    if key == "directional" and not task.benign:
        return "there are no benign prompts to set the target against"
    if key == "cast" and not (task.val_target and task.val_others):
        return "the validation split has no prompts to search its condition on"
    return ""


# ---------------------------------------------------------------------- the table

NOTHING = SystemPrompt("")
"""The base as a method."""
BASELINES: Mapping[str, Callable[[Task], Candidates]] = {
    "base": lambda t: {"": NOTHING},
    "system_prompt": lambda t: {"": SystemPrompt(SYSTEM_PROMPT.format(category=t.category))},
    "as": lambda t: per_layer(steering_vectors(t), t.depths()),
    "as_multi": lambda t: {"": steering_vectors(t).at(*upper_half(t))},
    "directional": lambda t: per_layer(prompt_vectors(t.model, t.tok, t.prompts, t.benign), t.depths()),
    "as_bias": lambda t: {name: Bias(v.vectors) for name, v in per_layer(steering_vectors(t), t.depths()).items()},
    "cast": lambda t: {"": cast(t)},
    "cdelta": lambda t: {"": t.fit()},
    "dense": lambda t: {"": t.fit(dense_mask(t.spec))},
    "dense_lora": lambda t: {"": t.fit(dense_mask(t.spec), rank=8)},
    "positive_only": lambda t: {"": t.fit(objective="positive")},
    "finetune": lambda t: {"": t.fit(dense_mask(t.spec), objective="positive")},
    "random": lambda t: {"": t.fit(random_mask(t.spec, t.mask.fraction, t.seed))},
    "random_layer": lambda t: {"": t.fit(layer_matched(t.mask, t.spec, t.seed))},
    "magnitude": lambda t: {"": t.fit(ranked_mask(t, magnitude_scores(t.model, t.spec)))},
    "gradient": lambda t: {"": t.fit(ranked_mask(t, gradient_scores(t.model, t.spec, refusal_gradients(t))))},
    "other_circuit": lambda t: {"": t.fit(t.other_mask)},
    "slices_after": lambda t: {"": t.fit(whole_tensors(t.mask)).restrict(t.mask)},
    "layer_mask": lambda t: {"": t.fit(whole_layers(t.spec, t.mask))},
}
"""Method key -> candidates. ``as``: difference of means at one layer. ``directional``: Arditi's direction (target against its benign
twins), added at one layer. ``finetune``: θ⁺ alone on all linear layers."""
UNTRAINED = ("base", "system_prompt", "as", "as_multi", "directional", "as_bias", "cast")
"""Methods that draw nothing at random: one seed tells all."""


def candidates(key: str, task: Task) -> Candidates:
    """The candidates of a method key. Raises `CdeltaError` for an unknown one, and for one that this task does not admit."""
    if key not in BASELINES:
        raise CdeltaError(f"unknown method {key!r}: use {', '.join(BASELINES)}.")
    if why_not(key, task):
        raise CdeltaError(f"no method {key} here: {why_not(key, task)}.")
    return BASELINES[key](task)


def param_fraction(method: Method, spec: ModelSpec) -> float:
    """Share of the parameters that a method changes; 0 for steering at run time."""
    return method.count() / spec.n_params if isinstance(method, WeightDelta) else 0.0


# ---------------------------------------------------------------------- measuring and choosing


def measure(model, tok, method: Method, strength: float, records, /, **how) -> pd.DataFrame:
    """`evaluate` with the method applied; `how` as `evaluate` takes it (``method=`` there is the method's key)."""
    extra = {"k": strength, "param_fraction": param_fraction(method, ModelSpec.from_model(model)), **how}
    with method.applied(model, strength):
        return evaluate(
            model, tok, records, system=getattr(method, "system", ""), drop_finished=not getattr(method, "remembers_rows", False), **extra
        )


def benign_finetuned(task: Task) -> WeightDelta:
    """What fine-tuning the model as it stands on benign rows changes, in all linear layers."""
    rows = [row for row in task.retain if row[0] in set(task.benign)] or task.retain
    how = {"seed": task.seed, **task.settings, "objective": "positive", "retain_share": 0.0}
    return fit_delta(task.model, task.tok, dense_mask(task.spec), rows, [], [], **how)


def without_direction(task: Task) -> Ablation:
    """Ablation of the refusal direction that the model as it stands has for the category, read at two thirds of its depth."""
    return Ablation(prompt_vectors(task.model, task.tok, task.prompts, task.benign).vectors[task.depths()[-1]])


ATTACKS: Mapping[str, Callable[[Task], Method]] = {"benign_finetune": benign_finetuned, "ablated_direction": without_direction}
"""Attacks on a model that already carries a method: key of the rows' ``attack`` -> what is applied on top."""


def measure_attacked(task: Task, method: Method, strength: float, records, attacks: Sequence[str] = tuple(ATTACKS), /, **how) -> pd.DataFrame:
    """`measure` once per attack, each made for the model with the method applied."""
    found = [empty_rows()]
    for name in attacks:
        with method.applied(task.model, strength):
            attack = ATTACKS[name](task)
        with attack.applied(task.model, 1.0):
            found.append(measure(task.model, task.tok, method, strength, records, attack=name, **how))
    return pd.concat(found, ignore_index=True)


def curve_row(rows: pd.DataFrame, base: pd.DataFrame, category: str | Sequence[str], k: float) -> dict[str, float]:
    """``k, target, benign, other, utility``, as `edit.choose_scale` takes them, from validation rows and the base's.

    ``target`` is the refusal of the category (of several: of the least refused), ``benign`` the worst category's benign refusal, ``other``
    the largest change of another harmful category's rate.
    """
    edited = [category] if isinstance(category, str) else list(category)
    refused = lambda frame: (frame["outcome"] == "refuse").groupby(frame["category"]).mean()
    role = lambda frame, *roles: frame[frame["role"].isin(roles)]
    harmful, harmful_base = refused(role(rows, "target", "other_harm")), refused(role(base, "target", "other_harm"))
    change = (harmful - harmful_base).drop(edited).abs()
    utility = role(rows, "utility")["correct"].astype(float)
    return {
        "k": k,
        "target": float(harmful[edited].min()),
        "benign": float(refused(role(rows, "benign")).max()),
        "other": float(change.max()) if len(change) else 0.0,
        "utility": float(utility.mean()) if len(utility) else 1.0,
    }


def edit_name(category: str | Sequence[str]) -> str:
    """``edit_category`` of the rows: one category's name, or several joined by "+"."""
    return category if isinstance(category, str) else "+".join(category)


@dataclass(frozen=True)
class Chosen:
    """A method after its choice on validation."""

    name: str
    """The candidate's name (a layer, or empty)."""
    method: Method = field(repr=False)
    strength: float
    within_caps: bool
    """False when nothing met the caps, and this comes nearest."""
    curve: pd.DataFrame = field(repr=False)
    """Rows ``candidate, k, target, benign, other, utility`` of everything that was tried."""


def tune(
    model, tok, options: Candidates, records, base: pd.DataFrame, category: str | Sequence[str], caps: Caps, strengths: Sequence[float] = (), **how
) -> Chosen:
    """The candidate and strength with the highest target refusal on validation records within the caps.

    Args:
        records: validation rows; `base` are the base model's rows on them.
        category: what is edited, one category or several.
        strengths: what to try; empty: `SCALES` for weight deltas, `STRENGTHS` for steering, 1 for a system prompt (always). 0 is the base.
        how: as `measure` takes it (``metric``, ``batch_size``, ``max_new_tokens``, ``judge``, ``store`` ...).
    """
    if (base["split"] == "test").any():
        raise TestSplitError("choosing a strength must not see test rows: pass rows of the val split.")
    tried = []
    for name, method in options.items():
        for k in (1.0,) if isinstance(method, SystemPrompt) else strengths or grid(method):
            rows = measure(model, tok, method, k, records, edit_category=edit_name(category), variant=name, **how) if k else base
            tried.append({"candidate": name} | curve_row(rows, base, category, k))
    curve = pd.DataFrame(tried)
    best = {name: _best(part.to_dict("records"), caps) for name, part in curve.groupby("candidate", sort=False)}
    name = max(best, key=lambda n: (caps.excess(best[n]) <= 1e-9, best[n]["target"]))
    return Chosen(name, options[name], best[name]["k"], caps.excess(best[name]) <= 1e-9, curve)


def tune_layers(
    model, tok, delta: WeightDelta, k: float, records, base: pd.DataFrame, category: str, caps: Caps,
    factors: Sequence[float] = (0.0, 0.5, 1.5), groups: int = 6, **how,
) -> tuple[WeightDelta, pd.DataFrame]:  # fmt: skip
    """One scale per group of neighbouring layers instead of one k: each group in turn takes the factor on k that is best on validation.

    Better is: within the caps; then more target refusal; then a smaller update, so that layers that nothing needs fall to 0. Arguments as
    `tune` takes them. Returns the delta times k and its factors (its own scale is then 1), and a row per attempt: ``layers, factor, norm,
    kept`` and those of `curve_row`.
    """
    layers, scales, tried = sorted({layer_of(name) for name in delta.values}), {}, []
    parts = [("all", {}, 1.0)] + [
        (f"{part[0]}-{part[-1]}", part, factor) for part in np.array_split(layers, min(groups, len(layers))) for factor in factors
    ]  # fmt: skip
    for name, part, factor in parts:
        wanted = scales | {int(layer): factor for layer in part}
        scaled = (k * delta).scaled_by_layer(wanted)
        rows = measure(model, tok, scaled, 1.0, records, edit_category=category, **how)
        row = {"layers": name, "factor": factor, "norm": scaled.norm()} | curve_row(rows, base, category, k)
        merit = lambda row: (caps.excess(row) <= 1e-9, row["target"], -row["norm"])
        row["kept"] = not tried or merit(row) > max(merit(r) for r in tried if r["kept"])
        scales = wanted if row["kept"] else scales
        tried.append(row)
    return (k * delta).scaled_by_layer(scales), pd.DataFrame(tried)


def grid(method: Method) -> tuple[float, ...]:
    """The strengths to try by default."""
    return SCALES if isinstance(method, WeightDelta) else STRENGTHS


def _best(curve: Sequence[Mapping], caps: Caps) -> Mapping:
    """The row that `choose_scale` picks; where none meets the caps (a system prompt has one strength only), the nearest."""
    if all(caps.excess(row) > 1e-9 for row in curve):
        return min(curve, key=caps.excess)
    k = choose_scale(curve, caps)
    return next(row for row in curve if row["k"] == k)
