"""The report of a run, and recording a run into the repository. All pages work offline: no script,
font or style from elsewhere."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from cdelta.artifact.claims import claims_of, measure
from cdelta.artifact.numbers import as_number, rate_columns, readable
from cdelta.artifact.pages import notebook_body, without_places
from cdelta.artifact.presets import Preset
from cdelta.artifact.run import collect_figures, read_manifest, read_settings
from cdelta.artifact.stages import NAMES, clock, find_stage, load_notebook, read_stage
from cdelta.errors import CdeltaError
from cdelta.files import new_folder, remove_folder, write_text
from cdelta.paths import FIGURES, NOTEBOOKS, ORGANISM, RUNS

if TYPE_CHECKING:
    from nbformat import NotebookNode

HEADLINE = {
    "How it works": ("fig_idea",),
    "Before and after": ("tab_before_after",),
    "What each edit refuses": ("fig_matrix",),
    "Selectivity": ("fig_selectivity", "tab_selectivity"),
    "Over-refusal": ("fig_overrefusal", "tab_overrefusal"),
    "Capability": ("tab_tasks", "tab_perplexity", "tab_lengths", "tab_utility"),
    "How small the circuit can be": ("fig_budget",),
    "Refusal against side effects": ("fig_tradeoff",),
}
"""What the report shows first: title -> figures and tables, where the run has them."""
ROWS = 12
"""Rows of a table that are shown before it is folded."""


def write_report(run_dir: Path) -> Path:
    """Collect the figures, then write ``figures/report.html`` and a page per executed notebook."""
    collect_figures(run_dir)
    figures = run_dir / "figures"
    done = [name for name in NAMES if read_stage(run_dir, name)]
    for name in done:
        page = _notebook_page(name, run_dir / "notebooks" / f"{name}.ipynb")
        write_text(figures / "report" / f"{name}.html", page)
    report = figures / "report.html"
    write_text(report, _template("report.html.j2").render(_facts(run_dir, done)))
    return report


def _template(name: str):
    loader = PackageLoader("cdelta.artifact", "templates")
    return Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(name)


def _notebook_page(name: str, executed: Path) -> str:
    import nbformat

    body, style = notebook_body(nbformat.read(executed, as_version=4))
    back = '<p><a href="../report.html">report of the run</a></p>'
    return _template("page.html.j2").render(title=name, body=back + body, style=style)


def _facts(run_dir: Path, done: Sequence[str]) -> dict[str, Any]:
    """What the report's template fills in."""
    figures = run_dir / "figures"
    manifest = read_manifest(figures)
    items = {item["id"]: _prepared(figures, item) for item in manifest["items"]}
    wanted = {id for ids in HEADLINE.values() for id in ids} & set(items)
    verdicts = [measure(claim, figures) for claim in claims_of(manifest["preset"])]
    return {
        "title": f"C-ΔΘ: {manifest['preset']}",
        "name": manifest["preset"],
        "commit": manifest["commit"],
        "limit": ROWS,
        "verdicts": verdicts,
        "met": sum(verdict.met for verdict in verdicts),
        "headline": _headline(items),
        "parts": [_part(run_dir, name, items, wanted) for name in done],
        "benchmarks": _benchmarks(),
        "stages": _stage_rows(run_dir, done),
        **_subject(run_dir, read_settings(run_dir)),
    }


def _subject(run_dir: Path, settings: Preset | None) -> dict[str, Any]:
    """Model, categories, budget and seeds in words."""
    settings = settings or Preset()
    named = run_dir / "00_subject" / "model.json"
    subject = json.loads(named.read_text())["name"] if named.exists() else settings.model
    seeds = len(settings.seeds)
    return {
        "subject": subject,
        "embedded": settings.model == "organism",
        "categories": ", ".join(settings.categories),
        "budget": readable(settings.circuit.param_budget, percent=True),
        "seeds": "one seed" if seeds == 1 else f"{seeds} seeds",
    }


