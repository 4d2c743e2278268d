"""What a run found, as sentences: titles of figures, and the conclusion of every notebook section.

The words stand in ``templates/findings.j2`` and ``templates/conclusions.j2``, each with its numbers
computed from the tables that are passed in; nothing is typed. A sentence says less where the table
says less, and the opposite where the table says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cdelta.artifact.figures.style import styled, title_of
from cdelta.artifact.numbers import TEMPLATES, block, span

if TYPE_CHECKING:
    import networkx as nx
    from IPython.display import Markdown
    from matplotlib.figure import Figure

OWN = "cdelta"
"""The key of the method under study."""


def title(name: str, table: pd.DataFrame | None = None, **facts: object) -> str:
    """A finding as one sentence without its full stop; "" where there is nothing to say.

    name: the block of the template.
    """
    if table is not None and not len(table):
        return ""
    return " ".join(block("findings.j2", name, table=table, **facts).split())


def headed(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorates what draws a figure: in the artifact's look, under the finding of the function's
    name, which takes the function's arguments by theirs.
    """

    @wraps(draw)
    @styled
    def drawn(*args: object) -> Figure:
        """The figure with its headline above."""
        headline = title(draw.__name__, **dict(zip(signature(draw).parameters, args)))
        fig = draw(*args)
        fig.set_figheight(fig.get_figheight() + 0.25 * bool(headline))
        fig.suptitle(textwrap.fill(headline, 100), x=0.01, ha="left")
        return fig

    return drawn


def section(name: str, **facts: object) -> Markdown:
    """What was found, what it means, and what it does not mean, as a cell's output."""
    from IPython.display import Markdown

    text = " ".join(block("conclusions.j2", name, **facts).split())
    return Markdown(text.replace(" **What", "\n\n**What"))


# ---------------------------------------------------------------------- what is more than a query


def strongest_parts(heads: Mapping[str, np.ndarray], mlps: Mapping[str, np.ndarray]) -> list[str]:
    """The heads and MLPs that have the strongest score of a category."""
    names = set()
    for category in heads:
        head, mlp = np.abs(heads[category]), np.abs(mlps[category])
        layer, index = np.unravel_index(head.argmax(), head.shape)
        names.add(f"MLP {mlp.argmax()}" if mlp.max() > head.max() else f"head {layer}.{index}")
    return sorted(names)


def writers(graphs: Mapping[str, nx.DiGraph]) -> pd.Series:
    """Part -> in how many `circuit_graph`s it has the strongest arrow into the logits."""
    arrows = [graph.in_edges("logits", data="score") for graph in graphs.values()]
    strongest = [max(some, key=lambda arrow: abs(arrow[2]), default=["input"]) for some in arrows]
    return pd.Series([arrow[0] for arrow in strongest]).value_counts()


def rises(matrix: pd.DataFrame) -> pd.DataFrame:
    """Rows of `tab_matrix` with their ``rise`` over the base's, the largest change first."""
    keys = ["prompt_category", "prompt_kind"]
    before = matrix.query("edit_category == 'base'").set_index(keys)["refusal"]
    edited = matrix.query("edit_category != 'base'").join(before.rename("before"), on=keys)
    edited["rise"] = edited["refusal"] - edited["before"]
    return edited.sort_values("rise", key=abs, ascending=False, kind="stable")


def by_size(lines: pd.DataFrame) -> list[tuple]:
    """Budgets in percent at which there are both a circuit and random masks, with their rates, from
    rows ``percent, mask, rate``: tuples ``Index, circuit, random``.
    """
    wide = lines.pivot_table("rate", "percent", "mask").reindex(columns=["circuit", "random"])
    return list(wide.dropna().itertuples())


for fact in (span, title, title_of, strongest_parts, writers, rises, by_size):
    TEMPLATES.globals[fact.__name__] = fact
