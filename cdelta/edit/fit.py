"""TODO edit.fit."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Mapping

import torch
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

import cdelta
from cdelta.circuit.mask import ParameterMask
from cdelta.delta.weight_delta import WeightDelta, model_hash
from cdelta.edit.data import Data, Rows
from cdelta.edit.recipe import SIDES, Settings, Stop
from cdelta.edit.slices import SliceHooks
from cdelta.edit.training import Training
from cdelta.errors import CdeltaError, refuse_test
from cdelta.models.hooks import frozen

if TYPE_CHECKING:
    pass

OTHER_BATCHES = 1000
"""What the next attempt adds to the seed."""


# ---------------------------------------------------------------------- fitting


def fit_delta(
    model,
    tok,
    mask: ParameterMask,
    positive: Rows,
    negative: Rows,
    retain: Rows,
    *,
    stop: Stop | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    metadata: Mapping[str, object] | None = None,
    **settings: object,
) -> WeightDelta:
    """ΔΘ_C = θ⁺ − θ⁻ on `mask`; θ⁺ alone under ``objective="positive"``.

    Args:
        positive, negative: the same prompts in the same order, refused and answered.
        retain: prompts whose behaviour must stay, with the base model's own answers.
        stop, checkpoint, progress, metadata, settings: as `fit_sides` takes them.

    The model is as it was, bit for bit, afterwards. `metadata` records base, mask, settings, versions, and how the training ended.
    """
    plus, minus, _ = fit_sides(
        model, tok, mask, positive, negative, retain,
        stop=stop, checkpoint=checkpoint, progress=progress, metadata=metadata, **settings,
    )  # fmt: skip
    return plus if minus is None else plus - minus


def fit_sides(
    model,
    tok,
    mask: ParameterMask,
    positive: Rows,
    negative: Rows,
    retain: Rows,
    *,
    stop: Stop | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    metadata: Mapping[str, object] | None = None,
    **settings: object,
) -> tuple[WeightDelta, WeightDelta | None, list[dict]]:
    """Δ⁺, Δ⁻ (None under ``objective="positive"``) and the log, trained in lockstep on the same batches.

    Args:
        stop: called every `check_every` steps with the update in the model's weights (with each side, under ``retain_on="sides"``); the
            training ends when it is True of all, and begins again when it is `IN_VAIN` for any.
        checkpoint: folder for the training state; a run that finds its own state there goes on from it, to the same result.
        progress: show loss, seconds per step and peak memory.
        metadata: entries to record with the deltas (category, ...).
        settings: fields of `Settings`.

    Log rows: ``side, step, loss, target_loss, retain_loss, grad_norm, lr, seconds``.
    """
    how = Settings.of(**settings)
    for rows, what in (
        (positive, "training θ⁺"),
        (negative, "training θ⁻"),
        (retain, "training with retain rows"),
    ):
        refuse_test(rows, what)
    if model.training:
        raise CdeltaError(
            "the model is in training mode, where dropout makes the sides differ: call model.eval() first."
        )
    facts = {**_facts(model, mask, how), **(metadata or {})}
    with frozen(model), SliceHooks(model, mask.slices) as hooks:
        for attempt in range(how.attempts):
            again = replace(how, seed=how.seed + OTHER_BATCHES * attempt)
            data = Data.build(model, tok, positive, negative, retain, again)
            training = Training(model, hooks, mask, data, again, checkpoint, attempt)
            training.run(stop, progress)
            if training.ended["stopped"] or not (training.in_vain or attempt):
                break
    plus, minus = (
        training.delta(side).with_metadata(**facts, training=training.ended)
        if side in how.sides
        else None
        for side in SIDES
    )
    return plus, minus, training.log


def _facts(model, mask: ParameterMask, how: Settings) -> dict[str, object]:
    return {
        "base": str(model.config._name_or_path),
        "base_revision": getattr(model.config, "_commit_hash", None),
        "base_hash": model_hash(model),
        "conv1d": any(isinstance(module, Conv1D) for module in model.modules()),
        "shapes": {name: list(shape) for name, shape in mask.shapes.items()},
        "mask_hash": mask.hash(),
        "mask": mask.report(),
        "settings": asdict(how),
        "versions": {
            "cdelta": cdelta.__version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
    }
