"""An executed notebook as a page that works offline: formulas as MathML, long output folded."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from cdelta.paths import ROOT

if TYPE_CHECKING:
    from nbformat import NotebookNode

LONG = 20
"""Lines of output from which on it is folded."""
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?![\w$])", re.S)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)


def notebook_body(notebook: NotebookNode) -> tuple[str, str]:
    """An executed notebook's HTML, and the style of its code."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    shown = without_places(notebook)
    shown.cells = [cell for cell in shown.cells if not _is_injected(cell)]
    formulas: list[str] = []
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            cell.source = _held_back(cell.source, formulas)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(shown)
    for number, formula in enumerate(formulas):
        body = body.replace(_place(number), formula)
    body = re.sub(r"<table\b", '<div class="scroll"><table', body)
    body = body.replace("</table>", "</table></div>")
    body = re.sub(r"<pre>(.*?)</pre>", _folded, body, flags=re.S)
    return f'<div class="notebook">{body}</div>', _code_style(HtmlFormatter)


def _code_style(formatter: Callable) -> str:
    """Code's colours, for light pages and dark ones."""
    light = formatter(style="default").get_style_defs(".highlight")
    dark = formatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _is_injected(cell: NotebookNode) -> bool:
    """Whether papermill put the cell in."""
    return "injected-parameters" in cell.metadata.get("tags", [])


def _place(number: int) -> str:
    return f"FORMULA{number:04d}PLACE"


def _held_back(markdown: str, formulas: list[str]) -> str:
    """Markdown with placeholders for its formulas, which are appended as MathML; code stays."""

    def hold(match: re.Match) -> str:
        block = match["block"] is not None
        formulas.append(mathml(match["block"] if block else match["inline"], block))
        return _place(len(formulas) - 1)

    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [FORMULA.sub(hold, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join(parts) + FORMULA.sub(hold, markdown[end:])


def mathml(latex: str, block: bool = False) -> str:
    """A formula as MathML; one that cannot be read stays as it is, as code."""
    from latex2mathml.converter import convert

    try:
        return convert(latex.strip(), display="block" if block else "inline")
    except Exception:  # its parser raises a dozen types
        return f"<code>{html.escape(latex)}</code>"


def _folded(match: re.Match) -> str:
    """Long text output behind a summary."""
    lines = match[1].count("\n") + 1
    if lines <= LONG or "<span" in match[1]:
        return match[0]
    return f"<details><summary>{lines} lines of output</summary>{match[0]}</details>"


def without_places(notebook: NotebookNode) -> NotebookNode:
    """A copy whose text names this machine's folders relative to the repository."""
    import nbformat

    text = json.dumps(notebook).replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    return nbformat.reads(text, as_version=4)
