"""The stages of a run, in order: what each reads, and when it must run again."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cdelta.artifact.presets import Preset, as_dict
from cdelta.errors import CdeltaError
from cdelta.paths import NOTEBOOKS, ORGANISM, ROOT

RECIPE = ("attribution", "circuit", "edit", "answers")
SUBJECT = ("model", "revision", "policy", "categories")


@dataclass(frozen=True)
class Stage:
    """One notebook: the earlier stages whose artifacts it reads, and the settings that it reads."""

    name: str
    """``NN_title``, as the notebook and the artifact folder are called."""
    needs: tuple[str, ...] = ()
    """Earlier stages, in order."""
    reads: tuple[str, ...] = ()
    """Fields and sections of the preset; a change of any other one does not redo the stage."""

    @property
    def source(self) -> Path:
        """The percent-format source of the notebook."""
        return NOTEBOOKS / f"{self.name}.py"

    @property
    def rule(self) -> str:
        """The name as a Snakemake rule: without its number."""
        return self.name[3:]


UP_TO_CIRCUIT = ("00_subject", "01_dataset", "02_attribution", "03_circuit")
UP_TO_EDIT = (*UP_TO_CIRCUIT, "04_edit")
METHOD = (*SUBJECT, *RECIPE, "seeds")
STAGES = (
    Stage("00_subject", (), ("organism", "data", "answers", *SUBJECT)),
    Stage(
        "01_dataset",
        ("00_subject",),
        (*SUBJECT, "external", "data", "answers", "edit", "attribution"),
    ),
    Stage(
        "02_attribution",
        ("00_subject", "01_dataset"),
        (*SUBJECT, "attribution", "answers", "study", "edit", "circuit"),
    ),
    Stage(
        "03_circuit",
        ("00_subject", "01_dataset", "02_attribution"),
        (*SUBJECT, "attribution", "circuit", "answers", "study"),
    ),
    Stage("04_edit", UP_TO_CIRCUIT, METHOD),
    Stage("05_evaluation", UP_TO_EDIT, (*METHOD, "data", "evaluation")),
    Stage("06_deployment", UP_TO_EDIT, (*METHOD, "data", "deployment")),
    Stage("07_composition", UP_TO_EDIT, (*METHOD, "data", "deployment")),
    Stage("08_cost", UP_TO_EDIT, (*METHOD, "data", "evaluation", "serving")),
    Stage("09_ablations", UP_TO_EDIT, (*METHOD, "data", "ablation")),
)
NAMES = tuple(stage.name for stage in STAGES)


def find_stage(text: str) -> Stage:
    """The stage with this number or name; raises `CdeltaError`."""
    for stage in STAGES:
        number = stage.name[:2]
        if text in (stage.name, number, stage.rule) or (
            text.isdigit() and int(text) == int(number)
        ):
            return stage
    raise CdeltaError(f"unknown stage '{text}': choose one of {', '.join(NAMES)}.")


def with_needed(names: Iterable[str]) -> list[str]:
    """`names` and all stages that they read, directly or through others, in order."""
    wanted = set(names)
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return [name for name in NAMES if name in wanted]


class VisibleSettings:
    """A preset as one stage sees it: reading what the stage does not declare is an error, so that
    the fingerprint covers all that decides its outcome.
    """

    ALWAYS = ("name", "description", "threads", "resources")

    def __init__(self, preset: Preset, stage: str):
        self._preset, self._stage = preset, find_stage(stage)

    def __getattr__(self, name: str):
        parts = RECIPE if name == "recipe" else (name,)
        undeclared = sorted(set(parts) - {*self.ALWAYS, *self._stage.reads})
        if undeclared and hasattr(self._preset, name):
            raise CdeltaError(
                f"stage {self._stage.name} does not declare that it reads {', '.join(undeclared)}: "
                "add it in cdelta/artifact/stages.py."
            )
        return getattr(self._preset, name)


def fingerprint(stage: str, preset: Preset) -> str:
    """Hash of all that decides a stage's outcome, apart from the earlier stages.

    The notebook, the package modules that it imports (directly or through others), the settings
    that the stage reads, and the files of model and policy where it reads those. Neither the device
    nor who reads the result counts.
    """
    found = find_stage(stage)
    if not found.source.exists():
        raise CdeltaError(f"there is no notebook {found.source}: restore it from git.")
    values = {name: value for name, value in as_dict(preset).items() if name in found.reads}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in [found.source, *imported_modules(found.source)]:
        digest.update(path.name.encode() + path.read_bytes())
    for path in _files_read(found.name, preset):
        digest.update(content(path).encode())
    return digest.hexdigest()


def _files_read(stage: str, preset: Preset) -> list[Path]:
    """Files from outside of the run that a stage reads."""
    if stage == "00_subject":
        return [ORGANISM if preset.model == "organism" else Path(preset.model)]
    if stage == "01_dataset":
        return [Path(text.partition("=")[2] or text) for text in (preset.policy, *preset.external)]
    return []


def imported_modules(path: Path) -> list[Path]:
    """Files of this package that `path` imports, through any number of steps, sorted.

    Not the modules that only hold settings: their values count one by one.
    """
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        new = _imports(waiting.pop()) - found
        found |= new
        waiting += new
    settings = {"cdelta/artifact/presets.py", "cdelta/artifact/stages.py"}
    return sorted(found - {ROOT / name for name in settings})


@lru_cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this package that one file names; cached, since many stages share modules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    bases = [ROOT.joinpath(*name.split(".")) for name in names if name.split(".")[0] == "cdelta"]
    candidates = [f for base in bases for f in (base.with_suffix(".py"), base / "__init__.py")]
    return frozenset(file for file in candidates if file.exists())


LARGE = 2**26
"""Bytes from which on a file's size and time stand for its content."""


def content(path: Path) -> str:
    """Hash of a file or folder, or "" if there is none."""
    if not path.exists():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            state = file.stat()
            large = state.st_size >= LARGE
            seen = f"{state.st_size} {state.st_mtime_ns}".encode() if large else file.read_bytes()
            digest.update(file.name.encode() + seen)
    return digest.hexdigest()
