"""A run's artifacts: where they are, and the only way in which stages write them.

A run lives in ``data/runs/<name>/``: one folder per stage, the executed notebooks, and ``figures/``
with its ``manifest.json``, which are copied from the finished stages. A stage writes into a hidden
folder that `Run.finish` renames, so a stage folder is either complete or absent. A stage that
starts takes the place of any that is still running: the older one's hidden folder is gone, and it
fails when it wants to publish. What a stage keeps in `RunReader.scratch` outlives a kill, until the
stage finishes. Works the same in JupyterLab and under papermill.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdelta.artifact.numbers import formats
from cdelta.artifact.presets import Preset, resolve
from cdelta.artifact.stages import (
    SETTINGS,
    VisibleSettings,
    find_stage,
    fingerprint,
    finished,
    needs,
    read_stage,
)
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, locked, read_json, remove_folder, write_json
from cdelta.memory import peak_memory
from cdelta.paths import ROOT, RUNS
from cdelta.settings import changed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
    name = find_stage(stage)
    folder = Path(run_dir) if run_dir else RUNS / preset
    settings = read_settings(folder) or resolve(preset, model, policy)
    discard(folder, name)
    return Run(name, settings, folder, device)


def write_settings(folder: Path, settings: Preset, **facts: object) -> None:
    """Keep what a run was asked for."""
    write_json(folder / SETTINGS, {"preset": asdict(settings), **facts})


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

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``: what was asked for, or for ``auto`` what is there."""
        from cdelta.models.loading import resolve_device

        return resolve_device(self._device).type

    def input(self, stage: str, name: str = "") -> Path:
        """The artifact `name` of an earlier, finished stage (its folder, without a name).

        Raises `CdeltaError` if it is not there, or is no longer what the stage wrote.
        """
        command = f"run ./run_all.sh --preset {self.preset.name} --only {stage[:2]}"
        facts = read_stage(self.folder, stage)
        if facts is None:
            raise CdeltaError(f"stage {stage} of {self.folder} is not finished: {command}.")
        path = self.folder / stage / name
        if not path.exists():
            wrote = ", ".join(sorted(p.name for p in path.parent.glob("*")))
            raise CdeltaError(f"stage {stage} has no '{name}': it wrote {wrote}.")
        for file, sha256 in facts.get("sha256", {}).items():
            own = self.folder / stage / file
            if own.is_relative_to(path) and not (own.is_file() and file_hash(own) == sha256):
                raise CdeltaError(
                    f"{own} is no longer what stage {stage} wrote: {command} --force."
                )
        return path

    def scratch(self, name: str) -> Path:
        """A folder for work that a restart of this stage, on the same settings and the same runs of
        earlier stages, goes on from.

        Processes that share a stage's work share the folder. It goes when the stage finishes; code
        is not part of its identity, so remove ``.scratch`` by hand after a change to what fills it.
        """
        needed = (self.folder / stage / "stage.json" for stage in needs(self.stage))
        texts = [
            json.dumps(asdict(self.preset), sort_keys=True),
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
        self._started = time.time() - self._worked_before()
        self._fingerprint = fingerprint(stage, settings)
        self._items: list[dict[str, Any]] = []
        self._work = self.folder / f".{stage}.{uuid.uuid4().hex[:8]}"
        self._work.mkdir(parents=True)

    def _worked_before(self) -> float:
        """Seconds of this stage's killed tries, each up to the last file that it kept."""
        mark, before = self.scratch(".") / "seconds", 0.0
        if mark.exists():
            last = max(path.stat().st_mtime for path in mark.parent.rglob("*"))
            before = float(mark.read_text()) + last - mark.stat().st_mtime
        mark.write_text(str(before))
        return before

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

        title = " ".join(figure.get_suptitle().split())
        pdf, png = self._record(id, "figure", ("pdf", "png"), caption, title)
        with plt.rc_context({"pdf.fonttype": 42}):
            figure.savefig(pdf, bbox_inches="tight", metadata={"CreationDate": None})
        figure.savefig(png, bbox_inches="tight", dpi=200, metadata={"Software": None})
        plt.close(figure)
        display(Image(data=png.read_bytes(), width=int(100 * figure.get_figwidth())))

    def table(self, id: str, table: pd.DataFrame, caption: str, digits: int = 3) -> None:
        """Save a table as CSV (full precision) and booktabs LaTeX under `id`, record it in the
        manifest and display it.

        An index is written only if it has a name.
        """
        from IPython.display import display

        csv, tex = self._record(id, "table", ("csv", "tex"), caption)
        shown = table.index.names != [None]
        table.to_csv(csv, index=shown, lineterminator="\n")
        latex = table.style.format(precision=digits, escape="latex")
        latex.format_index(escape="latex", axis=0).format_index(escape="latex", axis=1)
        # pandas would draw a new id for every run
        view = table.style.format(formats(table.columns, digits)).set_uuid(id)
        if not shown:
            latex.hide(axis="index")
            view.hide(axis="index")
        tex.write_text(latex.to_latex(hrules=True), encoding="utf-8")
        display(view)

    def page(self, id: str, page: str, caption: str) -> None:
        """Save an HTML page that needs no other file under `id`, record it in the manifest and name
        its place.
        """
        (path,) = self._record(id, "page", ("html",), caption)
        path.write_text(page, encoding="utf-8")
        print(f"{caption} Interactive, in the report and in figures/{path.name}.")

    def finish(self) -> None:
        """Publish the stage, then its figures. Until then nobody sees either."""
        self._check_current()
        others = [facts for facts in finished(self.folder) if facts["stage"] != self.stage]
        ids_of_others = {item["id"] for facts in others for item in facts["figures"]}
        if taken := ids_of_others & {item["id"] for item in self._items}:
            ids = ", ".join(sorted(taken))
            raise CdeltaError(
                f"stage {self.stage} reuses the ids {ids} of another stage: rename them."
            )
        files = [path for path in sorted(self._work.rglob("*")) if path.is_file()]
        hashes = {str(path.relative_to(self._work)): file_hash(path) for path in files}
        for item in self._items:
            item["sha256"] = {name: hashes[f"figures/{name}"] for name in item["files"]}
        facts = {
            "stage": self.stage,
            "preset": self.preset.name,
            "commit": commit(),
            "fingerprint": self._fingerprint,
            "seconds": round(time.time() - self._started, 1),
            "peak_memory_mb": round(peak_memory() / 2**20),
            "figures": self._items,
            "settings": asdict(self.preset),
            "sha256": hashes,
        }
        write_json(self._work / "stage.json", facts)
        remove_folder(self.folder / self.stage)
        self._work.rename(self.folder / self.stage)
        collect_figures(self.folder)
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

    def _record(
        self, id: str, kind: str, suffixes: tuple[str, ...], caption: str, title: str = ""
    ) -> list[Path]:
        """Add an item of the manifest; where its files go."""
        if any(item["id"] == id for item in self._items):
            raise CdeltaError(
                f"'{id}' was saved before in {self.stage}: give each figure and table its own id."
            )
        names = [f"{id}.{suffix}" for suffix in suffixes]
        item = {"id": id, "kind": kind, "notebook": self.stage, "files": names, "sha256": {}}
        self._items.append(item | {"title": title, "caption": caption})
        return [self.path(f"figures/{name}") for name in names]


# ---------------------------------------------------------------------- a run's folder


def collect_figures(folder: Path) -> None:
    """Make a run's ``figures/`` hold what its finished stages wrote, with ``manifest.json``."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    with locked(folder / ".figures.lock"):
        items = [item for facts in finished(folder) for item in facts["figures"]]
        for old in figures.glob("*.*"):
            if old.is_file() and old.name != "report.html":
                old.unlink()
        for item in items:
            for file in item["files"]:
                shutil.copy2(folder / item["notebook"] / "figures" / file, figures)
        manifest = {"preset": folder.name, "commit": commit(), "items": items}
        write_json(figures / "manifest.json", manifest)


def read_manifest(figures: Path) -> dict[str, Any]:
    """The manifest of a figures folder, empty if there is none yet."""
    path = figures / "manifest.json"
    return read_json(path) if path.exists() else {"preset": "", "commit": "", "items": []}


def commit() -> str:
    """The repository's commit, short, with ``+changes`` if tracked files differ from it;
    ``unknown`` outside of git.
    """
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+changes"]
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def discard(folder: Path, stage: str) -> None:
    """Remove what an unfinished run of a stage left in a run's folder: hidden folders, and outdated
    artifacts and figures.

    A stage still at work in such a folder notices by its absence.
    """
    for left in (*folder.glob(f".{stage}.*"), *folder.glob(".trash.*")):
        remove_folder(left)
    if (folder / stage).exists() and not (folder / stage / "stage.json").exists():
        remove_folder(folder / stage)
        collect_figures(folder)


def reuse_stages(source: Path, target: Path, fingerprints: dict[str, str]) -> list[str]:
    """Take finished stages of another run whose outcome would be the same; returns their names.

    A stage is taken if its fingerprint is the wanted one and every stage that it reads is taken.
    """
    taken: list[str] = []
    for name, wanted in fingerprints.items():
        facts = read_stage(source, name) or {}
        if set(needs(name)) <= set(taken) and facts.get("fingerprint") == wanted:
            taken.append(name)
    places = [*taken, *(f"notebooks/{name}.ipynb" for name in taken), ".snakemake/metadata"]
    for place in places if taken else ():
        if (source / place).is_dir():
            shutil.copytree(source / place, target / place)
        elif (source / place).exists():
            (target / place).parent.mkdir(exist_ok=True)
            shutil.copy2(source / place, target / place)
    if taken:
        collect_figures(target)
    return taken
