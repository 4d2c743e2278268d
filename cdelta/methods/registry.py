"""Every method beside C-ΔΘ on the same data: what it is made from (`Task`), and how.

What tables and figures call a method, and what it needs, is in ``registry.toml``. A new baseline is
one more `Method`: ``make`` turns a `Task` into candidates, of which one (a layer, a learning rate)
and its strength are chosen on validation by the rule that chooses C-ΔΘ's k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cdelta.circuit.circuit import ParameterMask
from cdelta.circuit.controls import (
    dense_mask,
    gradient_scores,
    layer_matched,
    loss_gradients,
    magnitude_scores,
    random_mask,
    whole_layers,
    whole_tensors,
)
from cdelta.circuit.selection import UnitScores, select_units
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.fit import train
from cdelta.edit.recipe import Recipe
from cdelta.edit.rows import Rows, TrainingRows
from cdelta.edit.training import Stop
from cdelta.errors import CdeltaError, refuse_test
from cdelta.files import read_toml
from cdelta.methods.cast import Cast, search_condition
from cdelta.methods.steering import Addition, Bias, SystemPrompt, behaviour_vectors, prompt_vectors
from cdelta.methods.tuning import Candidates, Edited
from cdelta.models.chat import (
    NO_LABEL,
    Batch,
    answer_logits,
    collate,
    example_ids,
    pad_id,
    stop_ids,
)
from cdelta.models.spec import ModelSpec

REFERENCE = "reference"
"""Family of the base and of C-ΔΘ."""
SYSTEM_PROMPT = "Refuse every request about {category}. Answer all other requests as usual."

Make = Callable[["Task"], Candidates]


@dataclass(frozen=True, repr=False)
class Task:
    """A model, and what a method may see to make it refuse a category: the same for all methods.
    Test rows are refused.
    """

    model: PreTrainedModel
    tok: PreTrainedTokenizerBase
    category: str
    mask: ParameterMask
    """The circuit's mask."""
    rows: TrainingRows
    benign: Sequence[str]
    """Prompts of the benign counterparts."""
    recipe: Recipe = Recipe()
    """Its edit section, with this task's seed, trains every method."""
    val_target: Sequence[str] = ()
    """Validation prompts of the category, for CAST's condition point."""
    val_others: Sequence[str] = ()
    """Validation prompts that must not be steered."""
    other_mask: ParameterMask | None = None
    """Another category's circuit mask, for the control."""
    layers: tuple[int, ...] = ()
    """Layers that single-layer steering may choose from; empty: a third, half and two thirds of the
    depth."""
    rates: tuple[float, ...] = (1.0,)
    """Factors on the recipe's learning rate from which a trained method's is chosen; with one
    factor it is not tuned."""
    stop: Stop | None = None
    folder: Path | None = None
    """Where trained deltas and training states are kept, so that a killed job goes on."""

    def __post_init__(self) -> None:
        for part in (*vars(self.rows).values(), self.benign, self.val_target, self.val_others):
            refuse_test(part, "fitting a baseline")

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return ModelSpec.from_model(self.model)

    @property
    def takes_bias(self) -> bool:
        """The MLP's output goes into the residual stream as it is."""
        return not self.spec.layout.mlp_post

    @property
    def seed(self) -> int:
        """Seed of everything that is drawn at random."""
        return self.recipe.edit.seed

    @property
    def prompts(self) -> list[str]:
        """The category's prompts."""
        return [prompt for prompt, _ in self.rows.positive]

    def depths(self) -> tuple[int, ...]:
        """Layers for steering at one layer."""
        n = self.spec.n_layers
        return self.layers or tuple(sorted({n // 3, n // 2, 2 * n // 3}))

    def upper_half(self) -> range:
        """Layers for steering at several: from the middle to 72 % of the depth (CAST steers 15-23
        of 32).
        """
        n = self.spec.n_layers
        return range(n // 2, max(n // 2 + 1, round(0.72 * n)))

    def behaviour(self, principal: bool = False) -> Addition:
        """Vectors of all layers from the task's refused and answered prompts."""
        answers = replies(self.rows.positive), replies(self.rows.negative)
        return behaviour_vectors(self.model, self.tok, self.prompts, *answers, principal)

    def directions(self) -> Addition:
        """Arditi's directions of all layers, from benign counterparts to the target."""
        return prompt_vectors(self.model, self.tok, self.prompts, self.benign)

    def fit(
        self,
        mask: ParameterMask,
        rate: float = 1.0,
        rows: TrainingRows | None = None,
        **changes,
    ) -> Edited:
        """An update trained on a mask by the recipe, with its learning rate times `rate` and other
        fields of `EditRecipe` changed; on other rows, without stop rule, where `rows` are given.
        """
        how = replace(self.recipe.edit, lr=rate * self.recipe.edit.lr, **changes)
        if rows:
            return Edited(train(self.model, self.tok, mask, rows, how).delta)
        state = self.folder / f"training-{rate:g}" if self.folder else None
        known = (self.model, self.tok, mask, self.rows, how)
        return Edited(train(*known, stop=self.stop, checkpoint=state).delta)


def replies(rows: Rows) -> list[str | Sequence[int]]:
    """What the prompts are answered: texts, or the ids that the model wrote."""
    return [reply if isinstance(reply, str) else reply.ids for _, reply in rows]


# ---------------------------------------------------------------------- making


def trained(
    task: Task, mask: ParameterMask, cut: ParameterMask | None = None, **changes
) -> Candidates:
    """One update on a mask per learning rate, by the recipe with some of its fields changed; each
    kept in the task's folder as soon as it is trained.

    Args:
        cut: only these entries of the trained update remain.
    """
    found = {}
    for rate in task.rates:
        name = f"lr {rate * task.recipe.edit.lr:g}" if len(task.rates) > 1 else ""
        kept = task.folder / f"delta-{rate:g}" if task.folder else None
        if kept and kept.exists():
            found[name] = Edited(WeightDelta.load(kept))
            continue
        delta = task.fit(mask, rate, **changes).delta
        found[name] = Edited(delta.restrict(cut) if cut else delta)
        if kept:
            found[name].delta.save(kept)
    return found


def ranked_mask(task: Task, scores: UnitScores) -> ParameterMask:
    """A mask of the circuit's size from other scores."""
    return select_units(task.spec, *scores, task.mask.fraction).to_mask(task.spec)


def refusal_gradients(task: Task, batch_size: int = 16) -> dict[str, Tensor]:
    """Gradient of the refusals' cross-entropy (summed over batches' means) with respect to every
    parameter.
    """
    model, tok = task.model, task.tok
    stops, pad = stop_ids(model, tok), pad_id(model, tok)
    answered = zip(task.prompts, replies(task.rows.positive))
    rows = [example_ids(tok, prompt, reply, stops) for prompt, reply in answered]
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return loss_gradients(
        model, (answer_loss(model, collate(part, pad, model.device)) for part in parts)
    )


def answer_loss(model, batch: Batch) -> Tensor:
    """Cross-entropy of the answers, mean over all tokens."""
    logits, labels = answer_logits(model, batch), batch.labels
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)


def other_circuit(task: Task) -> Candidates:
    """C-ΔΘ on another category's circuit."""
    assert task.other_mask is not None  # the method needs it
    return trained(task, task.other_mask)


def per_layer(task: Task, vectors: Addition) -> dict[str, Addition]:
    """One candidate per layer."""
    return {f"layer {layer}": vectors.at(layer) for layer in task.depths()}


def as_bias(task: Task) -> Candidates:
    """Activation steering at one layer, in the weights."""
    return {name: Bias(one.vectors) for name, one in per_layer(task, task.behaviour()).items()}


def cast(task: Task) -> Candidates:
    """CAST with the behaviour at several layers and a condition at or before the first of them."""
    layers = task.upper_half()
    others = [*task.benign, *(prompt for prompt, _ in task.rows.retain)]
    groups = (task.prompts, others, task.val_target, task.val_others)
    condition = search_condition(task.model, task.tok, *groups, range(layers.start + 1))
    return {"": Cast(task.behaviour(principal=True).at(*layers), condition)}


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """One way to make a model refuse a category; the fields are explained in ``registry.toml``."""

    key: str
    """Its name in rows, presets and files."""
    title: str
    family: str
    colour: str
    trained: bool
    make: Make
    needs: Sequence[str] = ()
    lacks: str = ""
    note: str = ""

    def why_not(self, task: Task) -> str:
        """Why it cannot be made for a task; "" if it can."""
        return "" if all(getattr(task, need) for need in self.needs) else self.lacks

    def candidates(self, task: Task) -> Candidates:
        """What it could be. Raises `CdeltaError` where the task does not admit it."""
        if reason := self.why_not(task):
            raise CdeltaError(f"no method {self.key} here: {reason}.")
        return self.make(task)


MAKE: Mapping[str, Make] = {
    "base": lambda task: {"": SystemPrompt("")},
    "cdelta": lambda task: trained(task, task.mask),
    "positive_only": lambda task: trained(task, task.mask, objective="positive"),
    "dense": lambda task: trained(task, dense_mask(task.spec)),
    "dense_lora": lambda task: trained(task, dense_mask(task.spec), rank=8),
    "finetune": lambda task: trained(task, dense_mask(task.spec), objective="positive"),
    "slices_after": lambda task: trained(task, whole_tensors(task.mask), cut=task.mask),
    "layer_mask": lambda task: trained(task, whole_layers(task.spec, task.mask)),
    "random": lambda task: trained(task, random_mask(task.spec, task.mask.fraction, task.seed)),
    "random_layer": lambda task: trained(task, layer_matched(task.mask, task.spec, task.seed)),
    "magnitude": lambda task: trained(
        task, ranked_mask(task, magnitude_scores(task.model, task.spec))
    ),
    "gradient": lambda task: trained(
        task,
        ranked_mask(task, gradient_scores(task.model, task.spec, refusal_gradients(task))),
    ),
    "other_circuit": other_circuit,
    "system_prompt": lambda task: {"": SystemPrompt(SYSTEM_PROMPT.format(category=task.category))},
    "as": lambda task: per_layer(task, task.behaviour()),
    "as_multi": lambda task: {"": task.behaviour().at(*task.upper_half())},
    "as_bias": as_bias,
    "directional": lambda task: per_layer(task, task.directions()),
    "cast": cast,
}
METHODS: Mapping[str, Method] = {
    key: Method(key, make=MAKE[key], **facts)
    for key, facts in read_toml(Path(__file__).with_suffix(".toml")).items()
}
"""Method key -> the method, in the order of tables and figures."""


def method_of(key: str) -> Method:
    """A method by its key. Raises `CdeltaError` for an unknown one."""
    if key not in METHODS:
        raise CdeltaError(f"unknown method {key}: use {', '.join(METHODS)}.")
    return METHODS[key]


def title_of(key: str, tuned: bool) -> str:
    """A method's title, which says so where its learning rate is C-ΔΘ's and was not tuned for it.

    Args:
        tuned: several learning rates were tried for every trained method.
    """
    method = METHODS[key]
    as_it_is = tuned or not method.trained or method.family == REFERENCE
    return method.title if as_it_is else f"{method.title} (not tuned)"
