"""From a weight delta to an ordinary checkpoint: streaming apply, proof that nothing else changed, revert, LoRA export, model card.

An edited folder holds the base's files under the same names, the changed weights, a model card, and the subfolder `cdelta/` with
`edit.json` (what was added) and `original.safetensors` (the mask's entries as they were), which makes a revert exact. Runtimes ignore it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Sequence

from safetensors.torch import load_file, save_file

import cdelta
from cdelta.delta.card import model_card
from cdelta.delta.weight_delta import (
    WeightDelta,
    WrongBase,
    check_scale,
    model_hash,
    put,
    shifted,
    take,
)
from cdelta.errors import CdeltaError
from cdelta.files import new_folder
from cdelta.models.checkpoint import Checkpoint, rewrite_tensors

if TYPE_CHECKING:
    from torch import Tensor


RECORD = "cdelta"
EDIT, ORIGINAL, BASE_CARD, CARD = "edit.json", "original.safetensors", "base_README.md", "README.md"
PREVIOUS = "previous"
"""Inside the record: the record of the edit that the base itself came from."""
OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".safetensors",
)
"""Files that would carry the unedited weights along."""


# ---------------------------------------------------------------------- apply and revert


def save_edited(
    base_path: str | Path,
    delta: WeightDelta,
    out: str | Path,
    scale: float = 1.0,
    force: bool = False,
    selectivity: Sequence[Mapping[str, object]] = (),
) -> Path:
    """Write the checkpoint θ + scale·ΔΘ_C, file by file, with at most one tensor and the delta in memory.

    Files without a changed tensor are hard links of the base's (copies across file systems); in the others only the mask's entries
    differ. `out` appears whole or not at all.

    Args:
        force: apply to a base that the delta was not made for, if its parameters have the right shapes.
        selectivity: rows of the model card's table.

    Raises `CdeltaError` on a wrong base, damaged files, an existing `out`, or a disk that is full or read-only.
    """
    check_scale(scale)
    base = Checkpoint(base_path)
    check_fits(base, delta)
    if not force:
        delta.check_base(base.folder)
    with new_folder(out) as partial:
        originals = _write_weights(base, delta, scale, partial)
        _link_other_files(base, partial)
        _write_record(base.folder, partial, delta, scale, originals)
        (partial / CARD).write_text(model_card(delta, scale, selectivity), encoding="utf-8")
    return Path(out)


def revert(edited: str | Path, delta: WeightDelta, out: str | Path, force: bool = False) -> bool:
    """Write the base again, from an edited folder and the delta that was added last.

    Returns True if it is the base bit for bit: the folder recorded its original entries. Without a record, and only with ``force=True``,
    the delta is subtracted at scale 1, which is exact only up to rounding (returns False).
    """
    source = Checkpoint(edited)
    check_fits(source, delta)
    record = read_record(edited)
    if record is None or record["delta_hash"] != delta.hash():
        if not force:
            raise WrongBase(
                f"{edited} does not record this delta as its last edit: pass that delta, or force a subtraction."
            )
        save_edited(edited, delta, out, scale=-1.0, force=True)
        return False
    originals = load_file(Path(edited) / RECORD / ORIGINAL)
    with new_folder(out) as partial:
        _copy_weights(source, partial, delta)
        _rewrite(
            source,
            partial,
            delta,
            lambda name, tensor: put(tensor, *delta.slices[name], originals[name]),
        )
        _link_other_files(source, partial)
        _restore_record(Path(edited) / RECORD, partial)
        if record["base_hash"] is not None and model_hash(partial) != record["base_hash"]:
            raise CdeltaError(
                f"{edited} was changed after the edit, so reverting does not give its base back: keep the base itself."
            )
    return True


def check_fits(base: Checkpoint, delta: WeightDelta) -> None:
    """Raise `WrongBase` unless the checkpoint has the delta's parameters, in shapes that fit."""
    delta.check_shapes(lambda name: base.shape(base.key_of[name]) if name in base.key_of else None)


def read_record(edited: str | Path) -> dict | None:
    """What `save_edited` noted in an edited folder, or None."""
    path = Path(edited) / RECORD / EDIT
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise CdeltaError(
            f"{path} is damaged ({error}): make the edited checkpoint again."
        ) from error


def _write_weights(
    base: Checkpoint, delta: WeightDelta, scale: float, out: Path
) -> dict[str, Tensor]:
    """Copy the shards and add the delta; returns the entries as they were."""
    originals: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        originals[name] = take(tensor, *delta.slices[name])
        put(tensor, *delta.slices[name], shifted(originals[name], delta.values[name], scale))

    _copy_weights(base, out, delta)
    _rewrite(base, out, delta, add)
    return originals


def _rewrite(base: Checkpoint, out: Path, delta: WeightDelta, change) -> None:
    for file, names in _touched(base, delta).items():
        rewrite_tensors(
            out / file,
            {base.key_of[name]: lambda tensor, name=name: change(name, tensor) for name in names},
        )


def _touched(base: Checkpoint, delta: WeightDelta) -> dict[str, list[str]]:
    """File -> the delta's parameters in it."""
    files: dict[str, list[str]] = {}
    for name in delta.values:
        files.setdefault(base.file_of[base.key_of[name]], []).append(name)
    return files


def _copy_weights(base: Checkpoint, out: Path, delta: WeightDelta) -> None:
    touched = _touched(base, delta)
    for file in base.shards:
        if file in touched:
            shutil.copyfile(base.folder / file, out / file)
        else:
            _link(base.folder / file, out / file)


def _link_other_files(base: Checkpoint, out: Path) -> None:
    """Configuration, tokenizer and the like; no second set of weights, no model card."""
    for path in sorted(base.folder.iterdir()):
        if (
            path.is_file()
            and path.suffix not in OTHER_WEIGHTS
            and not path.name.startswith(".")
            and path.name != CARD
        ):
            shutil.copyfile(path, out / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _write_record(
    base: Path, out: Path, delta: WeightDelta, scale: float, originals: Mapping[str, Tensor]
) -> None:
    (out / RECORD).mkdir()
    if (base / CARD).is_file():
        shutil.copyfile(base / CARD, out / RECORD / BASE_CARD)
    if (base / RECORD).is_dir():
        shutil.copytree(base / RECORD, out / RECORD / PREVIOUS)
    save_file({name: t.contiguous() for name, t in originals.items()}, out / RECORD / ORIGINAL)
    facts = {
        "scale": scale,
        "delta_hash": delta.hash(),
        "mask_hash": delta.mask_hash(),
        "base_hash": delta.metadata.get("base_hash"),
    }
    content = facts | {"cdelta": cdelta.__version__, "metadata": delta.metadata}
    (out / RECORD / EDIT).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _restore_record(record: Path, out: Path) -> None:
    """The base's own model card and record."""
    if (record / BASE_CARD).is_file():
        shutil.copyfile(record / BASE_CARD, out / CARD)
    if (record / PREVIOUS).is_dir():
        shutil.copytree(record / PREVIOUS, out / RECORD)
