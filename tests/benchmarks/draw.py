"""The scaling curves as a figure: ``python tests/benchmarks/draw.py`` reads
figures/bench/scaling.csv and writes scaling.png and scaling.pdf beside it.

Above, seconds (medians, bars from the fastest to the slowest round) and the arithmetic floor;
below, the memory that was added. Both axes are logarithmic: a line of slope 1 is proportional.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

BENCH = Path(__file__).resolve().parents[2] / "figures" / "bench"
AXES = {
    "pairs": "prompt pairs",
    "tokens": "tokens a prompt",
    "mask": "share of the parameters",
    "retained rows": "retained rows",
    "model (M)": "parameters (millions)",
}
MEASURES = {"seconds": "seconds", "added_mb": "added MB"}


def line(axes: Axes, rows: pd.DataFrame, measure: str) -> None:
    """One curve with its extremes, and the floor where there is one."""
    low = rows[measure] - rows[f"{measure}_low"]
    high = rows[f"{measure}_high"] - rows[measure]
    axes.errorbar(rows["x"], rows[measure], [low, high], marker="o", ms=4, lw=1.5, label="measured")
    if measure == "seconds" and rows["floor_seconds"].notna().any():
        axes.plot(
            rows["x"], rows["floor_seconds"], "--", color="0.4", lw=1, label="arithmetic floor"
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(rows["x"], [f"{x:.3g}" for x in rows["x"]])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < 8 * low:  # a flat line should look flat
        axes.set_ylim(low / 2, 2 * high)
    axes.grid(alpha=0.3)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Columns: the curves; rows: time and memory."""
    curves = list(table.groupby("curve", sort=False))
    figure, grid = plt.subplots(
        2, len(curves), figsize=(2.3 * len(curves), 4.8), layout="constrained", squeeze=False
    )
    for (name, rows), column in zip(curves, grid.T):
        what, _, axis = name.partition(", ")
        column[0].set_title(what, fontsize=11)
        for axes, measure in zip(column, MEASURES):
            line(axes, rows.sort_values("x"), measure)
        column[1].set_xlabel(AXES.get(axis, axis))
    for axes, label in zip(grid[:, 0], MEASURES.values()):
        axes.set_ylabel(label)
    grid[0, 0].legend(fontsize=8, frameon=False)
    first = table.iloc[0]
    figure.suptitle(f"{first['machine']}, {first['threads']} thread", fontsize=9, color="0.4")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Draw the recorded table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", default=str(BENCH / "scaling.csv"))
    told = parser.parse_args(arguments)
    table = Path(told.table)
    figure = draw(pd.read_csv(table))
    for suffix in (".png", ".pdf"):
        figure.savefig(table.with_suffix(suffix), dpi=150, metadata=None)


if __name__ == "__main__":
    main()
