"""Circuit-restricted weight editing (C-ΔΘ, arXiv 2602.04521) on Hugging Face checkpoints.

The names below are loaded when they are first used, so that ``import cdelta`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "CdeltaError": "errors",
    "Circuit": "circuit.circuit",
    "Fit": "edit.fit",
    "ModelSpec": "models.spec",
    "ParameterMask": "circuit.circuit",
    "Policy": "policy.build",
    "PromptPairs": "policy.pairs",
    "Recipe": "edit.recipe",
    "Scores": "attribution.scores",
    "UnsupportedArchitecture": "models.spec",
    "VerifyReport": "delta.verify",
    "WeightDelta": "delta.weight_delta",
    "attribute": "attribution.scores",
    "build_policy": "policy.build",
    "choose_scale": "edit.validation",
    "find_circuit": "edit.find",
    "fit_delta": "edit.fit",
    "load_model": "models.loading",
    "revert": "delta.apply",
    "save_edited": "delta.apply",
    "train": "edit.fit",
    "training_rows": "edit.rows",
    "verify": "delta.verify",
}
"""Public name -> the module that has it."""
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cdelta' has no attribute {name!r}")
    if name in ("Scores", "attribute"):
        import_module("cdelta.circuit")  # it gives scores their `select`
    globals()[name] = value = getattr(import_module(f"cdelta.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
