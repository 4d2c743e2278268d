"""The model under study, and what stages know of it: metric, masks, token sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cdelta.artifact.smollm2 import smollm2_folder
from cdelta.attribution.metrics import Metric, refusal_log_odds
from cdelta.circuit.circuit import Circuit, ParameterMask
from cdelta.edit.forward import bf16_is_faster
from cdelta.files import read_json
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import parse_template_args

if TYPE_CHECKING:
    from cdelta.artifact.run import Run, RunReader

STAGE = "00_subject"
EMBEDDED = "organism"
PACKAGED = "smollm2"


def prepare_subject(run: Run, retrain: bool = False) -> dict[str, str]:
    """Write stage 00's ``model.json`` (name, path, revision) and return it.

    The embedded model is copied (or trained) into the stage's folder, the packaged one is put into
    data/cache; a folder or hub id stays where it is.
    """
    from cdelta.artifact.organism import prepare

    if run.settings.model == EMBEDDED:
        return prepare(run, retrain)
    return name_subject(run)


def name_subject(run: Run) -> dict[str, str]:
    """The same for a model that is not embedded."""
    if run.settings.model == PACKAGED:
        subject = {"name": "SmolLM2-135M-Instruct", "path": str(smollm2_folder()), "revision": ""}
    else:
        given = Path(run.settings.model)
        here = given.exists()
        subject = {
            "name": given.name if here else str(given),
            "path": str(given.resolve()) if here else str(given),
            "revision": run.settings.revision,
        }
    run.path("model.json").write_text(json.dumps(subject), encoding="utf-8")
    return subject


def subject_folder(run: RunReader, subject: Mapping[str, str] | None = None) -> str:
    """Folder or hub id of the model under study; `subject` is given in stage 00, which is still
    being written."""
    subject = subject or read_json(run.input(STAGE, "model.json"))
    if "folder" in subject:
        return subject["folder"]
    return str(run.input(STAGE, "model")) if subject["path"] == "model" else subject["path"]


def load_subject(run: RunReader, subject: Mapping[str, str] | None = None):
    """``(model, tok)`` of the model under study, with the recipe's system prompt and template
    keywords; in bf16, on a CPU only where it multiplies bf16 faster than fp32.

    The embedded model runs in fp32 on a CPU, and with eager attention, the faster one at its size.
    """
    embedded, answers = run.settings.model == EMBEDDED, run.settings.answers
    options = {"attn_implementation": "eager"} if embedded else {}
    wide = run.device == "cpu" and (embedded or not bf16_is_faster("cpu"))
    return load_model(
        subject_folder(run, subject),
        dtype="float32" if wide else "bfloat16",
        device=run.device,
        revision=run.settings.revision or None,
        system=answers.system,
        template_args=parse_template_args(answers.template_args),
        **options,
    )


def load_metric(run: RunReader) -> Metric | None:
    """Stage 02's refusal log-odds; None where only whole openings tell refusals apart."""
    ids = read_json(run.input("02_attribution", "token_sets.json"))
    return refusal_log_odds(ids["refuse"], ids["comply"]) if "refuse" in ids else None


def load_mask(run: RunReader, category: str, spec: ModelSpec) -> ParameterMask:
    """Stage 03's mask of a category."""
    return Circuit.load(run.input("03_circuit", f"{category}.json")).to_mask(spec)
