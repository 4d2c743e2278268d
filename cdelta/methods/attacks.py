"""TODO methods.attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import pandas as pd

from cdelta.circuit.controls import (
    dense_mask,
)
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.fit import fit_delta
from cdelta.evaluation.measure import empty_rows
from cdelta.methods.registry import Method, Task
from cdelta.methods.steering import (
    Ablation,
    prompt_vectors,
)
from cdelta.methods.tuning import measure

if TYPE_CHECKING:
    pass


def benign_finetuned(task: Task) -> WeightDelta:
    """What fine-tuning the model as it stands on benign rows changes, in all linear layers."""
    rows = [row for row in task.retain if row[0] in set(task.benign)] or task.retain
    how = {"seed": task.seed, **task.settings, "objective": "positive", "retain_share": 0.0}
    return fit_delta(task.model, task.tok, dense_mask(task.spec), rows, [], [], **how)


def without_direction(task: Task) -> Ablation:
    """Ablation of the refusal direction that the model as it stands has for the category, read at two thirds of its depth."""
    return Ablation(
        prompt_vectors(task.model, task.tok, task.prompts, task.benign).vectors[task.depths()[-1]]
    )


ATTACKS: Mapping[str, Callable[[Task], Method]] = {
    "benign_finetune": benign_finetuned,
    "ablated_direction": without_direction,
}
"""Attacks on a model that already carries a method: key of the rows' ``attack`` -> what is applied on top."""


def measure_attacked(
    task: Task,
    method: Method,
    strength: float,
    records,
    attacks: Sequence[str] = tuple(ATTACKS),
    /,
    **how,
) -> pd.DataFrame:
    """`measure` once per attack, each made for the model with the method applied."""
    found = [empty_rows()]
    for name in attacks:
        with method.applied(task.model, strength):
            attack = ATTACKS[name](task)
        with attack.applied(task.model, 1.0):
            found.append(
                measure(task.model, task.tok, method, strength, records, attack=name, **how)
            )
    return pd.concat(found, ignore_index=True)
