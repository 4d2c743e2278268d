"""What a delta's folders say beside the numbers: which base it belongs to (the hash of its stored
bits, its public name and licence), JSON under a checksum, model cards.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Mapping, Sequence

import jinja2
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from cdelta.errors import CdeltaError, first_line
from cdelta.files import sorted_json
from cdelta.models.checkpoint import Checkpoint, is_pointer
from cdelta.state import add_tensors

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LICENCE_KEYS = ("license", "license_name", "license_link")
"""Entries of a model card's front matter that a derived model must repeat."""


class WrongBase(CdeltaError):
    """A delta meets a model that it was not made for."""


def model_hash(model_or_path) -> str:
    """sha256 over names, dtypes, shapes and bits of all parameters, tied ones once.

    A checkpoint folder and the model loaded from it in its own dtype have the same hash, however
    the folder is cut into files; the model in another dtype has another.
    """
    if isinstance(model_or_path, (str, Path)):
        tensors = Checkpoint(model_or_path).parameters()
    else:
        tensors = iter(sorted(model_or_path.named_parameters()))
    digest = hashlib.sha256()
    add_tensors(digest, tensors)
    return digest.hexdigest()


# ---------------------------------------------------------------------- names and licences


def base_facts(model) -> dict[str, str | None]:
    """What a delta records of the model in memory that it is fitted on.

    ``base_hash`` is the hash of the folder that the model was loaded from, so that it does not
    depend on the dtype or device of the fit; of a model that has no folder, its own. ``base``,
    ``base_revision`` and ``licence`` are as `folder_facts` says.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if name and (Path(name) / "config.json").is_file():
        return {**folder_facts(name), "base_hash": model_hash(name)}
    return {
        "base": public_name(name)[0],
        "base_revision": getattr(model.config, "_commit_hash", None),
        "licence": None,
        "base_hash": model_hash(model),
    }


def folder_facts(folder: str | Path) -> dict[str, str | None]:
    """``base``, ``base_revision`` and ``licence`` of a checkpoint folder; no local path."""
    base, revision = public_name(folder)
    return {"base": base, "base_revision": revision, "licence": licence(folder).get("license")}


def published_facts(
    metadata: Mapping[str, object], folder: str | Path | None = None
) -> dict[str, object]:
    """`folder_facts` as a delta's metadata has them, else as its base's folder does."""
    found = folder_facts(folder) if folder else {}
    recorded = dict(metadata)
    if metadata.get("base"):
        recorded["base"], revision = public_name(str(metadata["base"]))
        recorded["base_revision"] = metadata.get("base_revision") or revision
    return {k: recorded.get(k) or found.get(k) for k in ("base", "base_revision", "licence")}


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


# ---------------------------------------------------------------------- JSON under a checksum


def damaged(path: Path, reason: BaseException, remedy: str) -> CdeltaError:
    """The error of a file that cannot be used, in one sentence."""
    if is_pointer(path):
        return CdeltaError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there.")
    return CdeltaError(f"{path} is damaged ({first_line(reason)}): {remedy}.")


def sealed(content: Mapping[str, object]) -> str:
    """The text of a JSON file that holds `content` and its sha256, so that no bit of it can change
    unnoticed.
    """
    digest = hashlib.sha256(sorted_json(content).encode()).hexdigest()
    return sorted_json({**content, "sha256": digest})


def read_sealed(path: Path, remedy: str, unsealed: Sequence[str] = ()) -> dict[str, Any]:
    """What the file holds beside its checksum; one of an `unsealed` format need not have one.

    Raises `CdeltaError` for anything that `sealed` did not write.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        content.pop("sha256", None)
        if content.get("format") not in unsealed and text != sealed(content):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error, remedy) from error
    return content


# ---------------------------------------------------------------------- texts


def render(template: str, **values: object) -> str:
    """A template of this package, filled in; a name that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.get_template(template).render(**values)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a table; fractions with three digits, and beside a value the interval that follows it
    as ``low`` and ``high`` or ``NAME_low`` and ``NAME_high``.
    """
    shown = [_with_intervals(row) for row in rows]
    if not shown:
        return ""
    lines = [list(shown[0]), ["---"] * len(shown[0]), *(list(row.values()) for row in shown)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_intervals(row: Mapping[str, object]) -> dict[str, str]:
    shown: dict[str, str] = {}
    last = ""
    for name, value in row.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
        if name in ("low", f"{last}_low"):
            shown[last] += f" [{text}, "
        elif name in ("high", f"{last}_high"):
            shown[last] += f"{text}]"
        else:
            shown[name], last = text, name
    return shown
