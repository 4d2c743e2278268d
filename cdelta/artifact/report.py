"""The report of a run: one page, a page per executed notebook, and recording both into the
repository. All pages work offline: no script, font or style from elsewhere.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cdelta.artifact.claims import claims_of, measure
from cdelta.artifact.numbers import formats, page, read_table
from cdelta.artifact.presets import Preset
from cdelta.artifact.run import collect_figures, read_manifest, read_settings
from cdelta.artifact.stages import NAMES, clock, finished, heading, load_notebook
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, new_folder, read_json, remove_folder, write_json, write_text
from cdelta.paths import FIGURES, NOTEBOOKS, ORGANISM, ROOT, RUNS

if TYPE_CHECKING:
    from nbformat import NotebookNode

OWN_SOURCES = ("synthetic", "everyday")
"""Sources of prompts that are ours."""
PICTURE = "fig_seen"
"""The figure that shows prompts; notebook 01 has it."""
NOT_SHOWN = "<em>Not shown here: this picture holds prompts that are not ours to ship.</em>"
TEXTS = (".csv", ".tex", ".html")
ABOUT = {
    "determinism": "Two runs of three presets (every stage, one category, very little training), "
    "compared byte for byte: one on two nodes of Slurm with jobs killed on the way, one without, "
    "both on one machine (AMD EPYC). What differs holds times or memory. "
    "Recorded by tests/robustness/twice.py.",
    "faults": "Disturbed commands, and how many trials ended in which way: identical (the output "
    "is an undisturbed run's, byte for byte), refused (a sentence and no output; of a flipped bit: "
    "verify finds it) or lost. Recorded by tests/robustness/campaign.py, flips.py and stages.py.",
    "scale_estimates": "Predicted from the models' shapes, not measured; the rate behind the hours "
    "is assumed, and answers, made token by token, reach less of it. "
    "Recorded by tests/benchmarks/scale_estimates.py.",
}
"""Captions of recorded measurements that need more than where they come from."""
SHORT = 12
"""Prompts of fewer characters are everyone's."""
LONG = 20
"""Lines of a notebook's output from which on it is folded."""
MARKDOWN = re.compile(
    r"```.*?```|`[^`\n]*`"  # code stays as it is
    r"|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?![\w$])",
    re.DOTALL,
)
PRE = re.compile(r"<pre>(.*?)</pre>", re.DOTALL)


def write_report(run_dir: Path) -> Path:
    """Collect the figures, then write ``figures/report.html`` and a page per executed notebook."""
    import nbformat

    collect_figures(run_dir)
    figures = run_dir / "figures"
    manifest = read_manifest(figures)
    stages = finished(run_dir)
    for facts in stages:
        name = facts["stage"]
        body, style = notebook_body(nbformat.read(run_dir / "notebooks" / f"{name}.ipynb", 4))
        text = page("page.html.j2", title=name, body=body, style=style, back="../report.html")
        write_text(figures / "report" / f"{name}.html", text)
        facts.update(title=heading(name), time=clock(facts["seconds"]))
    text = page(
        "report.html.j2",
        manifest=manifest,
        subject=_subject(run_dir),
        settings=read_settings(run_dir) or Preset(),
        verdicts=[measure(claim, figures) for claim in claims_of(manifest["preset"])],
        items={item["id"]: item | _cells(figures, item["id"]) for item in manifest["items"]},
        stages=stages,
        total=clock(sum(facts["seconds"] for facts in stages)),
        benchmarks=_benchmarks(),
    )
    write_text(figures / "report.html", text)
    return figures / "report.html"


def _subject(run_dir: Path) -> str:
    """The name of a run's model."""
    named = run_dir / "00_subject" / "model.json"
    return (
        read_json(named)["name"] if named.exists() else (read_settings(run_dir) or Preset()).model
    )


