"""The proof that a checkpoint is its base plus k·delta and nothing else, bit by bit, streamed."""

from __future__ import annotations

import filecmp
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor

from cdelta.delta.apply import EDIT, ORIGINAL, RECORD, carried_files, read_record, runtime_files
from cdelta.delta.weight_delta import METADATA, WeightDelta, put, shifted, take
from cdelta.files import file_hash
from cdelta.models.checkpoint import INDEX, Checkpoint

ENTRIES_AT_ONCE = 1 << 20
"""Entries of a tensor that are compared at once: about 25 MB with everything around them."""


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
    delta.check_shapes(first.shapes)
    if not force:
        delta.check_base(first.folder)
    record = read_record(edited)
    if scale is None and record is not None:
        scale = float(record["scale"])
    scale = delta.scale_or_own(scale)
    problems = list(_file_problems(first, second, record, delta))
    counts = _compare_tensors(first, second, delta, scale, problems)
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


def _file_problems(
    first: Checkpoint, second: Checkpoint, record: dict[str, Any] | None, delta: WeightDelta
) -> Iterator[str]:
    """What differs between the files of two checkpoints, or in the second's record of the edit."""
    for key in sorted(first.file_of.keys() ^ second.file_of.keys()):
        yield f"the tensor {key} is only in {(first if key in first.file_of else second).folder}."
    ours = set(carried_files(first.folder))
    theirs = set(runtime_files(second.folder)) - set(map(Path, second.shards))
    same_layout = first.shards == second.shards
    if not same_layout:  # the same edit, saved in other files
        ours.discard(Path(INDEX))
        theirs.discard(Path(INDEX))
    for place in sorted(ours):
        other = second.folder / place
        if not other.is_file() or not filecmp.cmp(first.folder / place, other, shallow=False):
            yield f"the file {place} differs from the base's or is missing."
    for place in sorted(theirs - ours):
        yield f"the file {place} is not the base's: a runtime may read it."
    for file in first.shards if same_layout else ():
        if _header(first.folder / file) != _header(second.folder / file):
            yield f"the header of {file} differs from the base's."
    if record is None:
        return
    if record["delta_hash"] != delta.hash():
        yield f"{EDIT} records another delta than the given one."
    own = second.folder / RECORD
    original, beside = own / ORIGINAL, own / "delta"
    if not original.is_file() or file_hash(original) != record["original_sha256"]:
        yield f"{ORIGINAL} is missing or damaged: the edit can no longer be reverted exactly."
    if (beside / METADATA).is_file() and WeightDelta.load(beside).hash() != delta.hash():
        yield f"the delta in {beside} is another than the given one."


def _header(path: Path) -> bytes:
    """The length and the JSON at the beginning of a safetensors file."""
    with path.open("rb") as file:
        size = file.read(8)
        return size + file.read(int.from_bytes(size, "little"))


# ---------------------------------------------------------------------- tensors


def _compare_tensors(
    first: Checkpoint, second: Checkpoint, delta: WeightDelta, scale: float, problems: list[str]
) -> Counter:
    """Counts of all tensors together; what is wrong with one is added to `problems`."""
    counts: Counter = Counter()
    name_of = {key: name for name, key in first.key_of.items()}
    for key in sorted(first.file_of.keys() & second.file_of.keys()):
        name, old, new = name_of.get(key, ""), first.view(key), second.view(key)
        kind, other = (f"{view.get_dtype()} {tuple(view.get_shape())}" for view in (old, new))
        files = [checkpoint.folder / checkpoint.file_of[key] for checkpoint in (first, second)]
        if kind != other:
            problems.append(f"{key} is {other} instead of {kind}.")
        elif name in delta.values or not os.path.samefile(*files):
            found = sum(_blocks(old, new, delta, name, scale), Counter())
            if found["outside"]:
                problems.append(f"{key}: {found['outside']:,} entries outside the mask changed.")
            if found["inside"]:
                problems.append(f"{key}: {found['inside']:,} entries are not base + k·delta.")
            counts += found
    return counts


def _blocks(old, new, delta: WeightDelta, name: str, scale: float) -> Iterator[Counter]:
    """Counts of a few rows of a tensor after the other; a number without axes is one row."""
    rows, *width = old.get_shape() or [1]
    step = max(1, ENTRIES_AT_ONCE // max(1, prod(width)))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        before, after = (
            view[start:stop] if view.get_shape() else view[...].reshape(1) for view in (old, new)
        )
        if name not in delta.values:
            yield Counter(outside=int(_different(before, after).sum()))
            continue
        (dim, index), values = delta.slices[name], delta.values[name]
        if dim:
            values = values[start:stop]
        else:
            here = (index >= start) & (index < stop)
            index, values = index[here] - start, values[here]
        was, now = take(before, dim, index), take(after, dim, index)
        put(after, dim, index, was)
        meant = values * scale != 0
        yield Counter(
            outside=int(_different(before, after).sum()),
            inside=int(_different(shifted(was, values, scale), now).sum()),
            nonzero=int(meant.sum()),
            survived=int((meant & _different(was, now)).sum()),
        )


def _different(first: Tensor, second: Tensor) -> Tensor:
    """Entries whose bits differ."""
    bits = getattr(torch, f"int{8 * first.element_size()}")
    return first.contiguous().view(bits) != second.contiguous().view(bits)
