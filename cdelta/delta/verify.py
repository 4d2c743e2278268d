"""The proof that a checkpoint is its base plus k·delta and nothing else, bit by bit, streamed."""

from __future__ import annotations

import filecmp
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

import torch

from cdelta.delta.apply import EDIT, ORIGINAL, RECORD, carried_files, check_fits, read_record
from cdelta.delta.base import CARD
from cdelta.delta.storage import METADATA
from cdelta.delta.weight_delta import WeightDelta, put, shifted, take
from cdelta.files import file_hash
from cdelta.models.checkpoint import INDEX, Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

ENTRIES_AT_ONCE = 1 << 20
"""Entries of a tensor that are compared at once: about 25 MB with everything around them."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    scale: float
    n_params: int
    mask_entries: int
    changed_outside: int
    """Entries that differ although the mask does not own them."""
    wrong_inside: int
    """Entries of the mask that are not base + k·delta, rounded once."""
    nonzero: int
    """Entries that k·delta means to change."""
    survived: int
    """Of these, entries that differ from the base after rounding to the checkpoint's dtype."""
    problems: tuple[str, ...] = ()
    """One sentence per tensor or file that fails."""

    @property
    def ok(self) -> bool:
        """Whether every bit outside the mask is the base's and every one inside it the edit's."""
        return not self.problems

    def to_json(self) -> str:
        """All numbers and problems."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)

    def __str__(self) -> str:
        share = 100 * self.mask_entries / max(self.n_params, 1)
        kept = 100 * self.survived / max(self.nonzero, 1)
        verdict = "Verified"
        if not self.ok:
            verdict = f"NOT verified ({len(self.problems)} problems; first: {self.problems[0]})"
        return (
            f"{verdict}: at scale {self.scale:g} the mask owns {self.mask_entries:,} of "
            f"{self.n_params:,} parameters ({share:.2f} %); {self.changed_outside:,} entries "
            f"outside it changed, {self.wrong_inside:,} inside it are not base + k·delta, and "
            f"{self.survived:,} of the {self.nonzero:,} entries that the delta changes ({kept:.1f} "
            "%) survive rounding."
        )


def verify(
    base: str | Path,
    edited: str | Path,
    delta: WeightDelta,
    scale: float | None = None,
    force: bool = False,
) -> VerifyReport:
    """Compare two checkpoint folders, a few rows of one tensor in memory at a time.

    Every bit counts: of tensors, of the headers of their files, of configuration, tokenizer and
    templates, of the edit's record and of the delta beside it. The model card may differ.

    Args:
        base: folder of the base.
        edited: folder of the edited model.
        delta: what should have been added.
        scale: k; by default what the edited folder records, else the delta's own.
        force: skip the check that `base` is the delta's base.

    Raises `CdeltaError` on damaged files or a delta of another model; differences are reported.
    """
    first, second = Checkpoint(base), Checkpoint(edited)
    check_fits(first, delta)
    if not force:
        delta.check_base(first.folder)
    record = read_record(edited)
    if scale is None and record is not None:
        scale = float(record["scale"])
    scale = delta.scale_or_own(scale)
    problems = [*_file_problems(first, second), *_record_problems(second.folder, record, delta)]
    counts = Counter()
    name_of = {key: name for name, key in first.key_of.items()}
    for key in sorted(first.file_of.keys() & second.file_of.keys()):
        counts += _compared(first, second, key, delta, name_of.get(key, ""), scale, problems)
    return VerifyReport(
        scale,
        n_params=sum(map(prod, first.shapes.values())),
        mask_entries=delta.count(),
        changed_outside=counts["outside"],
        wrong_inside=counts["inside"],
        nonzero=counts["nonzero"],
        survived=counts["survived"],
        problems=tuple(problems),
    )


# ---------------------------------------------------------------------- files


def _file_problems(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    for key in sorted(first.file_of.keys() ^ second.file_of.keys()):
        yield f"the tensor {key} is only in {(first if key in first.file_of else second).folder}."
    same_layout = first.shards == second.shards
    ours, theirs = set(carried_files(first.folder)), set(_all_files(second))
    if not same_layout:  # the same edit, saved in other files
        ours, theirs = ours - {Path(INDEX)}, theirs - {Path(INDEX)}
    for place in sorted(ours):
        other = second.folder / place
        if not other.is_file() or not filecmp.cmp(first.folder / place, other, shallow=False):
            yield f"the file {place} differs from the base's or is missing."
    for place in sorted(theirs - ours):
        yield f"the file {place} is not the base's: a runtime may read it."
    for file in first.shards if same_layout else ():
        if _header(first.folder / file) != _header(second.folder / file):
            yield f"the header of {file} differs from the base's."


def _all_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Everything that a runtime might read, but the shards themselves and the model card."""
    for path in checkpoint.folder.rglob("*"):
        place = path.relative_to(checkpoint.folder)
        own = place.parts[0] in (RECORD, CARD) or str(place) in checkpoint.shards
        if path.is_file() and not own and not any(part.startswith(".") for part in place.parts):
            yield place


