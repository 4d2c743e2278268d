"""Every method beside C-ΔΘ on the same data: one entry each, with what tables and figures call it,
how it is made, and what it needs.

A new baseline is one more `Method`: ``make`` turns a `Task` into candidates, of which one (a layer,
a learning rate) and its strength are chosen on validation by the rule that chooses C-ΔΘ's k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cdelta.circuit.controls import whole_tensors
from cdelta.circuit.mask import ParameterMask
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError
from cdelta.methods import masks
from cdelta.methods.base import Candidates, Edited
from cdelta.methods.cast import Cast, search_condition
from cdelta.methods.steering import Addition, Bias, SystemPrompt, behaviour_vectors, prompt_vectors
from cdelta.methods.task import Task

SYSTEM_PROMPT = "Refuse every request about {category}. Answer all other requests as usual."
REFERENCE, UPDATES, MASKS, STEERING = "reference", "other updates", "other masks", "at run time"

Make = Callable[[Task], Candidates]
Need = Callable[[Task], str]
"""Why a task does not admit a method; "" if it does."""


@dataclass(frozen=True)
class Method:
    """One way to make a model refuse a category."""

    key: str
    """Its name in rows, presets and files."""
    title: str
    """Its name for readers."""
    family: str
    """What it varies: the update, the mask, or nothing but the run."""
    colour: str
    """Its colour in every figure."""
    trained: bool
    """It trains, so that it has a learning rate and draws at random: every seed has its own."""
    make: Make
    needs: Need | None = None
    note: str = ""
    """What it is, in half a sentence."""

    def why_not(self, task: Task) -> str:
        """Why it cannot be made for a task; "" if it can."""
        return self.needs(task) if self.needs else ""

    def candidates(self, task: Task) -> Candidates:
        """What it could be. Raises `CdeltaError` where the task does not admit it."""
        if reason := self.why_not(task):
            raise CdeltaError(f"no method {self.key} here: {reason}.")
        return self.make(task)


# ---------------------------------------------------------------------- making


def trained(mask_of: Callable[[Task], ParameterMask], **changes: object) -> Make:
    """One candidate per learning rate: an update on a mask by the recipe, some of its fields
    changed.
    """

    def make(task: Task) -> Candidates:
        mask = mask_of(task)
        return per_rate(task, lambda rate: task.fit(mask, rate, **changes))

    return make


def per_rate(task: Task, fit: Callable[[float], Edited]) -> Candidates:
    """One update per learning rate, each kept in the task's folder as soon as it is trained."""
    found = {}
    for rate in task.rates:
        name = f"lr {rate * task.recipe.edit.lr:g}" if len(task.rates) > 1 else ""
        kept = task.folder / f"delta-{rate:g}" if task.folder else None
        if kept and kept.exists():
            found[name] = Edited(WeightDelta.load(kept))
            continue
        found[name] = fit(rate)
        if kept:
            found[name].delta.save(kept)
    return found


def slices_after(task: Task) -> Candidates:
    """Whole tensors trained, and only the circuit's entries kept (CircuitKIT)."""
    mask = whole_tensors(task.mask)
    return per_rate(task, lambda rate: Edited(task.fit(mask, rate).delta.restrict(task.mask)))


def per_layer(vectors: Addition, layers: Sequence[int]) -> dict[str, Addition]:
    """One candidate per layer."""
    return {f"layer {layer}": vectors.at(layer) for layer in layers}


def steering_vectors(task: Task, principal: bool = False) -> Addition:
    """Behaviour vectors of all layers from the task's refused and answered prompts."""
    return behaviour_vectors(
        task.model, task.tok, task.prompts, task.refusals, task.compliances, principal
    )


def nothing(task: Task) -> Candidates:
    """The base, as the method that does nothing."""
    return {"": SystemPrompt("")}


def system_prompt(task: Task) -> Candidates:
    """An instruction before every prompt."""
    return {"": SystemPrompt(SYSTEM_PROMPT.format(category=task.category))}


def steered(task: Task) -> Candidates:
    """Activation steering at one layer."""
    return per_layer(steering_vectors(task), task.depths())


def steered_at_several(task: Task) -> Candidates:
    """Activation steering at several layers."""
    return {"": steering_vectors(task).at(*task.upper_half())}


def as_bias(task: Task) -> Candidates:
    """Activation steering at one layer as a bias of the weights."""
    return {name: Bias(one.vectors) for name, one in steered(task).items()}


def directional(task: Task) -> Candidates:
    """Arditi's direction, from benign counterparts to the target, added at one layer."""
    vectors = prompt_vectors(task.model, task.tok, task.prompts, task.benign)
    return per_layer(vectors, task.depths())


def cast(task: Task) -> Candidates:
    """CAST with the behaviour at several layers and a condition at or before the first of them."""
    layers = task.upper_half()
    others = [*task.benign, *(prompt for prompt, _ in task.rows.retain)]
    condition = search_condition(
        task.model,
        task.tok,
        task.prompts,
        others,
        task.val_target,
        task.val_others,
        range(layers.start + 1),
    )
    return {"": Cast(steering_vectors(task, principal=True).at(*layers), condition)}


