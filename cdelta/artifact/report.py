"""The report of a run, and recording a run into the repository. All pages work offline: no script, no font, no style from elsewhere."""

from __future__ import annotations

import csv
import html
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

from cdelta.artifact.execution import clock, load_notebook
from cdelta.artifact.run import check_figures, read_manifest, read_stage
from cdelta.artifact.stages import NAMES
from cdelta.errors import CdeltaError
from cdelta.paths import NOTEBOOKS, ORGANISM, ROOT

if TYPE_CHECKING:
    from nbformat import NotebookNode


CSS = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: 0.9rem; } td, th { padding: 0.15rem 0.7rem; text-align: right; }
thead { border-bottom: 1px solid #888; } pre { overflow-x: auto; background: #f6f6f6; padding: 0.6rem; font-size: 0.85rem; }
.prompt, .anchor-link { display: none; } .output_stderr pre { background: #fdecea; } figure { margin: 2rem 0; } figcaption { color: #555; }
.scroll { overflow-x: auto; } iframe { width: 100%; height: 48rem; border: 1px solid #ddd; }
"""


def write_report(run_dir: Path) -> Path:
    """Check the figures, then write ``figures/report.html`` (every figure and table) and a page per executed notebook."""
    check_figures(run_dir)
    figures = run_dir / "figures"
    pages = figures / "report"
    pages.mkdir(parents=True, exist_ok=True)
    done = [stage for stage in NAMES if read_stage(run_dir, stage)]
    for stage in done:
        (pages / f"{stage}.html").write_text(
            _notebook_page(stage, run_dir / "notebooks" / f"{stage}.ipynb"), encoding="utf-8"
        )
    report = figures / "report.html"
    report.write_text(_index_page(run_dir, done), encoding="utf-8")
    return report


def _page(title: str, body: str, style: str = "") -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{CSS}{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _notebook_page(stage: str, executed: Path) -> str:
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    notebook = without_places(nbformat.read(executed, as_version=4))
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    return _page(
        stage,
        f'<p><a href="../report.html">all figures and tables</a></p>{body}',
        HtmlFormatter().get_style_defs(".highlight"),
    )


def _index_page(run_dir: Path, done: Sequence[str]) -> str:
    manifest = read_manifest(run_dir / "figures")
    parts = [
        f"<h1>cdelta, preset {html.escape(manifest['preset'])}</h1><p>Commit {html.escape(manifest['commit'])}.</p>",
        _stage_table(run_dir, done),
    ]
    for stage in done:
        parts.append(f'<h2><a href="report/{stage}.html">{stage}</a></h2>')
        parts += [
            _item(run_dir / "figures", item)
            for item in manifest["items"]
            if item["notebook"] == stage
        ]
    return _page(f"cdelta {manifest['preset']}", "\n".join(parts))


def _stage_table(run_dir: Path, done: Sequence[str]) -> str:
    facts = [read_stage(run_dir, stage) for stage in done]
    rows = [
        ["stage", "time", "peak memory (MB)"],
        *([f["stage"], clock(f["seconds"]), str(f["peak_memory_mb"])] for f in facts),
    ]
    return _html_table(rows)


def _item(figures: Path, item: dict[str, Any]) -> str:
    links = ", ".join(f'<a href="{name}">{Path(name).suffix[1:]}</a>' for name in item["files"])
    caption = f"<figcaption><b>{html.escape(item['id'])}</b> ({links}): {html.escape(item['caption'])}</figcaption>"
    if item["kind"] == "figure":
        return f'<figure id="{item["id"]}"><img src="{item["id"]}.png" alt="{html.escape(item["caption"])}">{caption}</figure>'
    if item["kind"] == "page":
        return f'<figure id="{item["id"]}"><iframe src="{item["id"]}.html" title="{html.escape(item["caption"])}"></iframe>{caption}</figure>'
    with (figures / f"{item['id']}.csv").open(newline="", encoding="utf-8") as file:
        return f'<figure id="{item["id"]}"><div class="scroll">{_html_table(list(csv.reader(file)))}</div>{caption}</figure>'


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    row = lambda cells, tag: (
        "<tr>" + "".join(f"<{tag}>{html.escape(_short(cell))}</{tag}>" for cell in cells) + "</tr>"
    )
    return f"<table><thead>{row(rows[0], 'th')}</thead><tbody>{''.join(row(cells, 'td') for cells in rows[1:])}</tbody></table>"


def _short(cell: str) -> str:
    """Long decimal numbers to four significant digits; anything else as it is."""
    try:
        return f"{float(cell):.4g}" if "." in cell and len(cell) > 6 else cell
    except ValueError:
        return cell


def without_places(notebook: NotebookNode) -> NotebookNode:
    """A copy whose text names this machine's folders relative to the repository."""
    import nbformat

    return nbformat.reads(
        json.dumps(notebook).replace(f"{ROOT}/", "").replace(str(ROOT), "."), as_version=4
    )


def paired(stage: str, executed: NotebookNode) -> NotebookNode:
    """The notebook for readers: inputs and metadata of the source, outputs of the run, nothing of the machine.

    Raises `CdeltaError` if the source changed since.
    """
    notebook = load_notebook(stage)
    ran = [
        cell
        for cell in executed.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    if [cell.source for cell in ran] != [cell.source for cell in notebook.cells]:
        raise CdeltaError(f"notebook {stage} changed after it ran: run it again before --record.")
    for cell, done in zip(notebook.cells, ran):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return without_places(notebook)


def record(run_dir: Path, stages: Sequence[str], figures: Path | None) -> list[Path]:
    """Copy a run into the repository for commit; returns what was written.

    The executed notebooks of `stages`, the embedded model if stage 00 is among them and trained it, and, unless None is
    given for them, figures and report to the folder `figures`.
    """
    import nbformat

    written = []
    for stage in stages:
        executed = nbformat.read(run_dir / "notebooks" / f"{stage}.ipynb", as_version=4)
        written.append(NOTEBOOKS / f"{stage}.ipynb")
        nbformat.write(paired(stage, executed), written[-1])
    model = run_dir / "00_subject" / "model"
    if "00_subject" in stages and model.exists():
        written.append(_copy_folder(model, ORGANISM))
    if figures:
        written.append(_copy_folder(run_dir / "figures", figures))
    return written


def _copy_folder(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    return target
