"""A run's artifacts: where they are, and the only way in which stages write them.

A run lives in ``data/runs/<name>/``: one folder per stage, ``figures/`` with its ``manifest.json``,
and the executed notebooks. A stage writes into a hidden folder that `Run.finish` renames, so a
stage folder is either complete or absent. A stage that starts takes the place of any that is still
running: the older one's hidden folder is gone, and it fails when it wants to publish. What a stage
keeps in `RunReader.scratch` outlives a kill, until the stage finishes. Works the same in JupyterLab
and under papermill.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdelta.artifact.numbers import rate_columns, readable
from cdelta.artifact.presets import Preset, as_dict, resolve
from cdelta.artifact.stages import NAMES, VisibleSettings, find_stage
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, locked, read_json, remove_folder, write_json
from cdelta.memory import peak_memory
from cdelta.paths import ROOT, RUNS
from cdelta.settings import changed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STARTED = "CDELTA_STAGE_STARTED"
"""Environment variable: the epoch second at which the stage's process started."""
FINGERPRINT = "CDELTA_STAGE_FINGERPRINT"
"""Environment variable: the fingerprint of the stage, which `stage.json` keeps."""
SETTINGS = "run.json"
"""What a run was asked for, in its folder: the preset's values, the device, and the start."""


def open_run(
    stage: str,
    preset: str = "tiny",
    run_dir: str = "",
    device: str = "auto",
    model: str = "",
    policy: str = "",
) -> Run:
    """Start `stage`: a `Run` whose folder is published by `Run.finish`.

    The settings are those of the run's folder where the workflow wrote them, else the preset's.
    Raises `CdeltaError` for an unknown stage or preset.
    """
    name = find_stage(stage).name
    folder = Path(run_dir) if run_dir else RUNS / preset
    settings = read_settings(folder) or resolve(preset, model, policy)
    folder.mkdir(parents=True, exist_ok=True)
    discard(folder, name)
    return Run(name, settings, folder, device)


def write_settings(folder: Path, settings: Preset, **facts: object) -> None:
    """Keep what a run was asked for."""
    write_json(folder / SETTINGS, {"preset": as_dict(settings), **facts})


def read_settings(folder: Path) -> Preset | None:
    """The preset of a run's folder; None where the workflow has not written one."""
    path = folder / SETTINGS
    return changed(Preset(), read_json(path)["preset"]) if path.exists() else None