def _benchmarks() -> list[dict[str, Any]]:
    """The repository's recorded measurements, which belong to no run (tests/benchmarks)."""
    folder = FIGURES / "bench"
    ids = sorted(path.stem for path in folder.glob("*.csv"))
    written = "Recorded in figures/bench by tests/benchmarks/run.py or {}.py."
    facts = {"kind": "table", "files": [], "title": ""}
    captions = {i: ABOUT.get(i, written.format(i)) for i in ids}
    return [facts | {"id": i, "caption": captions[i]} | _cells(folder, i) for i in ids]


def _cells(folder: Path, id: str) -> dict[str, Any]:
    """A table's ``header``, its ``rows`` as text, and which columns are ``numeric``."""
    table = read_table(folder / f"{id}.csv", keep_default_na=False, na_values=[""])
    numeric = [name in table.select_dtypes("number") for name in table]
    shown = table.astype(object).where(table.notna(), "")
    for name, form in formats(table.columns).items():
        shown[name] = shown[name].map(form)
    header = [name.replace("_", " ") for name in table]
    return {"header": header, "rows": shown.to_numpy().tolist(), "numeric": numeric}


def aggregate(runs: Sequence[Path]) -> Path:
    """One table over several runs, model x category x method; returns its page in data/runs, which
    names the runs that have no results.

    Raises `CdeltaError` if none has an evaluation.
    """
    tables = {place: read_table(place / "figures" / "tab_selectivity.csv") for place in runs}
    lacking = ", ".join(place.name for place, table in tables.items() if table.empty)
    parts = [
        table.assign(run=place.name, model=_subject(place))
        for place, table in tables.items()
        if len(table)
    ]
    if not parts:
        raise CdeltaError(f"no run has a tab_selectivity ({lacking}): run their stage 05 first.")
    table = pd.concat(parts).set_index(["run", "model", "category", "method"]).reset_index()
    folder = RUNS / "+".join(run_dir.name for run_dir in runs)
    remove_folder(folder)
    with new_folder(folder) as place:
        table.to_csv(place / "tab_models.csv", index=False)
        rows = table.to_html(index=False, formatters=formats(table.columns), border=0)
        gaps = f"<p>Not in the table, for want of stage 05: {lacking}.</p>" if lacking else ""
        body = f'<h1>Several runs</h1>{gaps}<div class="scroll">{rows}</div>'
        write_text(place / "report.html", page("page.html.j2", title=folder.name, body=body))
    return folder / "report.html"


# ---------------------------------------------------------------------- pages of notebooks


def notebook_body(notebook: NotebookNode) -> tuple[str, str]:
    """An executed notebook's HTML (formulas as MathML, long output folded), and the style of its
    code.
    """
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    shown = without_places(notebook, "parameters")  # those are the source's, not this run's
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            cell.source = MARKDOWN.sub(_with_mathml, cell.source)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(shown)
    body = re.sub(r"<table\b", '<div class="scroll"><table', body)
    body = PRE.sub(_folded, body.replace("</table>", "</table></div>"))
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    style = f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
    return f'<div class="notebook">{body}</div>', style


def _with_mathml(match: re.Match) -> str:
    """A formula of Markdown as MathML; one that cannot be read stays as it is, as code."""
    from latex2mathml.converter import convert

    formula = match["block"] or match["inline"]
    if not formula:
        return match[0]
    try:
        return convert(formula.strip(), display="block" if match["block"] else "inline")
    except Exception:  # its parser raises a dozen types
        return f"<code>{html.escape(formula)}</code>"


def _folded(match: re.Match) -> str:
    """Long text output behind a summary."""
    lines = match[1].count("\n") + 1
    if lines <= LONG or "<span" in match[1]:
        return match[0]
    return f"<details><summary>{lines} lines of output</summary>{match[0]}</details>"


def without_places(notebook: NotebookNode, *tags: str) -> NotebookNode:
    """A copy without the cell that papermill put in and those with such tags, whose text names this
    machine's folders relative to the repository.
    """
    import nbformat

    text = json.dumps(notebook).replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    copy = nbformat.reads(text, as_version=4)
    out = {"injected-parameters", *tags}
    copy.cells = [cell for cell in copy.cells if not out & set(cell.metadata.get("tags", []))]
    return copy


# ---------------------------------------------------------------------- into the repository


