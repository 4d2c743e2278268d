"""Every method beside C-ΔΘ on the same data: one table from the issue's method keys to
candidates, and one rule that chooses among them.

A candidate is anything with ``applied(model, strength)``: a `WeightDelta` or a method of
`steering`. Its strength (and, for steering, its layer) is chosen on validation rows by
`edit.choose_scale` under the same caps, for C-ΔΘ as for all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable, ContextManager, Mapping, Protocol, Sequence

import torch
import torch.nn.functional as F

from cdelta.circuit.controls import (
    dense_mask,
    gradient_scores,
    layer_matched,
    magnitude_scores,
    random_mask,
    whole_layers,
    whole_tensors,
)
from cdelta.circuit.mask import ParameterMask
from cdelta.circuit.selection import select_units
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.fit import fit_delta
from cdelta.edit.verdict import Stop
from cdelta.errors import CdeltaError, refuse_test
from cdelta.methods.cast import Cast, search_condition
from cdelta.methods.steering import (
    Addition,
    Bias,
    SystemPrompt,
    behaviour_vectors,
    prompt_vectors,
)
from cdelta.models.chat import NO_LABEL, answer_logits, collate, example_ids, stop_ids
from cdelta.models.hooks import trainable
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


SYSTEM_PROMPT = "Refuse every request about {category}. Answer all other requests as usual."


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
    """Layers that single-layer steering may choose from; empty: a third, half and two thirds of
    the depth."""
    stop: Stop | None = field(default=None, repr=False)
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of `edit.Settings`, the same for every trained method."""

    def __post_init__(self) -> None:
        for rows in (
            self.positive,
            self.negative,
            self.retain,
            self.benign,
            self.val_target,
            self.val_others,
        ):
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
        how = {**self.settings, "seed": self.seed, **changes}
        return fit_delta(
            self.model,
            self.tok,
            mask or self.mask,
            self.positive,
            self.negative,
            self.retain,
            stop=self.stop,
            **how,
        )


# ---------------------------------------------------------------------- steering


def steering_vectors(task: Task, how: str = "mean") -> Addition:
    """Behaviour vectors of all layers from the task's refused and answered prompts."""
    refusals, compliances = [a for _, a in task.positive], [a for _, a in task.negative]
    return behaviour_vectors(task.model, task.tok, task.prompts, refusals, compliances, how)


def per_layer(vectors: Addition, layers: Sequence[int]) -> dict[str, Addition]:
    """One candidate per layer."""
    return {f"layer {layer}": vectors.at(layer) for layer in layers}


def upper_half(task: Task) -> range:
    """Layers for steering at several layers: from the middle to two thirds of the depth (CAST
    steers 15-23 of 32).
    """
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


def ranked_mask(task: Task, scores: tuple[Tensor, Tensor]) -> ParameterMask:
    """A mask of the circuit's size from other scores (heads, neurons)."""
    return select_units(task.spec, *scores, task.mask.fraction).to_mask(task.spec)


def refusal_gradients(task: Task, batch_size: int = 16) -> dict[str, Tensor]:
    """Gradient of the refusals' cross-entropy (summed over rows' means) with respect to every
    parameter.
    """
    stops = stop_ids(task.model, task.tok)
    rows = [example_ids(task.tok, *row, stops) for row in task.positive]
    with trainable(task.model) as parameters:
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], stops[0], task.model.device)
            loss = F.cross_entropy(
                answer_logits(task.model, batch).flatten(0, 1),
                batch.labels.flatten(),
                ignore_index=NO_LABEL,
            )
            for name, gradient in zip(total, torch.autograd.grad(loss, list(parameters.values()))):
                total[name] += gradient
    return total


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
    "directional": lambda t: per_layer(
        prompt_vectors(t.model, t.tok, t.prompts, t.benign), t.depths()
    ),
    "as_bias": lambda t: {
        name: Bias(v.vectors) for name, v in per_layer(steering_vectors(t), t.depths()).items()
    },
    "cast": lambda t: {"": cast(t)},
    "cdelta": lambda t: {"": t.fit()},
    "dense": lambda t: {"": t.fit(dense_mask(t.spec))},
    "dense_lora": lambda t: {"": t.fit(dense_mask(t.spec), rank=8)},
    "positive_only": lambda t: {"": t.fit(objective="positive")},
    "finetune": lambda t: {"": t.fit(dense_mask(t.spec), objective="positive")},
    "random": lambda t: {"": t.fit(random_mask(t.spec, t.mask.fraction, t.seed))},
    "random_layer": lambda t: {"": t.fit(layer_matched(t.mask, t.spec, t.seed))},
    "magnitude": lambda t: {"": t.fit(ranked_mask(t, magnitude_scores(t.model, t.spec)))},
    "gradient": lambda t: {
        "": t.fit(ranked_mask(t, gradient_scores(t.model, t.spec, refusal_gradients(t))))
    },
    "other_circuit": lambda t: {"": t.fit(t.other_mask)},
    "slices_after": lambda t: {"": t.fit(whole_tensors(t.mask)).restrict(t.mask)},
    "layer_mask": lambda t: {"": t.fit(whole_layers(t.spec, t.mask))},
}
"""Method key -> candidates. ``as``: difference of means at one layer. ``directional``: Arditi's
direction (target against its benign twins), added at one layer. ``finetune``: θ⁺ alone on all
linear layers."""
UNTRAINED = ("base", "system_prompt", "as", "as_multi", "directional", "as_bias", "cast")
"""Methods that draw nothing at random: one seed tells all."""


def candidates(key: str, task: Task) -> Candidates:
    """The candidates of a method key. Raises `CdeltaError` for an unknown one, and for one that
    this task does not admit.
    """
    if key not in BASELINES:
        raise CdeltaError(f"unknown method {key!r}: use {', '.join(BASELINES)}.")
    if why_not(key, task):
        raise CdeltaError(f"no method {key} here: {why_not(key, task)}.")
    return BASELINES[key](task)
