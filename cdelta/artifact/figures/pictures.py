"""The pictures of ``pictures.toml``: the method, and the idea of attribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from cdelta.artifact.figures.style import PAGE, PALETTE, styled
from cdelta.files import read_toml
from cdelta.paths import FIGURES


@styled
def picture(name: str, **words: object) -> Figure:
    """A picture with its words filled in."""
    shapes = read_toml(Path(__file__).with_name("pictures.toml"))[name]
    height = shapes.pop("height")
    fig = plt.figure(figsize=(PAGE, height), layout="none")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, PAGE), ylim=(0, height))
    ax.set_axis_off()
    for text in shapes["annotate"]:
        text["text"] = text["text"].format(**words)
    for kind, entries in shapes.items():
        for entry in entries:
            getattr(ax, kind)(**entry)
    ax.set(xlim=(0, PAGE), ylim=(0, height))
    return fig


def idea(
    clean: str,
    corrupted: str,
    metric_clean: float,
    metric_corrupted: float,
    points: Sequence[float],
) -> Figure:
    """What an edge's score means: one pair's prompts and metric (nats), and where EAP-IG takes its
    gradients (each a_t, 0: corrupted, 1: clean).
    """
    metrics = {"metric_clean": metric_clean, "metric_corrupted": metric_corrupted}
    fig = picture("idea", clean=clean, corrupted=corrupted, points=len(points), **metrics)
    for place in points:
        x = 5.15 + 1.5 * place
        fig.axes[0].scatter(x, 0.9, s=22, color=PALETTE[1], zorder=3)
        arrow = {"arrowstyle": "->", "color": PALETTE[1]}
        fig.axes[0].annotate("", (x + 0.03, 1.5), (x, 0.98), arrowprops=arrow)
    return fig


if __name__ == "__main__":
    method = picture("method")
    method.savefig(FIGURES / "method.png", dpi=200, metadata={"Software": None})
