"""Which base a delta belongs to: the hash of its stored bits, its public name and licence."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Mapping

import torch
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from cdelta.errors import CdeltaError, first_line
from cdelta.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LFS_POINTER = b"version https://git-lfs"
FACTS = ("base", "base_revision", "licence")
LICENCE_KEYS = ("license", "license_name", "license_link")
"""Entries of a model card's front matter that a derived model must repeat."""
HASHED_AT_ONCE = 1 << 24


class WrongBase(CdeltaError):
    """A delta meets a model that it was not made for."""


def model_hash(model_or_path) -> str:
    """sha256 over names, dtypes, shapes and bits of all parameters, tied ones once.

    A checkpoint folder and the model loaded from it in its own dtype have the same hash, however
    the folder is cut into files; the model in another dtype has another.
    """
    digest = hashlib.sha256()
    for name, tensor in _named_tensors(model_or_path):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        for chunk in tensor.detach().reshape(-1).split(HASHED_AT_ONCE):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_facts(model) -> dict[str, str | None]:
    """What a delta records of the model in memory that it is fitted on.

    ``base_hash`` is the hash of the folder that the model was loaded from, so that it does not
    depend on the dtype or device of the fit; of a model that has no folder, its own. ``base``,
    ``base_revision`` and ``licence`` are as `folder_facts` says.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if name and (Path(name) / "config.json").is_file():
        return {**folder_facts(name), "base_hash": model_hash(name)}
    revision = getattr(model.config, "_commit_hash", None)
    return {
        "base": public_name(name)[0],
        "base_revision": revision,
        "licence": None,
        "base_hash": model_hash(model),
    }


def folder_facts(folder: str | Path) -> dict[str, str | None]:
    """``base``, ``base_revision`` and ``licence`` of a checkpoint folder; no local path."""
    base, revision = public_name(folder)
    return {"base": base, "base_revision": revision, "licence": licence(folder).get("license")}


def published_facts(
    metadata: Mapping[str, object], folder: str | Path | None = None
) -> dict[str, str | None]:
    """`folder_facts` as a delta's metadata has them, else as its base's folder does."""
    found = folder_facts(folder) if folder else dict.fromkeys(FACTS)
    recorded = {key: metadata.get(key) for key in FACTS}
    if recorded["base"]:
        name, revision = public_name(str(recorded["base"]))
        recorded |= {"base": name, "base_revision": recorded["base_revision"] or revision}
    return {key: recorded[key] or found[key] for key in FACTS}


def public_name(path_or_id: str | Path) -> tuple[str, str | None]:
    """(name to publish, revision): the hub id of a cached snapshot, of any other folder its name.

    A hub id stays as it is; its revision is then unknown (None).
    """
    text = str(path_or_id)
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)", text)
    if cached:
        return cached[1].replace("--", "/", 1), cached[2]
    if HUB_ID.fullmatch(text) and not Path(text).exists():
        return text, None
    return re.split(r"[/\\]", str(Path(text).resolve()) if text else "")[-1], None


def licence(folder: str | Path) -> dict[str, str]:
    """The licence entries of the folder's model card; empty where it has none that can be read."""
    try:
        metadata = metadata_load(Path(folder) / CARD) or {}
    except (OSError, ValueError, YAMLError):
        return {}
    return {key: str(metadata[key]) for key in LICENCE_KEYS if metadata.get(key)}


def is_pointer(path: Path) -> bool:
    """Whether a file is the pointer that Git LFS leaves where the content was not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def damaged(path: Path, reason: BaseException | str, remedy: str) -> CdeltaError:
    """The error of a file that cannot be used, in one sentence."""
    if is_pointer(path):
        return CdeltaError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there.")
    return CdeltaError(f"{path} is damaged ({first_line(reason)}): {remedy}.")


def _named_tensors(model_or_path) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model_or_path, (str, Path)):
        return Checkpoint(model_or_path).parameters()
    return iter(sorted(model_or_path.named_parameters()))
