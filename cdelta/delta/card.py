"""The model card of an edited checkpoint, from `templates/card.md.j2`."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, Sequence

import jinja2

import cdelta
from cdelta.delta.base import licence
from cdelta.delta.weight_delta import WeightDelta

TEMPLATES = Path(__file__).parent / "templates"


def model_card(
    delta: WeightDelta,
    scale: float,
    selectivity: Sequence[Mapping[str, object]] = (),
    base_folder: str | Path | None = None,
) -> str:
    """The README.md: what was done, how selective it is, how to check and undo it, its limits.

    Args:
        delta: its metadata names base, revision, licence, mask and category.
        scale: the k that was applied.
        selectivity: rows of a table of measurements; ``low`` and ``high`` (or ``NAME_low`` and
            ``NAME_high``) are shown as the interval of the column before them (or of NAME).
        base_folder: whose licence entries the card's front matter repeats.
    """
    facts = delta.metadata
    base = str(facts.get("base") or "unknown")
    terms = licence(base_folder) if base_folder else {}
    if facts.get("licence"):
        terms.setdefault("license", str(facts["licence"]))
    return render(
        "card.md.j2",
        front=({"base_model": base} if base.count("/") == 1 else {}) | terms,
        title=base.rsplit("/", 1)[-1],
        base=base,
        revision=facts.get("base_revision"),
        licence=terms.get("license_name") or terms.get("license"),
        category=facts.get("category") or "one category",
        mask=_mask_words(delta),
        scale=scale,
        base_hash=str(facts.get("base_hash")),
        mask_hash=delta.mask_hash(),
        delta_hash=delta.hash(),
        version=cdelta.__version__,
        table=markdown_table(selectivity),
    )


def render(template: str, **values: object) -> str:
    """A template of this package, filled in; a name that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.get_template(template).render(**values)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a table; fractions with three digits, intervals beside their values."""
    shown = [_with_intervals(row) for row in rows]
    if not shown:
        return ""
    lines = [list(shown[0]), ["---"] * len(shown[0]), *(list(row.values()) for row in shown)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_intervals(row: Mapping[str, object]) -> dict[str, str]:
    bounds = _bounds(list(row))
    merged = {bound for pair in bounds.values() for bound in pair}
    shown = {name: _text(value) for name, value in row.items() if name not in merged}
    for name, (low, high) in bounds.items():
        shown[name] += f" [{_text(row[low])}, {_text(row[high])}]"
    return shown


def _bounds(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Column -> the two columns that are its interval."""
    found = {}
    for place, name in enumerate(names):
        if f"{name}_low" in names and f"{name}_high" in names:
            found[name] = (f"{name}_low", f"{name}_high")
        elif list(names[place + 1 : place + 3]) == ["low", "high"]:
            found[name] = ("low", "high")
    return found


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _mask_words(delta: WeightDelta) -> str:
    mask = delta.metadata.get("mask") or {}
    words = f"{delta.count():,} parameters"
    if isinstance(mask.get("fraction"), (int, float)):
        words += f" ({100 * mask['fraction']:.2f} % of the model)"
    if "heads" in mask and "neurons" in mask:
        words += f": {mask['heads']} attention heads and {mask['neurons']} MLP neurons"
    return words