def paired(name: str, executed: NotebookNode) -> NotebookNode:
    """The notebook for readers: inputs and metadata of the source, outputs of the run, nothing of
    the machine.

    Raises `CdeltaError` if the source changed since.
    """
    notebook, ran = load_notebook(name), without_places(executed).cells
    if [cell.source for cell in ran] != [cell.source for cell in notebook.cells]:
        raise CdeltaError(f"notebook {name} changed after it ran: run it again before --record.")
    for cell, done in zip(notebook.cells, ran, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return notebook


def record(run_dir: Path, stages: Sequence[str], figures: Path | None) -> list[Path]:
    """Copy a run into the repository for commit; returns what was written.

    The executed notebooks of `stages` (not of a run on other people's prompts, which are hidden in
    figures and report), the embedded model if stage 00 is among them and trained it,
    and, unless None is given for them, figures and report to the folder `figures`.
    """
    import nbformat

    others, written = others_prompts(run_dir), []
    for name in () if others else stages:  # their outputs show prompts, in pictures too
        executed = nbformat.read(run_dir / "notebooks" / f"{name}.ipynb", as_version=4)
        written.append(NOTEBOOKS / f"{name}.ipynb")
        nbformat.write(paired(name, executed), written[-1])
    model = run_dir / NAMES[0] / "model"
    if NAMES[0] in stages and model.exists():
        written.append(_copy_folder(model, ORGANISM))
    if figures:
        written.append(_copy_folder(run_dir / "figures", figures))
    if figures and others:
        hide_prompts(figures, others)
        hide_pictures(figures)
    return written


def others_prompts(run_dir: Path) -> dict[str, str]:
    """Prompt -> id of the run's prompts that are not ours."""
    policy = run_dir / NAMES[1] / "policy"
    if not policy.exists():
        return {}
    from cdelta.policy.build import Policy  # takes seconds

    records = Policy.load(policy).records
    found = records[~records["source"].isin(OWN_SOURCES)]
    return dict(zip(found["prompt"], found["id"]))


def hide_prompts(folder: Path, ids: Mapping[str, str]) -> None:
    """Put ids in place of other people's prompts in a folder's text files: the repository ships
    none.
    """
    for path in (f for f in folder.rglob("*") if f.suffix in TEXTS):
        text = old = path.read_text(encoding="utf-8")
        for prompt, id in ids.items():
            for form in _spellings(prompt) if len(prompt) >= SHORT else ():
                text = text.replace(form, f"[prompt {id}]")
        if text != old:
            write_text(path, text)


def hide_pictures(figures: Path) -> None:
    """Take the figure that shows prompts out of a recorded folder and its pages."""
    for path in figures.glob(f"{PICTURE}.*"):
        path.unlink()
    for path in (figures / "report.html", figures / "report" / f"{NAMES[1]}.html"):
        if path.exists():
            text = path.read_text(encoding="utf-8")
            text = re.sub(rf'<img[^>]*src="(data:image|{PICTURE}\.)[^>]*>', NOT_SHOWN, text)
            write_text(path, re.sub(rf'<a[^>]*href="{PICTURE}\.[^>]*>', "<a>", text))
    manifest = read_manifest(figures)
    kept = [item for item in manifest["items"] if item["id"] != PICTURE]
    for item in kept:
        item["sha256"] = {name: file_hash(figures / name) for name in item["files"]}
    write_json(figures / "manifest.json", manifest | {"items": kept})


def _spellings(prompt: str) -> set[str]:
    """A prompt as it is, and as HTML, JSON, CSV and LaTeX write it."""
    tex = re.sub(r"([#$%&_{}])", r"\\\1", prompt)
    quoted = prompt.replace('"', '""')
    pages = {html.escape(prompt), html.escape(prompt, quote=False), prompt.replace("'", "&#39;")}
    return {prompt, tex, quoted, json.dumps(prompt)[1:-1], *pages}


def _copy_folder(source: Path, target: Path) -> Path:
    """`source` in the place of `target`, which is there or not, whole at any time."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    remove_folder(target)
    return fresh.rename(target)
