"""From a weight delta to an ordinary checkpoint, streamed file by file, and back.

An edited folder holds the base's files under the same names, the changed weights, a model card,
and the subfolder `cdelta/` with `edit.json` (what was added) and `original.safetensors` (the mask's
entries as they were), which makes a revert exact. Runtimes ignore that subfolder.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import cdelta
from cdelta.delta.base import (
    CARD,
    WrongBase,
    damaged,
    licence,
    markdown_table,
    model_hash,
    published_facts,
    read_sealed,
    render,
    sealed,
)
from cdelta.delta.weight_delta import WeightDelta, put
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, new_folder, write_text
from cdelta.models.checkpoint import Checkpoint, rewrite_tensors

RECORD = "cdelta"
EDIT, ORIGINAL, BASE_CARD = "edit.json", "original.safetensors", "base_README.md"
PREVIOUS = "previous"
"""Inside the record: the record of the edit that the base itself came from."""
EDIT_FORMAT = "cdelta.edit.2"
REMEDY = "make the edited checkpoint again"
LOST = "fetch that file again, or use the base itself"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".npz", ".safetensors")
"""Files that would carry the unedited weights along."""


def save_edited(
    base_path: str | Path,
    delta: WeightDelta,
    out: str | Path,
    scale: float | None = None,
    force: bool = False,
    selectivity: Sequence[Mapping[str, object]] = (),
) -> Path:
    """Write the checkpoint θ + scale·ΔΘ_C, with at most one tensor and the delta in memory.

    Files without a changed tensor are hard links of the base's (copies across file systems); in the
    others only the mask's entries differ. `out` appears whole or not at all.

    Args:
        base_path: checkpoint folder of the base.
        delta: what to add.
        out: new folder.
        scale: k; by default the delta's own.
        force: apply to a base that the delta was not made for, if its parameters have the shapes.
        selectivity: rows of the model card's table.

    Raises `CdeltaError` on a wrong base, damaged files, an existing `out`, or a disk that is full
    or read-only.
    """
    k = delta.scale_or_own(scale)
    base = Checkpoint(base_path)
    delta.check_shapes(base.shapes)
    base_hash = model_hash(base.folder) if force else delta.check_base(base.folder)
    originals: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        """Change a parameter, and keep its entries as they were."""
        originals[name] = delta.add_to(name, tensor, k).contiguous()

    with new_folder(out) as folder:
        _write_files(base, folder, delta, add)
        delta = delta.with_metadata(**published_facts(delta.metadata, base.folder))
        facts = {"scale": k, "base_hash": base_hash, "metadata": delta.metadata}
        _write_record(base.folder, folder, delta, originals, facts)
        write_text(folder / CARD, model_card(delta, k, selectivity, base.folder))
    return Path(out)


def revert(edited: str | Path, delta: WeightDelta, out: str | Path, force: bool = False) -> bool:
    """Write the base of an edited folder, and of the delta that was added last, into the new folder
    `out`.

    Returns True if it is the base bit for bit: the folder recorded its original entries. Without a
    record, and only with ``force=True``, the delta is subtracted at its own scale, which is exact
    only up to rounding (returns False).

    Raises `WrongBase` for another delta than the last, `CdeltaError` on damaged files.
    """
    source = Checkpoint(edited)
    delta.check_shapes(source.shapes)
    record = read_record(edited)
    if record is None or record["delta_hash"] != delta.hash():
        if not force:
            raise WrongBase(
                f"{edited} does not record this delta as its last edit: pass that delta, "
                "or force a subtraction (--force)."
            )
        save_edited(edited, delta, out, scale=-delta.k, force=True)
        return False
    kept = source.folder / RECORD
    originals = _original_entries(kept / ORIGINAL, record["original_sha256"], delta)
    for place, sha256 in record["files"].items():
        path = source.folder / place
        if not path.is_file() or file_hash(path) != sha256:
            raise CdeltaError(
                f"{edited}: {place} was changed after the edit, so reverting does not give the "
                "base back: restore that file, or use the base itself."
            )
    with new_folder(out) as folder:
        _write_files(
            source, folder, delta, lambda name, t: put(t, *delta.slices[name], originals[name])
        )
        if (kept / BASE_CARD).is_file():
            shutil.copyfile(kept / BASE_CARD, folder / CARD)
        if (kept / PREVIOUS).is_dir():
            shutil.copytree(kept / PREVIOUS, folder / RECORD)
        if model_hash(folder) != record["base_hash"]:
            raise CdeltaError(
                f"{edited} was changed after the edit, so reverting does not give its base back: "
                "keep the base itself."
            )
    return True


# ---------------------------------------------------------------------- files


def carried_files(folder: Path) -> list[Path]:
    """Files that an edit takes over unchanged: configuration, tokenizer, templates, licence."""
    return [place for place in runtime_files(folder) if place.suffix not in OTHER_WEIGHTS]


def runtime_files(folder: Path) -> Iterator[Path]:
    """Everything that a runtime might read: no model card, no record of an edit, nothing hidden.

    Relative paths, sorted.
    """
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in place.parts)
        if path.is_file() and not hidden and place.parts[0] not in (RECORD, CARD):
            yield place


def _write_files(
    base: Checkpoint, out: Path, delta: WeightDelta, change: Callable[[str, Tensor], None]
) -> None:
    """Copy the files that hold parameters of the delta, and call ``change(name, tensor)`` for each
    of these; link the other shards; copy `carried_files`.
    """
    changes: dict[str, dict] = defaultdict(dict)
    for name in delta.values:
        key = base.key_of[name]
        changes[base.file_of[key]][key] = partial(change, name)
    for file in base.shards:
        if file in changes:
            shutil.copyfile(base.folder / file, out / file)
            rewrite_tensors(out / file, changes[file])
            continue
        try:
            os.link((base.folder / file).resolve(), out / file)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(base.folder / file, out / file)
    for place in carried_files(base.folder):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / place, out / place)


# ---------------------------------------------------------------------- the record


def read_record(edited: str | Path) -> dict[str, Any] | None:
    """What `save_edited` noted in an edited folder, or None. Raises `CdeltaError` if damaged."""
    path = Path(edited) / RECORD / EDIT
    if not path.is_file():
        return None
    record = read_sealed(path, REMEDY)
    if record.get("format") != EDIT_FORMAT:
        raise CdeltaError(f"{path} was written by another version of cdelta: {REMEDY}.")
    return record


def _write_record(
    base: Path,
    out: Path,
    delta: WeightDelta,
    originals: Mapping[str, Tensor],
    facts: Mapping[str, object],
) -> None:
    record = out / RECORD
    record.mkdir()
    kept = carried_files(out)
    if (base / CARD).is_file():
        shutil.copyfile(base / CARD, record / BASE_CARD)
        kept.append(Path(RECORD, BASE_CARD))
    if (base / RECORD).is_dir():
        shutil.copytree(base / RECORD, record / PREVIOUS)
    save_file(dict(originals), record / ORIGINAL)
    content = {
        **facts,
        "delta_hash": delta.hash(),
        "mask_hash": delta.mask_hash(),
        "files": {str(place): file_hash(out / place) for place in kept},
        "format": EDIT_FORMAT,
        "cdelta": cdelta.__version__,
        "original_sha256": file_hash(record / ORIGINAL),
    }
    write_text(record / EDIT, sealed(content))


def _original_entries(path: Path, sha256: str, delta: WeightDelta) -> dict[str, Tensor]:
    if not path.is_file():
        raise CdeltaError(f"{path} is missing: {LOST}.")
    try:
        if file_hash(path) != sha256:
            raise ValueError("its checksum is another")
        originals = load_file(path)
        if originals.keys() != delta.values.keys():
            raise ValueError("it holds other parameters")
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error, LOST) from error
    return originals


# ---------------------------------------------------------------------- the model card


def model_card(
    delta: WeightDelta,
    scale: float,
    selectivity: Sequence[Mapping[str, object]],
    base_folder: str | Path,
) -> str:
    """The README.md: what was done, how selective it is, how to check and undo it, its limits.

    Args:
        delta: its metadata names base, revision, licence, mask and category.
        scale: the k that was applied.
        selectivity: rows of a table of measurements, see `markdown_table`.
        base_folder: whose licence entries the card's front matter repeats.
    """
    facts, terms = delta.metadata, licence(base_folder)
    base = str(facts.get("base") or "unknown")
    if facts.get("licence"):
        terms.setdefault("license", str(facts["licence"]))
    return render(
        "card.md.j2",
        front=({"base_model": base} if base.count("/") == 1 else {}) | terms,
        base=base,
        facts=facts,
        terms=terms,
        mask=facts.get("mask") or {},
        count=delta.count(),
        scale=scale,
        mask_hash=delta.mask_hash(),
        delta_hash=delta.hash(),
        version=cdelta.__version__,
        table=markdown_table(selectivity),
    )
