"""The base again, from an edited folder and the delta that was added last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file

from cdelta.delta.apply import (
    BASE_CARD,
    ORIGINAL,
    PREVIOUS,
    RECORD,
    check_fits,
    copy_other_files,
    copy_weights,
    read_record,
    rewrite,
    save_edited,
)
from cdelta.delta.base import CARD, WrongBase, damaged, model_hash
from cdelta.delta.weight_delta import WeightDelta, put
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, new_folder
from cdelta.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "fetch that file again, or use the base itself"


def revert(edited: str | Path, delta: WeightDelta, out: str | Path, force: bool = False) -> bool:
    """Write the base into the new folder `out`.

    Returns True if it is the base bit for bit: the folder recorded its original entries. Without a
    record, and only with ``force=True``, the delta is subtracted at its own scale, which is exact
    only up to rounding (returns False).

    Raises `WrongBase` for another delta than the last, `CdeltaError` on damaged files.
    """
    source = Checkpoint(edited)
    check_fits(source, delta)
    record = read_record(edited)
    if record is None or record["delta_hash"] != delta.hash():
        if not force:
            raise WrongBase(
                f"{edited} does not record this delta as its last edit: pass that delta, "
                "or force a subtraction (--force)."
            )
        save_edited(edited, delta, out, scale=-delta.k, force=True)
        return False
    originals = _original_entries(Path(edited), record["original_sha256"], delta)
    changed = [
        place
        for place, sha256 in record["files"].items()
        if not (source.folder / place).is_file() or file_hash(source.folder / place) != sha256
    ]
    if changed:
        raise CdeltaError(
            f"{edited}: {changed[0]} was changed after the edit, so reverting does not give the "
            "base back: restore that file, or use the base itself."
        )

    def restore(name: str, tensor: Tensor) -> None:
        put(tensor, *delta.slices[name], originals[name])

    with new_folder(out) as folder:
        copy_weights(source, folder, delta)
        rewrite(source, folder, delta, restore)
        copy_other_files(source, folder)
        _restore_record(Path(edited) / RECORD, folder)
        if model_hash(folder) != record["base_hash"]:
            raise CdeltaError(
                f"{edited} was changed after the edit, so reverting does not give its base back: "
                "keep the base itself."
            )
    return True


def _original_entries(edited: Path, sha256: object, delta: WeightDelta) -> dict[str, Tensor]:
    path = edited / RECORD / ORIGINAL
    if not path.is_file():
        raise CdeltaError(f"{path} is missing: {REMEDY}.")
    if file_hash(path) != sha256:
        raise damaged(path, "its checksum is another", REMEDY)
    try:
        originals = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error, REMEDY) from error
    if originals.keys() != delta.values.keys():
        raise damaged(path, "it holds other parameters", REMEDY)
    return originals


def _restore_record(record: Path, out: Path) -> None:
    """The base's own model card and record."""
    if (record / BASE_CARD).is_file():
        shutil.copyfile(record / BASE_CARD, out / CARD)
    if (record / PREVIOUS).is_dir():
        shutil.copytree(record / PREVIOUS, out / RECORD)
