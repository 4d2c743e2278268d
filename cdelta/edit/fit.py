"""Training an edit: rows and a mask in, θ⁺, θ⁻ and their difference out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

import cdelta
from cdelta.circuit.circuit import ParameterMask
from cdelta.delta.base import base_facts
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.recipe import SIDES, EditRecipe
from cdelta.edit.rows import Data, Rows, TrainingRows, check_rows
from cdelta.edit.slices import SliceHooks
from cdelta.edit.training import Stop, Training, Verdict
from cdelta.errors import CdeltaError
from cdelta.models.hooks import requires_grad
from cdelta.models.templates import template_facts
from cdelta.settings import changed

OTHER_BATCHES = 1000
"""What the next attempt adds to the seed."""


@dataclass(frozen=True)
class Fit:
    """What came out of a training."""

    plus: WeightDelta
    """θ⁺ minus the base."""
    minus: WeightDelta | None
    """θ⁻ minus the base; None where θ⁺ alone was trained."""
    log: list[dict] = field(repr=False)
    """Rows ``side, step, loss, target_loss, retain_loss, grad_norm, lr, seconds``."""
    verdict: Verdict

    @property
    def delta(self) -> WeightDelta:
        """ΔΘ = θ⁺ − θ⁻, or θ⁺'s alone."""
        return self.plus if self.minus is None else self.plus - self.minus


def train(
    model,
    tok,
    mask: ParameterMask,
    rows: TrainingRows,
    how: EditRecipe,
    *,
    stop: Stop | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    metadata: Mapping[str, object] | None = None,
) -> Fit:
    """Train both sides in lockstep on the same batches, on the mask's entries alone.

    Args:
        model: in eval mode; as it was, bit for bit, afterwards.
        stop: asked every `how.check_every` steps with the update in the model's weights (with each
            side, under ``retain_on="sides"``). The training ends when it finds all selective, and
            begins again with other batches when it finds that one must `Verdict.RESTART`.
        checkpoint: folder for the training state; a run that finds its own state there goes on from
            it, to the same result.
        progress: show steps, loss and peak memory.
        metadata: entries to record with the deltas (category, ...), beside base, mask, settings,
            versions and how the training ended.

    Raises `CdeltaError` on rows that cannot be trained on, and when the loss diverges.
    """
    check_rows(rows, how)
    if model.training:
        raise CdeltaError(
            "the model is in training mode, where dropout makes the sides differ: "
            "call model.eval() first."
        )
    facts = _facts(model, tok, mask, how) | dict(metadata or {})
    with requires_grad(model, on=False), SliceHooks(model, mask.slices) as hooks:
        for attempt in range(how.attempts):
            again = replace(how, seed=how.seed + OTHER_BATCHES * attempt)
            data = Data.build(model, tok, rows, again)
            training = Training(model, hooks, mask, data, again, checkpoint, attempt)
            verdict = training.run(stop, progress)
            # once an attempt had to restart, only a selective one ends the training early
            if verdict is Verdict.SELECTIVE or (verdict is Verdict.NOT_YET and not attempt):
                break
    sides = {
        side: training.delta(side).with_metadata(**facts, training=training.ended)
        for side in how.sides
    }
    return Fit(sides[SIDES[0]], sides.get(SIDES[1]), training.log, verdict)


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
    """ΔΘ_C = θ⁺ − θ⁻ on `mask`, from (prompt, response) rows.

    Args:
        positive, negative: the same prompts in the same order, refused and answered.
        retain: prompts whose behaviour must stay, with the base model's own answers.
        stop, checkpoint, progress, metadata: as `train` takes them.
        settings: fields of `EditRecipe` (``steps``, ``lr``, ``batch_size``, ``seed``, ...).
    """
    how = changed(EditRecipe(), settings)
    rows = TrainingRows(positive, negative, retain)
    return train(
        model,
        tok,
        mask,
        rows,
        how,
        stop=stop,
        checkpoint=checkpoint,
        progress=progress,
        metadata=metadata,
    ).delta


def _facts(model, tok, mask: ParameterMask, how: EditRecipe) -> dict[str, object]:
    """What is recorded with a delta; the date only where the chat template was told one."""
    date = template_facts(tok).date if tok.chat_template else ""
    return {
        **base_facts(model),
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
        **({"template_date": date} if date else {}),
    }