# ---------------------------------------------------------------------- needs


def another_category(task: Task) -> str:
    """A second circuit."""
    return "" if task.other_mask else "there is no other category, whose circuit could be edited"


def a_bias(task: Task) -> str:
    """An MLP whose output goes into the residual stream as it is."""
    if task.spec.layout.mlp_post:
        return "this architecture normalises the MLP's output, so no bias equals a steering vector"
    return ""


def benign_prompts(task: Task) -> str:
    """Counterparts of the target."""
    return "" if task.benign else "there are no benign prompts to set the target against"


def validation_prompts(task: Task) -> str:
    """Prompts on both sides of a condition."""
    if task.val_target and task.val_others:
        return ""
    return "the validation split has no prompts to search its condition on"


# ---------------------------------------------------------------------- the table

_ENTRIES = (
    Method("base", "base", REFERENCE, "#949494", False, nothing, note="the model as it is"),
    Method(
        "cdelta",
        "C-ΔΘ",
        REFERENCE,
        "#0173b2",
        True,
        trained(masks.circuit_mask),
        note="ΔΘ by the recipe, on the circuit",
    ),
    Method(
        "positive_only",
        "θ⁺ alone",
        UPDATES,
        "#029e73",
        True,
        trained(masks.circuit_mask, objective="positive"),
        note="on the circuit, without the contrast",
    ),
    Method(
        "dense",
        "ΔΘ, all linear layers",
        UPDATES,
        "#d55e00",
        True,
        trained(masks.all_linear),
        note="the contrast without a circuit",
    ),
    Method(
        "dense_lora",
        "ΔΘ, LoRA of rank 8",
        UPDATES,
        "#fbafe4",
        True,
        trained(masks.all_linear, rank=8),
        note="the same, as rank-8 updates of all linear layers",
    ),
    Method(
        "finetune",
        "full fine-tuning",
        UPDATES,
        "#ece133",
        True,
        trained(masks.all_linear, objective="positive"),
        note="θ⁺ alone on all linear layers",
    ),
    Method(
        "slices_after",
        "circuit cut out afterwards",
        UPDATES,
        "#56b4e9",
        True,
        slices_after,
        note="whole tensors trained, the circuit's entries kept",
    ),
    Method(
        "layer_mask",
        "whole layers",
        UPDATES,
        "#b05a7a",
        True,
        trained(masks.circuit_layers),
        note="all linear layers of the circuit's blocks",
    ),
    Method(
        "random",
        "random mask",
        MASKS,
        "#de8f05",
        True,
        trained(masks.random_units),
        note="ΔΘ on random units of the circuit's size",
    ),
    Method(
        "random_layer",
        "random, same layers",
        MASKS,
        "#8c6d31",
        True,
        trained(masks.random_in_layers),
        note="the same with the circuit's share of every layer",
    ),
    Method(
        "magnitude",
        "largest weights",
        MASKS,
        "#ca9161",
        True,
        trained(masks.largest_weights),
        note="ΔΘ on units of the largest weights",
    ),
    Method(
        "gradient",
        "largest gradients",
        MASKS,
        "#7a9c3f",
        True,
        trained(masks.largest_gradients),
        note="ΔΘ on units of the largest |gradient × weight|",
    ),
    Method(
        "other_circuit",
        "another circuit",
        MASKS,
        "#cc78bc",
        True,
        trained(masks.other_circuit),
        another_category,
        note="ΔΘ on another category's circuit",
    ),
    Method(
        "system_prompt",
        "system prompt",
        STEERING,
        "#4d4d4d",
        False,
        system_prompt,
        note="an instruction before every prompt",
    ),
    Method(
        "as",
        "steering, one layer",
        STEERING,
        "#7b5ea7",
        False,
        steered,
        note="difference of means of refused and answered prompts",
    ),
    Method(
        "as_multi",
        "steering, several layers",
        STEERING,
        "#3f8f8f",
        False,
        steered_at_several,
        note="the same at the middle layers",
    ),
    Method(
        "as_bias",
        "steering as a bias",
        STEERING,
        "#a0522d",
        False,
        as_bias,
        a_bias,
        note="the same in the weights, without a hook",
    ),
    Method(
        "directional",
        "directional",
        STEERING,
        "#2f6f4f",
        False,
        directional,
        benign_prompts,
        note="the direction from benign counterparts to the target, added (Arditi)",
    ),
    Method(
        "cast",
        "CAST",
        STEERING,
        "#8b1a4a",
        False,
        cast,
        validation_prompts,
        note="steering behind a condition on the prompt",
    ),
)
METHODS: Mapping[str, Method] = {method.key: method for method in _ENTRIES}
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
    method = method_of(key)
    plain = tuned or not method.trained or method.family == REFERENCE
    return method.title if plain else f"{method.title} (not tuned)"
