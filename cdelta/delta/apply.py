"""From a weight delta to an ordinary checkpoint, streamed file by file.

An edited folder holds the base's files under the same names, the changed weights, a model card,
and the subfolder `cdelta/` with `edit.json` (what was added) and `original.safetensors` (the mask's
entries as they were), which makes a revert exact. Runtimes ignore that subfolder.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

from safetensors.torch import save_file

import cdelta
from cdelta.delta.base import CARD, published_facts
from cdelta.delta.card import model_card
from cdelta.delta.storage import read_json, sealed, unseal
from cdelta.delta.weight_delta import WeightDelta, model_hash, put, shifted, take
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, new_folder
from cdelta.models.checkpoint import Checkpoint, rewrite_tensors

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "cdelta"
EDIT, ORIGINAL, BASE_CARD = "edit.json", "original.safetensors", "base_README.md"
PREVIOUS = "previous"
"""Inside the record: the record of the edit that the base itself came from."""
EDIT_FORMAT = "cdelta.edit.2"
REMEDY = "make the edited checkpoint again"
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
    scale = delta.scale_or_own(scale)
    base = Checkpoint(base_path)
    check_fits(base, delta)
    base_hash = model_hash(base.folder) if force else delta.check_base(base.folder)
    facts = published_facts(delta.metadata, base.folder)
    with new_folder(out) as folder:
        originals = _write_weights(base, delta, scale, folder)
        copy_other_files(base, folder)
        _write_record(base.folder, folder, originals, {
            "scale": scale,
            "delta_hash": delta.hash(),
            "mask_hash": delta.mask_hash(),
            "base_hash": base_hash,
            "metadata": {**delta.metadata, **facts},
        })  # fmt: skip
        card = model_card(delta.with_metadata(**facts), scale, selectivity, base.folder)
        (folder / CARD).write_text(card, encoding="utf-8")
    return Path(out)


def check_fits(base: Checkpoint, delta: WeightDelta) -> None:
    """Raise `WrongBase` unless the checkpoint has the delta's parameters, in shapes that fit."""
    delta.check_shapes(base.shapes.get)


def read_record(edited: str | Path) -> dict | None:
    """What `save_edited` noted in an edited folder, or None. Raises `CdeltaError` if damaged."""
    path = Path(edited) / RECORD / EDIT
    if not path.is_file():
        return None
    record = read_json(path, REMEDY)
    unseal(path, record, REMEDY)
    if record.get("format") != EDIT_FORMAT:
        raise CdeltaError(f"{path} was written by another version of cdelta: {REMEDY}.")
    return record


def carried_files(folder: Path) -> Iterator[Path]:
    """Files that an edit takes over unchanged: configuration, tokenizer, templates, licence.

    Relative paths, sorted; no weights, no model card, no record of an edit, nothing hidden.
    """
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in place.parts)
        own = place.parts[0] in (RECORD, CARD)
        if path.is_file() and path.suffix not in OTHER_WEIGHTS and not hidden and not own:
            yield place


def copy_weights(base: Checkpoint, out: Path, delta: WeightDelta) -> None:
    """Copy the files that hold parameters of the delta; link the others."""
    touched = touched_files(base, delta)
    for file in base.shards:
        if file in touched:
            shutil.copyfile(base.folder / file, out / file)
        else:
            _link(base.folder / file, out / file)


def touched_files(base: Checkpoint, delta: WeightDelta) -> dict[str, list[str]]:
    """File -> the delta's parameters in it."""
    files: dict[str, list[str]] = {}
    for name in delta.values:
        files.setdefault(base.file_of[base.key_of[name]], []).append(name)
    return files


def rewrite(
    base: Checkpoint, out: Path, delta: WeightDelta, change: Callable[[str, Tensor], None]
) -> None:
    """Call ``change(name, tensor)`` for each of the delta's parameters in the files of `out`."""
    for file, names in touched_files(base, delta).items():
        changes = {base.key_of[name]: partial(change, name) for name in names}
        rewrite_tensors(out / file, changes)


def copy_other_files(base: Checkpoint, out: Path) -> None:
    """Copy `carried_files`."""
    for place in carried_files(base.folder):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / place, out / place)


def _write_weights(
    base: Checkpoint, delta: WeightDelta, scale: float, out: Path
) -> dict[str, Tensor]:
    """Copy the shards and add the delta; returns the entries as they were."""
    originals: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        dim, index = delta.slices[name]
        originals[name] = take(tensor, dim, index)
        put(tensor, dim, index, shifted(originals[name], delta.values[name], scale))

    copy_weights(base, out, delta)
    rewrite(base, out, delta, add)
    return originals


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _write_record(
    base: Path, out: Path, originals: Mapping[str, Tensor], facts: Mapping[str, object]
) -> None:
    record = out / RECORD
    record.mkdir()
    if (base / CARD).is_file():
        shutil.copyfile(base / CARD, record / BASE_CARD)
    if (base / RECORD).is_dir():
        shutil.copytree(base / RECORD, record / PREVIOUS)
    save_file(
        {name: entries.contiguous() for name, entries in originals.items()}, record / ORIGINAL
    )
    kept = [*carried_files(out), *(p.relative_to(out) for p in record.glob(BASE_CARD))]
    content = {
        **facts,
        "files": {str(place): file_hash(out / place) for place in kept},
        "format": EDIT_FORMAT,
        "cdelta": cdelta.__version__,
        "original_sha256": file_hash(record / ORIGINAL),
    }
    (record / EDIT).write_text(sealed(content), encoding="utf-8")
