"""A run's artifacts: the only place that writes them.

A run lives in ``data/runs/<preset>/``: one folder per stage, ``figures/`` with its ``manifest.json``, and the executed
notebooks. A stage writes into a hidden folder that `Run.finish` renames, so a stage folder is either complete or absent.
A stage that starts takes the place of any that is still running: the older one's hidden folder is gone, and it fails
when it wants to publish. What a stage keeps in `Reader.scratch` outlives a kill, until the stage finishes. Works the same in JupyterLab and
under papermill.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

from cdelta.artifact.presets import Preset, as_dict, resolve
from cdelta.errors import CdeltaError
from cdelta.files import _remove, file_hash, locked, write_json
from cdelta.memory import peak_memory
from cdelta.paths import ROOT, RUNS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


STAGES = (
    "00_organism",
    "01_dataset",
    "02_attribution",
    "03_circuit",
    "04_edit",
    "05_evaluation",
    "06_deployment",
    "07_ablations",
)
STARTED = "CDELTA_STAGE_STARTED"
"""Environment variable with the epoch second at which the stage's process started (set by the workflow)."""


def open_run(
    stage: str,
    preset: str,
    run_dir: str = "",
    device: str = "auto",
    model: str = "",
    policy: str = "",
    produces: Sequence[str] = (),
) -> Run:
    """Start `stage`: a `Run` whose folder is published by `Run.finish`.

    `produces` names every figure and table of the stage; `finish` fails if one is missing or another one is there.
    Raises `CdeltaError` for an unknown stage or preset.
    """
    if stage not in STAGES:
        raise CdeltaError(f"unknown stage '{stage}': choose one of {', '.join(STAGES)}.")
    settings = resolve(preset, model, policy)
    folder = Path(run_dir) if run_dir else RUNS / preset
    folder.mkdir(parents=True, exist_ok=True)
    discard(folder, stage)
    return Run(stage, settings, folder, device, tuple(produces))


