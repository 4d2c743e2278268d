"""Writing without half-written output: everything gets its own name only when it is complete."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tomllib
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping

from cdelta.errors import CdeltaError


def _hidden(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden sibling file to write into, which takes the place of `path` when the block succeeds
    and goes when it does not.

    The bytes are on the disk before the name is, so that a power cut leaves the old file or the new
    one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file's text, in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Replace a file by readable JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sorted_json(content: Mapping[str, object]) -> str:
    """Readable JSON that is the same, byte for byte, for equal contents."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """What a JSON file holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A hidden sibling folder to write into, renamed to `folder` when the block succeeds and
    removed when it does not.

    A process that is killed outright leaves the hidden folder (``.NAME.PID.partial``) for the next
    writer of `folder` to remove. Raises `CdeltaError` if `folder` already exists or cannot be
    written.
    """
    from safetensors import SafetensorError  # not at the top: settings need no tensors

    folder = Path(folder).absolute()
    if folder.exists():
        raise CdeltaError(
            f"{folder} already exists: choose a new output folder or remove it first."
        )
    partial = _hidden(folder)
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
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it vanishes at once, and its files after."""
    if folder.exists():
        trash = folder.with_name(f".trash.{uuid.uuid4().hex[:8]}")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex; the file is never whole in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock that the system frees when this process dies; without `wait`, raise
    BlockingIOError if taken.
    """
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