class RunReader:
    """What a stage has before it: its frozen `settings`, the run's `folder`, the artifacts of
    earlier stages, and a scratch folder.
    """

    def __init__(self, stage: str, settings: Preset, folder: Path, device: str = "auto"):
        self.stage, self.preset, self.folder = stage, settings, folder.resolve()
        self.settings = VisibleSettings(settings, stage)
        self._device = device

    @cached_property
    def device(self) -> str:
        """``cpu`` or ``cuda``: what was asked for, or for ``auto`` what is there."""
        import torch

        there = torch.cuda.is_available()
        if self._device == "cuda" and not there:
            raise CdeltaError(
                "device is cuda, but torch sees no GPU here: use --device cpu, "
                "or install torch with CUDA."
            )
        return "cuda" if self._device != "cpu" and there else "cpu"

    def input(self, stage: str, name: str = "") -> Path:
        """The artifact `name` of an earlier, finished stage (its folder, without a name).

        Raises `CdeltaError` if it is not there, or is no longer what the stage wrote.
        """
        folder = self.folder / stage
        if not (folder / "stage.json").exists():
            run = self.preset.name
            raise CdeltaError(
                f"stage {stage} of run '{run}' is not finished: "
                f"run ./run_all.sh --preset {run} --only {stage[:2]}."
            )
        path = folder / name
        if not path.exists():
            wrote = ", ".join(sorted(p.name for p in path.parent.glob("*")))
            raise CdeltaError(f"stage {stage} has no '{name}': it wrote {wrote}.")
        hashes = (read_stage(self.folder, stage) or {}).get("sha256", {})
        for file, sha256 in hashes.items():
            own = folder / file
            if own.is_relative_to(path) and not _unchanged(own, sha256):
                raise CdeltaError(
                    f"{own} is no longer what stage {stage} wrote: "
                    f"run ./run_all.sh --preset {self.preset.name} --only {stage[:2]} --force."
                )
        return path

    def scratch(self, name: str) -> Path:
        """A folder for work that a restart of this stage, on the same settings and the same runs of
        earlier stages, goes on from.

        Processes that share a stage's work share the folder. It goes when the stage finishes; code
        is not part of its identity, so remove ``.scratch`` by hand after a change to what fills it.
        """
        needed = (self.folder / stage / "stage.json" for stage in find_stage(self.stage).needs)
        texts = [
            json.dumps(as_dict(self.preset), sort_keys=True),
            *(path.read_text() for path in needed if path.exists()),
        ]
        identity = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        folder = self.folder / ".scratch" / f"{self.stage}-{identity}" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class Run(RunReader):
    """One stage at work."""

    def __init__(self, stage: str, settings: Preset, folder: Path, device: str):
        super().__init__(stage, settings, folder, device)
        self._started = float(os.environ.get(STARTED, time.time()))
        self._items: list[dict[str, Any]] = []
        self._work = self.folder / f".{stage}.{uuid.uuid4().hex[:8]}"
        self._work_figures = self._work / ".figures"
        self._work_figures.mkdir(parents=True)

    def path(self, name: str) -> Path:
        """Where to write the artifact `name` of this stage; its parent folder exists. Moves with
        `finish`.
        """
        self._check_current()
        path = self._work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def figure(self, id: str, figure: Figure, caption: str) -> None:
        """Save a figure as PDF and PNG under `id`, record it in the manifest with its title
        (the finding that it shows), and display it.
        """
        import matplotlib.pyplot as plt
        from IPython.display import Image, display

        pdf, png = self._files(id, "pdf", "png")
        with plt.rc_context({"pdf.fonttype": 42}):
            figure.savefig(pdf, bbox_inches="tight", metadata={"CreationDate": None})
        figure.savefig(png, bbox_inches="tight", dpi=200, metadata={"Software": None})
        plt.close(figure)
        found = " ".join(figure.get_suptitle().split())
        self._record(id, "figure", (pdf, png), caption, found)
        display(Image(data=png.read_bytes(), width=int(100 * figure.get_figwidth())))

    def table(self, id: str, table: pd.DataFrame, caption: str, digits: int = 3) -> None:
        """Save a table as CSV (full precision) and booktabs LaTeX under `id`, record it in the
        manifest and display it.

        An index is written only if it has a name.
        """
        from IPython.display import display

        shown = table.index.names != [None]
        csv, tex = self._files(id, "csv", "tex")
        table.to_csv(csv, index=shown, lineterminator="\n")
        tex.write_text(_latex(table, shown, digits), encoding="utf-8")
        self._record(id, "table", (csv, tex), caption)
        rates = rate_columns(table.columns)
        formats = {
            c: partial(readable, percent=str(c) in rates, digits=digits) for c in table.columns
        }
        view = table.style.format(formats).set_uuid(id)  # pandas would draw a new id for every run
        display(view if shown else view.hide(axis="index"))

    def page(self, id: str, page: str, caption: str) -> None:
        """Save an HTML page that needs no other file under `id`, record it in the manifest and name
        its place.
        """
        (path,) = self._files(id, "html")
        path.write_text(page, encoding="utf-8")
        self._record(id, "page", (path,), caption)
        print(f"{caption} Interactive, in the report and in figures/{path.name}.")

    def finish(self) -> None:
        """Publish the stage: its figures, then its folder. Until then nobody sees either."""
        self._check_current()
        facts = {
            "stage": self.stage,
            "preset": self.preset.name,
            "commit": commit(),
            "fingerprint": os.environ.get(FINGERPRINT, ""),
            "seconds": round(time.time() - self._started, 1),
            "peak_memory_mb": round(peak_memory() / 2**20),
            "items": [item["id"] for item in self._items],
            "settings": as_dict(self.preset),
            "sha256": {
                str(path.relative_to(self._work)): file_hash(path)
                for path in sorted(self._work.rglob("*"))
                if path.is_file() and not path.is_relative_to(self._work_figures)
            },
        }
        write_json(self._work / "stage.json", facts)
        _publish_items(self.folder, self.preset.name, self.stage, self._items, self._work_figures)
        self._work_figures.rmdir()
        final = self.folder / self.stage
        remove_folder(final)
        self._work.rename(final)
        for left in (self.folder / ".scratch").glob(f"{self.stage}-*"):
            remove_folder(left)
        print(
            f"{self.stage}: {facts['seconds']:.0f} s, peak memory {facts['peak_memory_mb']} MB, "
            f"{len(self._items)} figures and tables"
        )

    def _check_current(self) -> None:
        if not self._work.exists():
            raise CdeltaError(
                f"stage {self.stage} was finished or started again elsewhere: open the run again."
            )

    def _files(self, id: str, *suffixes: str) -> list[Path]:
        self._check_current()
        if any(item["id"] == id for item in self._items):
            raise CdeltaError(
                f"'{id}' was saved before in {self.stage}: give each figure and table its own id."
            )
        return [self._work_figures / f"{id}.{suffix}" for suffix in suffixes]

    def _record(
        self, id: str, kind: str, files: Sequence[Path], caption: str, title: str = ""
    ) -> None:
        item = {
            "id": id,
            "kind": kind,
            "notebook": self.stage,
            "files": [path.name for path in files],
            "sha256": {path.name: file_hash(path) for path in files},
            "title": title,
            "caption": caption,
        }
        self._items.append(item)


def _latex(table: pd.DataFrame, index: bool, digits: int) -> str:
    """Booktabs LaTeX."""
    style = table.style.format(precision=digits, escape="latex")
    style = style.format_index(escape="latex", axis=1)
    style = style.format_index(escape="latex", axis=0) if index else style.hide(axis="index")
    return style.to_latex(hrules=True, caption=None)