def _header(path: Path) -> bytes:
    """The length and the JSON at the beginning of a safetensors file."""
    with path.open("rb") as file:
        size = file.read(8)
        return size + file.read(int.from_bytes(size, "little"))


def _record_problems(edited: Path, record: dict | None, delta: WeightDelta) -> Iterator[str]:
    if record is None:
        return
    if record["delta_hash"] != delta.hash():
        yield f"{EDIT} records another delta than the given one."
    original = edited / RECORD / ORIGINAL
    if not original.is_file() or file_hash(original) != record["original_sha256"]:
        yield f"{ORIGINAL} is missing or damaged: the edit can no longer be reverted exactly."
    beside = edited / RECORD / "delta"
    if (beside / METADATA).is_file() and WeightDelta.load(beside).hash() != delta.hash():
        yield f"the delta in {beside} is another than the given one."


# ---------------------------------------------------------------------- tensors


def _compared(
    first: Checkpoint,
    second: Checkpoint,
    key: str,
    delta: WeightDelta,
    name: str,
    scale: float,
    problems: list[str],
) -> Counter:
    """Counts of one tensor; what is wrong with it is added to `problems`."""
    files = [c.folder / c.file_of[key] for c in (first, second)]
    if os.path.samefile(*files) and name not in delta.values:
        return Counter()
    old, new = (c.open(c.file_of[key]).get_slice(key) for c in (first, second))
    kind, other_kind = _kind(old), _kind(new)
    if kind != other_kind:
        problems.append(f"{key} is {other_kind} instead of {kind}.")
        return Counter()
    counts = Counter()
    for start, stop in _row_blocks(old.get_shape()):
        part = _delta_rows(delta, name, start, stop)
        counts += _compared_rows(_read(old, start, stop), _read(new, start, stop), part, scale)
    if counts["outside"]:
        problems.append(f"{key}: {counts['outside']:,} entries outside the mask changed.")
    if counts["inside"]:
        problems.append(f"{key}: {counts['inside']:,} entries are not base + k·delta.")
    return counts


def _kind(view) -> str:
    return f"{view.get_dtype()} {tuple(view.get_shape())}"


def _read(view, start: int, stop: int) -> Tensor:
    """Rows of a tensor on disk; a number without axes is one row."""
    return view[start:stop] if view.get_shape() else view[...].reshape(1)


def _row_blocks(shape: list[int]) -> Iterator[tuple[int, int]]:
    shape = shape or [1]
    step = max(1, ENTRIES_AT_ONCE // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


Part = tuple[int, "Tensor", "Tensor"]
"""(axis, indices, values) of a delta on some rows of a parameter."""


def _delta_rows(delta: WeightDelta, name: str, start: int, stop: int) -> Part | None:
    if name not in delta.values:
        return None
    (dim, index), values = delta.slices[name], delta.values[name]
    if dim:
        return dim, index, values[start:stop]
    first, last = torch.searchsorted(index, torch.tensor([start, stop])).tolist()
    return dim, index[first:last] - start, values[first:last]


def _compared_rows(old: Tensor, new: Tensor, part: Part | None, scale: float) -> Counter:
    if part is None:
        return Counter(outside=_n_different(old, new))
    dim, index, values = part
    before, after = take(old, dim, index), take(new, dim, index)
    wanted = shifted(before, values, scale)
    put(new, dim, index, before)
    meant = values * scale != 0
    return Counter(
        outside=_n_different(old, new),
        inside=_n_different(wanted, after),
        nonzero=int(meant.sum()),
        survived=int((meant & _different(before, after)).sum()),
    )


def _different(first: Tensor, second: Tensor) -> Tensor:
    integer = INTEGERS[first.element_size()]
    return first.contiguous().view(integer) != second.contiguous().view(integer)


def _n_different(first: Tensor, second: Tensor) -> int:
    return int(_different(first, second).sum())
