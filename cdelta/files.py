"""TODO files."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

from safetensors import SafetensorError

from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    pass
import fcntl
import uuid
from typing import TYPE_CHECKING, Any

pass
if TYPE_CHECKING:
    pass


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A hidden sibling folder to write into, renamed to `folder` when the block succeeds and removed when it does not.

    A process that is killed outright leaves the hidden folder (``.NAME.PID.partial``) for the next writer of `folder` to remove.
    Raises `CdeltaError` if `folder` already exists or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise CdeltaError(
            f"{folder} already exists: choose a new output folder or remove it first."
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        _remove_abandoned(folder)
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, folder)
    except (OSError, SafetensorError) as error:
        raise CdeltaError(
            f"cannot write {folder}: {getattr(error, 'strerror', None) or error}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what writers of `folder` that no longer run left behind."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock that the system frees when this process dies; without `wait`, raise BlockingIOError if taken."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _remove(folder: Path) -> None:
    """Remove a folder so that it vanishes at once, and its files after."""
    if folder.exists():
        trash = folder.with_name(f".trash.{uuid.uuid4().hex[:8]}")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