class Reader:
    """What a stage has before it: its frozen preset `settings`, the run's `folder`, the artifacts of earlier stages, and a scratch folder."""

    def __init__(self, stage: str, settings: Preset, folder: Path, device: str = "auto"):
        self.stage, self.settings, self.folder, self._device = (
            stage,
            settings,
            folder.resolve(),
            device,
        )

    @cached_property
    def device(self) -> str:
        """``cpu`` or ``cuda``: what was asked for, or for ``auto`` what is there."""
        import torch

        if self._device == "cuda" and not torch.cuda.is_available():
            raise CdeltaError(
                "device is cuda, but torch sees no GPU here: use --device cpu, or install torch with CUDA."
            )
        return "cuda" if self._device != "cpu" and torch.cuda.is_available() else "cpu"

    def input(self, stage: str, name: str = "") -> Path:
        """The artifact `name` of an earlier, finished stage (its folder, without a name)."""
        if not (self.folder / stage / "stage.json").exists():
            raise CdeltaError(
                f"stage {stage} of preset '{self.settings.name}' is not finished: run ./run_all.sh --preset {self.settings.name} --only {stage[:2]}."
            )
        path = self.folder / stage / name
        if not path.exists():
            raise CdeltaError(
                f"stage {stage} has no '{name}': it wrote {', '.join(sorted(p.name for p in path.parent.glob('*')))}."
            )
        return path

    def scratch(self, name: str) -> Path:
        """A folder for work that a restart of this stage, on the same settings and the same runs of earlier stages, goes on from.

        Processes that share a stage's work share the folder. It goes when the stage finishes; code is not part of its identity, so remove
        ``.scratch`` by hand after a change to what fills it.
        """
        earlier = [
            self.folder / stage / "stage.json" for stage in STAGES[: STAGES.index(self.stage)]
        ]
        parts = [
            json.dumps(as_dict(self.settings), sort_keys=True),
            *(path.read_text() for path in earlier if path.exists()),
        ]
        identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        folder = self.folder / ".scratch" / f"{self.stage}-{identity}" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class Run(Reader):
    """One stage at work."""

    def __init__(
        self, stage: str, settings: Preset, folder: Path, device: str, produces: tuple[str, ...]
    ):
        super().__init__(stage, settings, folder, device)
        self._produces = produces
        self._started = float(os.environ.get(STARTED, time.time()))
        self._items: list[dict[str, Any]] = []
        self._work = self.folder / f".{stage}.{uuid.uuid4().hex[:8]}"
        self._work_figures = self._work / ".figures"
        self._work_figures.mkdir(parents=True)

    def path(self, name: str) -> Path:
        """Where to write the artifact `name` of this stage; its parent folder exists. Moves with `finish`."""
        self._check_current()
        path = self._work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def figure(self, id: str, figure: Figure, caption: str) -> None:
        """Save a figure as PDF and PNG under `id`, record it in the manifest and display it."""
        import matplotlib.pyplot as plt
        from IPython.display import Image, display

        pdf, png = self._files(id, "pdf", "png")
        with plt.rc_context({"pdf.fonttype": 42}):
            figure.savefig(pdf, bbox_inches="tight", metadata={"CreationDate": None})
        figure.savefig(png, bbox_inches="tight", dpi=200, metadata={"Software": None})
        plt.close(figure)
        self._record(id, "figure", (pdf, png), caption)
        display(Image(data=png.read_bytes(), width=int(100 * figure.get_figwidth())))

    def table(self, id: str, table: pd.DataFrame, caption: str, digits: int = 3) -> None:
        """Save a table as CSV (full precision) and booktabs LaTeX under `id`, record it in the manifest and display it.

        An index is written only if it has a meaning, that is, unless it merely counts the rows.
        """
        import pandas as pd
        from IPython.display import display

        counts_rows = isinstance(table.index, pd.RangeIndex)
        csv, tex = self._files(id, "csv", "tex")
        table.to_csv(csv, index=not counts_rows, lineterminator="\n")
        style = table.style.format(precision=digits, escape="latex").format_index(
            escape="latex", axis=1
        )
        style = (
            style.hide(axis="index") if counts_rows else style.format_index(escape="latex", axis=0)
        )
        tex.write_text(style.to_latex(hrules=True, caption=None), encoding="utf-8")
        self._record(id, "table", (csv, tex), caption)
        view = table.style.format(precision=digits).set_uuid(
            id
        )  # pandas would draw a new id for every run
        display(view.hide(axis="index") if counts_rows else view)

    def page(self, id: str, page: str, caption: str) -> None:
        """Save an HTML page that needs no other file under `id`, record it in the manifest and say where it is."""
        (path,) = self._files(id, "html")
        path.write_text(page, encoding="utf-8")
        self._record(id, "page", (path,), caption)
        print(f"{caption} Interactive, in the report and in figures/{path.name}.")

    def finish(self) -> None:
        """Publish the stage: its figures, then its folder. Until then nobody sees either."""
        self._check_current()
        self._check_items()
        report = {
            "stage": self.stage,
            "preset": self.settings.name,
            "commit": commit(),
            "seconds": round(time.time() - self._started, 1),
            "peak_memory_mb": round(peak_memory() / 2**20),
            "items": [item["id"] for item in self._items],
            "settings": as_dict(self.settings),
        }
        write_json(self._work / "stage.json", report)
        _publish_items(self.folder, self.settings.name, self.stage, self._items, self._work_figures)
        self._work_figures.rmdir()
        final = self.folder / self.stage
        _remove(final)
        self._work.rename(final)
        for left in (self.folder / ".scratch").glob(f"{self.stage}-*"):
            _remove(left)
        print(
            f"{self.stage}: {report['seconds']:.0f} s, peak memory {report['peak_memory_mb']} MB, {len(self._items)} figures and tables"
        )

    def _check_current(self) -> None:
        if not self._work.exists():
            raise CdeltaError(
                f"stage {self.stage} was finished or started again elsewhere: open the run again."
            )

    def _check_items(self) -> None:
        made = [item["id"] for item in self._items]
        missing, undeclared = (
            sorted(set(self._produces) - set(made)),
            sorted(set(made) - set(self._produces)),
        )
        if missing or undeclared:
            parts = [f"did not produce {', '.join(missing)}"] * bool(missing) + [
                f"did not declare {', '.join(undeclared)}"
            ] * bool(undeclared)
            raise CdeltaError(
                f"stage {self.stage} {' and '.join(parts)}: correct `produces` of open_run, or the notebook."
            )

    def _files(self, id: str, *suffixes: str) -> list[Path]:
        self._check_current()
        if any(item["id"] == id for item in self._items):
            raise CdeltaError(
                f"'{id}' was saved before in {self.stage}: give each figure and table its own id."
            )
        return [self._work_figures / f"{id}.{suffix}" for suffix in suffixes]

    def _record(self, id: str, kind: str, files: Sequence[Path], caption: str) -> None:
        names = [path.name for path in files]
        hashes = {path.name: file_hash(path) for path in files}
        self._items.append(
            {
                "id": id,
                "kind": kind,
                "notebook": self.stage,
                "files": names,
                "sha256": hashes,
                "caption": caption,
            }
        )


