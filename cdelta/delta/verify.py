"""TODO delta.verify."""

from __future__ import annotations

import filecmp
import json
import os
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Mapping

import torch

from cdelta.delta.apply import check_fits, read_record
from cdelta.delta.weight_delta import (
    WeightDelta,
    check_scale,
    put,
    take,
)
from cdelta.models.checkpoint import INDEX, Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------- verify


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. `ok` means: outside the mask no bit differs, and inside it every value is θ + k·ΔΘ_C, rounded once."""

    scale: float
    n_params: int
    mask_entries: int
    changed_outside: int
    """Entries that differ although the mask does not own them."""
    wrong_inside: int
    """Entries of the mask that are not base + k·delta up to one unit in the last place."""
    nonzero: int
    """Entries that k·delta means to change."""
    survived: int
    """Of these, entries that differ from the base after rounding to the checkpoint's dtype."""
    problems: tuple[str, ...] = field(default=())
    """One sentence per parameter or file that fails."""

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is exactly the edit."""
        return not self.problems

    def to_json(self) -> str:
        """All numbers and problems."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)

    def __str__(self) -> str:
        share = 100 * self.mask_entries / max(self.n_params, 1)
        kept = 100 * self.survived / max(self.nonzero, 1)
        verdict = (
            "Verified"
            if self.ok
            else f"NOT verified ({len(self.problems)} problems; first: {self.problems[0]})"
        )
        return (
            f"{verdict}: at scale {self.scale:g} the mask owns {self.mask_entries:,} of {self.n_params:,} parameters ({share:.2f} %); "
            f"{self.changed_outside:,} entries outside it changed, {self.wrong_inside:,} inside it are not base + k·delta, and "
            f"{self.survived:,} of the {self.nonzero:,} entries that the delta changes ({kept:.1f} %) survive rounding."
        )


def verify(
    base: str | Path,
    edited: str | Path,
    delta: WeightDelta,
    scale: float | None = None,
    force: bool = False,
) -> VerifyReport:
    """Compare two checkpoints tensor by tensor, two tensors in memory at a time.

    Args:
        scale: k; by default what the edited folder records, else 1.
        force: skip the check that `base` is the delta's base.

    Raises `CdeltaError` on damaged files or a delta of another model; differences are reported, not raised.
    """
    first, second = Checkpoint(base), Checkpoint(edited)
    check_fits(first, delta)
    if not force:
        delta.check_base(first.folder)
    if scale is None:
        scale = (read_record(edited) or {"scale": 1.0})["scale"]
    counts, problems = (
        {"changed_outside": 0, "wrong_inside": 0, "nonzero": 0, "survived": 0},
        list(_file_problems(first, second)),
    )
    name_of = {key: name for name, key in first.key_of.items()}
    for key in sorted(first.file_of.keys() & second.file_of.keys()):
        found = _compare(first, second, key, delta, name_of.get(key, ""), check_scale(scale))
        problems += [found] if isinstance(found, str) else _counted(key, found, counts)
    n_params = sum(prod(first.shape(key)) for key in first.key_of.values())
    return VerifyReport(scale, n_params, delta.count(), **counts, problems=tuple(problems))


def _file_problems(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    for key in sorted(first.file_of.keys() ^ second.file_of.keys()):
        yield f"the tensor {key} is only in {(first if key in first.file_of else second).folder}."
    for path in sorted(first.folder.iterdir()):
        same_kind = path.suffix in (".json", ".jinja", ".model", ".txt") and path.name != INDEX
        if not same_kind:
            continue
        if not (second.folder / path.name).is_file() or not filecmp.cmp(
            path, second.folder / path.name, shallow=False
        ):
            yield f"the file {path.name} differs from the base's or is missing."


def _compare(
    first: Checkpoint, second: Checkpoint, key: str, delta: WeightDelta, name: str, scale: float
) -> str | dict[str, int]:
    """Counts of one tensor, or the sentence that says why it cannot be compared."""
    same_file = os.path.samefile(
        first.folder / first.file_of[key], second.folder / second.file_of[key]
    )
    if same_file and name not in delta.values:
        return {}
    old, new = first.get(key), second.get(key)
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{key} is {new.dtype} {tuple(new.shape)} instead of {old.dtype} {tuple(old.shape)}."
    inside = {}
    if name in delta.values:
        where = delta.slices[name]
        inside = _compare_inside(take(old, *where), take(new, *where), delta.values[name], scale)
        put(new, *where, take(old, *where))
    return {**inside, "changed_outside": _differing(old, new)}


def _compare_inside(old: Tensor, new: Tensor, value: Tensor, scale: float) -> dict[str, int]:
    change = value * scale
    exact = old.float() + change
    tolerance = torch.finfo(old.dtype).eps * exact.abs().clamp(min=torch.finfo(old.dtype).tiny)
    landed = ((new.float() - exact).abs() <= tolerance) & ((change != 0) | _same_bits(old, new))
    moved = change != 0
    return {
        "wrong_inside": int((~landed).sum()),
        "nonzero": int(moved.sum()),
        "survived": int((moved & ~_same_bits(old, new)).sum()),
    }


def _same_bits(old: Tensor, new: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    return old.contiguous().view(integer) == new.contiguous().view(integer)


def _differing(old: Tensor, new: Tensor) -> int:
    return int((~_same_bits(old, new)).sum())


def _counted(key: str, found: Mapping[str, int], counts: dict[str, int]) -> list[str]:
    """Add up, and name what is wrong."""
    for what, n in found.items():
        counts[what] += n
    words = {
        "changed_outside": "entries outside the mask changed",
        "wrong_inside": "entries are not base + k·delta",
    }
    return [f"{key}: {found[what]:,} {text}." for what, text in words.items() if found.get(what)]
