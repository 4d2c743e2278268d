"""TODO delta.card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Sequence

import cdelta
from cdelta.delta.weight_delta import (
    WeightDelta,
)

if TYPE_CHECKING:
    pass


# ---------------------------------------------------------------------- model card


def model_card(
    delta: WeightDelta, scale: float, selectivity: Sequence[Mapping[str, object]] = ()
) -> str:
    """The README.md of an edited checkpoint: what was done, how selective it is, its limits, how to check and undo it."""
    facts = delta.metadata
    base, category = facts.get("base") or "unknown", facts.get("category") or "one category"
    mask = facts.get("mask", {})
    owned = f"{delta.count():,} parameters" + (
        f" ({100 * mask['fraction']:.2f} % of the model)" if "fraction" in mask else ""
    )
    units = (
        f": {mask['heads']} attention heads and {mask['neurons']} MLP neurons"
        if "heads" in mask
        else ""
    )
    table = _markdown_table(selectivity) or "Not measured when this card was written."
    front = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base}"] if "/" in base and not Path(base).exists() else []),
    ]
    return "\n".join(
        [
            *front, "tags: [weight-editing, selective-refusal, c-delta-theta]", "---", "",
            f"# {Path(base).name}, edited to refuse {category}", "",
            f"Base model: `{base}` (content hash `{str(facts.get('base_hash'))[:16]}`). Weights only: no hook, no router, no prompt.", "",
            "## Method", "",
            f"C-ΔΘ (arXiv 2602.04521) with cdelta {cdelta.__version__}: θ' = θ + {scale:g}·ΔΘ, where ΔΘ = θ⁺ − θ⁻ was trained on a mask",
            f"of {owned}{units}.",
            f"Mask hash `{delta.mask_hash()[:16]}`, delta hash `{delta.hash()[:16]}`.", "",
            "## Selectivity", "", table, "",
            "## Limits", "",
            "The edit was chosen and measured on the prompts that the table names. Other phrasings, languages and attacks were not tested; refusing",
            "a category by weights is no guarantee, and may be undone by anyone who has them. Judge it on your own prompts before you rely on it.", "",
            "## Verify and revert", "",
            "```", "cdelta verify BASE THIS_FOLDER DELTA   # no entry outside the mask changed",
            "cdelta revert THIS_FOLDER DELTA OUT    # the base again, bit for bit", "```", "",
        ]
    )  # fmt: skip


def _markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    if not rows:
        return ""
    show = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([show(value) for value in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
