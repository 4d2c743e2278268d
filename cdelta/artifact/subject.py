"""The steps that the notebooks share: loading the model under study, which rows train, stop and scale an edit.

Attribution, training and the choice of k see discover, edit and val rows only; the test split enters with `evaluate` and nowhere else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Mapping

from cdelta.attribution.metrics import (
    Metric,
    TokenSets,
    refusal_log_odds,
)
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.mask import ParameterMask
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec


def name_subject(run) -> dict[str, str]:
    """Write stage 00's ``model.json`` for a model that was given by folder or hub id, and return it."""
    given = Path(run.settings.model)
    here = given.exists()
    subject = {
        "name": given.name if here else str(given),
        "path": str(given.resolve()) if here else str(given),
        "revision": run.settings.revision,
    }
    run.path("model.json").write_text(json.dumps(subject))
    return subject


def subject_folder(run, subject: Mapping[str, str] | None = None) -> str:
    """Folder or hub id of the model under study; `subject` is given in stage 00, which is still being written."""
    subject = subject or json.loads(run.input("00_subject", "model.json").read_text())
    return subject.get("folder") or (
        str(run.input("00_subject", "model")) if subject["path"] == "model" else subject["path"]
    )


def load_subject(run, subject: Mapping[str, str] | None = None):
    """``(model, tok)`` of the model under study: fp32 on a CPU, bf16 on a GPU. At the embedded model's size, eager attention is the faster one."""
    how = {"attn_implementation": "eager"} if run.settings.model == "organism" else {}
    dtype = "float32" if run.device == "cpu" else "bfloat16"
    return load_model(
        subject_folder(run, subject),
        dtype=dtype,
        device=run.device,
        revision=run.settings.revision or None,
        **how,
    )


def save_token_sets(sets: TokenSets, path: Path) -> None:
    """Write the ids as JSON."""
    path.write_text(json.dumps({"refuse": list(sets.refuse), "comply": list(sets.comply)}))


def load_metric(run) -> Metric:
    """Stage 02's refusal log-odds."""
    ids = json.loads(run.input("02_attribution", "token_sets.json").read_text())
    return refusal_log_odds(ids["refuse"], ids["comply"])


def load_mask(run, category: str, spec: ModelSpec) -> ParameterMask:
    """Stage 03's mask of a category."""
    return Circuit.load(run.input("03_circuit", f"{category}.json")).to_mask(spec)