def _publish_items(
    folder: Path, preset: str, stage: str, items: list[dict[str, Any]], files: Path | None = None
) -> None:
    """Replace a stage's items in the run's manifest, and their files by those in the folder `files`."""
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
        for name in {name for item in old if item["notebook"] == stage for name in item["files"]}:
            (target / name).unlink(missing_ok=True)
        for path in sorted(files.iterdir()) if files else ():
            path.replace(target / path.name)
        ordered = sorted(others + items, key=lambda item: STAGES.index(item["notebook"]))
        write_json(
            target / "manifest.json", {"preset": preset, "commit": commit(), "items": ordered}
        )


def read_manifest(figures: Path) -> dict[str, Any]:
    """The manifest of a figures folder, empty if there is none yet."""
    path = figures / "manifest.json"
    return (
        json.loads(path.read_text()) if path.exists() else {"preset": "", "commit": "", "items": []}
    )


def read_stage(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """What a finished stage says of itself, or None while it is not finished."""
    path = run_dir / stage / "stage.json"
    return json.loads(path.read_text()) if path.exists() else None


def check_figures(run_dir: Path) -> None:
    """Raise `CdeltaError` unless the figures folder holds exactly what its finished stages declared, byte for byte."""
    figures, problems = run_dir / "figures", []
    items = read_manifest(figures)["items"]
    declared = {
        id for stage in STAGES for id in (read_stage(run_dir, stage) or {"items": []})["items"]
    }
    recorded = {item["id"] for item in items}
    problems += [f"{id} is missing" for id in sorted(declared - recorded)]
    problems += [f"{id} is of no finished stage" for id in sorted(recorded - declared)]
    hashes = {name: digest for item in items for name, digest in item["sha256"].items()}
    present = {
        path.name
        for path in figures.glob("*")
        if path.is_file() and path.name not in ("manifest.json", "report.html")
    }
    problems += [f"{name} is missing" for name in sorted(set(hashes) - present)]
    problems += [f"{name} is in no manifest" for name in sorted(present - set(hashes))]
    problems += [
        f"{name} was changed after its stage"
        for name in sorted(set(hashes) & present)
        if file_hash(figures / name) != hashes[name]
    ]
    if problems:
        raise CdeltaError(
            f"{figures}: {'; '.join(problems)}. Run the stages concerned again with --force."
        )


def commit() -> str:
    """The repository's commit, with ``+changes`` if tracked files differ from it; ``unknown`` outside of git."""
    found = (
        subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    return found.stdout.strip() if found and found.returncode == 0 else "unknown"


def discard(folder: Path, stage: str) -> None:
    """Remove what an unfinished run of a stage left in a run's folder: hidden folders, and outdated artifacts and figures.

    A stage still at work in such a folder notices by its absence.
    """
    for left in (*folder.glob(f".{stage}.*"), *folder.glob(".trash.*")):
        _remove(left)
    manifest = read_manifest(folder / "figures")
    if not (folder / stage / "stage.json").exists():
        _remove(folder / stage)
        if any(item["notebook"] == stage for item in manifest["items"]):
            _publish_items(folder, manifest["preset"], stage, [])