def _publish_items(
    folder: Path, name: str, stage: str, items: list[dict[str, Any]], files: Path | None = None
) -> None:
    """Replace a stage's items in the run's manifest, and their files by those in `files`."""
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    with locked(folder / ".figures.lock"):
        old = read_manifest(target)["items"]
        others = [item for item in old if item["notebook"] != stage]
        taken = sorted({item["id"] for item in others} & {item["id"] for item in items})
        if taken:
            raise CdeltaError(
                f"stage {stage} reuses the ids {', '.join(taken)} of another stage: rename them."
            )
        outdated = {f for item in old if item["notebook"] == stage for f in item["files"]}
        for file in outdated:
            (target / file).unlink(missing_ok=True)
        for path in sorted(files.iterdir()) if files else ():
            path.replace(target / path.name)
        known = [item for item in others + items if item["notebook"] in NAMES]
        ordered = sorted(known, key=lambda item: NAMES.index(item["notebook"]))
        manifest = {"preset": name, "commit": commit(), "items": ordered}
        write_json(target / "manifest.json", manifest)


def read_manifest(figures: Path) -> dict[str, Any]:
    """The manifest of a figures folder, empty if there is none yet."""
    path = figures / "manifest.json"
    if not path.exists():
        return {"preset": "", "commit": "", "items": []}
    return read_json(path)


def read_stage(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """What a finished stage records of itself, or None while it is not finished."""
    path = run_dir / stage / "stage.json"
    try:
        return read_json(path) if path.exists() else None
    except ValueError as error:
        raise CdeltaError(f"{path} is damaged ({error}): remove it and run again.") from error


def _unchanged(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    facts = path.stat()
    return _cached_hash(path, facts.st_size, facts.st_mtime_ns) == sha256


@cache
def _cached_hash(path: Path, size: int, mtime_ns: int) -> str:
    """A file's hash, computed once as long as the file looks the same."""
    return file_hash(path)


def check_figures(run_dir: Path) -> None:
    """Raise `CdeltaError` unless the figures folder holds exactly what its finished stages wrote,
    byte for byte.
    """
    figures = run_dir / "figures"
    items = read_manifest(figures)["items"]
    finished = [facts for name in NAMES if (facts := read_stage(run_dir, name))]
    written = {id for facts in finished for id in facts["items"]}
    recorded = {item["id"] for item in items}
    hashes = {name: digest for item in items for name, digest in item["sha256"].items()}
    files = {path.name for path in figures.glob("*") if path.is_file()}
    present = files - {"manifest.json", "report.html"}
    both = sorted(set(hashes) & present)
    changed_since = [name for name in both if file_hash(figures / name) != hashes[name]]
    problems = [
        *(f"{id} is missing" for id in sorted(written - recorded)),
        *(f"{id} is of no finished stage" for id in sorted(recorded - written)),
        *(f"{name} is missing" for name in sorted(set(hashes) - present)),
        *(f"{name} is in no manifest" for name in sorted(present - set(hashes))),
        *(f"{name} was changed after its stage" for name in changed_since),
    ]
    if problems:
        raise CdeltaError(
            f"{figures}: {'; '.join(problems)}. Run the stages concerned again with --force."
        )


def commit() -> str:
    """The repository's commit, short, with ``+changes`` if tracked files differ from it;
    ``unknown`` outside of git.
    """
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+changes"]
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def discard(folder: Path, stage: str) -> None:
    """Remove what an unfinished run of a stage left in a run's folder: hidden folders, and outdated
    artifacts and figures.

    A stage still at work in such a folder notices by its absence.
    """
    for left in (*folder.glob(f".{stage}.*"), *folder.glob(".trash.*")):
        remove_folder(left)
    manifest = read_manifest(folder / "figures")
    if not (folder / stage / "stage.json").exists():
        remove_folder(folder / stage)
        if any(item["notebook"] == stage for item in manifest["items"]):
            _publish_items(folder, manifest["preset"], stage, [])


def reuse_stages(source: Path, target: Path, fingerprints: dict[str, str]) -> list[str]:
    """Take finished stages of another run whose outcome would be the same; returns their names.

    A stage is taken if its fingerprint is the wanted one and every stage that it reads is taken.
    Files are hard links where the system has them: a stage's files never change once it is
    finished.
    """
    taken: list[str] = []
    manifest = read_manifest(source / "figures")
    for name, wanted in fingerprints.items():
        facts = read_stage(source, name)
        ready = set(find_stage(name).needs) <= set(taken)
        if not ready or not facts or facts.get("fingerprint") != wanted:
            continue
        items = [item for item in manifest["items"] if item["notebook"] == name]
        _link_tree(source / name, target / name)
        _link(source / "notebooks" / f"{name}.ipynb", target / "notebooks" / f"{name}.ipynb")
        files = target / f".figures.{name}"
        files.mkdir(parents=True)
        for item in items:
            for file in item["files"]:
                _link(source / "figures" / file, files / file)
        _publish_items(target, target.name, name, items, files)
        files.rmdir()
        taken.append(name)
    if taken and (source / ".snakemake" / "metadata").exists():
        metadata = Path(".snakemake", "metadata")
        shutil.copytree(source / metadata, target / metadata)  # no links: Snakemake writes there
    return taken


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str | Path, target: str | Path) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