def _headline(items: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    sections = []
    for title, ids in HEADLINE.items():
        shown = [items[id] for id in ids if id in items]
        if shown:
            anchor = re.sub(r"\W+", "-", title.lower())
            sections.append({"title": title, "anchor": anchor, "shown": shown})
    return sections


def _part(
    run_dir: Path, name: str, items: dict[str, dict[str, Any]], above: set[str]
) -> dict[str, Any]:
    """One notebook's items that are not shown above."""
    own = [item for item in items.values() if item["notebook"] == name]
    facts = read_stage(run_dir, name) or {}
    return {
        "stage": name,
        "title": find_stage(name).title,
        "time": clock(facts["seconds"]),
        "shown": [item for item in own if item["id"] not in above],
        "above": [item["id"] for item in own if item["id"] in above],
    }


def _prepared(figures: Path, item: dict[str, Any]) -> dict[str, Any]:
    """An item of the manifest, tables with their rows as text."""
    if item["kind"] != "table":
        return item
    with (figures / f"{item['id']}.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    rates = rate_columns(header)
    shown = [[readable(c, h in rates) for h, c in zip(header, r, strict=True)] for r in rows]
    numeric = [_is_numeric([row[i] for row in rows]) for i in range(len(header))]
    names = [name.replace("_", " ") for name in header]
    return {**item, "rows": [names, *shown], "numeric": numeric}


def _benchmarks() -> list[dict[str, Any]]:
    """The repository's recorded measurements, which belong to no run (tests/benchmarks)."""
    found = []
    for path in sorted((FIGURES / "bench").glob("*.csv")):
        caption = f"Recorded in figures/bench by tests/benchmarks/run.py or {path.stem}.py."
        item = {"id": path.stem, "kind": "table", "caption": caption, "files": [], "title": ""}
        found.append(_prepared(path.parent, item))
    return found


def _is_numeric(cells: Sequence[str]) -> bool:
    given = [cell for cell in cells if cell]
    return bool(given) and all(as_number(cell) is not None for cell in given)


def _stage_rows(run_dir: Path, done: Sequence[str]) -> list[list[str]]:
    facts = [facts for name in done if (facts := read_stage(run_dir, name))]
    rows = [[f["stage"], clock(f["seconds"]), str(f["peak_memory_mb"])] for f in facts]
    total = clock(sum(f["seconds"] for f in facts))
    most = str(max((f["peak_memory_mb"] for f in facts), default=0))
    sums = ["sum of stages (some ran beside each other)", total, most]
    return [["stage", "time", "peak memory (MB)"], *rows, sums]


def aggregate(runs: Sequence[Path]) -> Path:
    """One table over several runs: model x category x method; returns its page in data/runs.

    Raises `CdeltaError` for a run without an evaluation.
    """
    import pandas as pd

    parts = []
    for run_dir in runs:
        path = run_dir / "figures" / "tab_selectivity.csv"
        if not path.exists():
            raise CdeltaError(f"run {run_dir.name} has no tab_selectivity: run its stage 05 first.")
        subject = _subject(run_dir, read_settings(run_dir))["subject"]
        parts.append(pd.read_csv(path).assign(run=run_dir.name, model=subject))
    table = pd.concat(parts, ignore_index=True)
    first = ["run", "model", "category", "method"]
    table = table[first + [column for column in table if column not in first]]
    folder = RUNS / "+".join(run_dir.name for run_dir in runs)
    remove_folder(folder)
    with new_folder(folder) as place:
        table.to_csv(place / "tab_models.csv", index=False)
        rates = rate_columns(table.columns)
        formats = {c: lambda v, share=c in rates: readable(v, share) for c in table.columns}
        rows = table.to_html(index=False, formatters=formats, border=0)
        body = f'<h1>Several runs</h1><div class="scroll">{rows}</div>'
        page = _template("page.html.j2").render(title=folder.name, body=body, style="")
        write_text(place / "report.html", page)
    return folder / "report.html"


# ---------------------------------------------------------------------- into the repository


def paired(name: str, executed: NotebookNode) -> NotebookNode:
    """The notebook for readers: inputs and metadata of the source, outputs of the run, nothing of
    the machine.

    Raises `CdeltaError` if the source changed since.
    """
    notebook = load_notebook(name)
    tags = [cell.metadata.get("tags", []) for cell in executed.cells]
    ran = [c for c, t in zip(executed.cells, tags, strict=True) if "injected-parameters" not in t]
    if [cell.source for cell in ran] != [cell.source for cell in notebook.cells]:
        raise CdeltaError(f"notebook {name} changed after it ran: run it again before --record.")
    for cell, done in zip(notebook.cells, ran, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return without_places(notebook)


def record(run_dir: Path, stages: Sequence[str], figures: Path | None) -> list[Path]:
    """Copy a run into the repository for commit; returns what was written.

    The executed notebooks of `stages`, the embedded model if stage 00 is among them and trained it,
    and, unless None is given for them, figures and report to the folder `figures`.
    """
    import nbformat

    written = []
    for name in stages:
        executed = nbformat.read(run_dir / "notebooks" / f"{name}.ipynb", as_version=4)
        written.append(NOTEBOOKS / f"{name}.ipynb")
        nbformat.write(paired(name, executed), written[-1])
    model = run_dir / NAMES[0] / "model"
    if NAMES[0] in stages and model.exists():
        written.append(_copy_folder(model, ORGANISM))
    if figures:
        written.append(_copy_folder(run_dir / "figures", figures))
    return written


def _copy_folder(source: Path, target: Path) -> Path:
    """`source` in the place of `target`, which is there or not, whole at any time."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, fresh)
    remove_folder(target)
    fresh.rename(target)
    return target
