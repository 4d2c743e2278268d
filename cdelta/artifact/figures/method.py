"""The method in one picture, for the README and the report: circuit, mask, two trainings, one
difference, one checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from cdelta.artifact.figures.style import GAIN, GREY, LOSS, PAGE, PALETTE, style
from cdelta.paths import FIGURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CIRCUIT = ((0, 1), (1, 3), (2, 0), (2, 3), (3, 2))
"""Layer and place of the parts that stand for a circuit."""
HEIGHT = 2.25


def method() -> Figure:
    """Four steps from left to right, each with its product, drawn without data."""
    import matplotlib.pyplot as plt

    with style():
        fig = plt.figure(figsize=(PAGE, HEIGHT), layout="none")
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, PAGE), ylim=(0, HEIGHT))
        ax.axis("off")
        _localise(ax, 0.35)
        _mask(ax, 2.2)
        _train(ax, 3.7)
        _checkpoint(ax, 5.75)
        for start, end in ((1.55, 2.08), (3.28, 3.6), (5.32, 5.64)):
            _arrow(ax, (start, 1.25), (end, 1.25), "0.3", 1.4)
    return fig


def _step(ax: Axes, x: float, title: str, below: str) -> None:
    ax.text(x, HEIGHT - 0.13, title, fontsize=8, fontweight="bold", ha="center", va="center")
    ax.text(x, 0.26, below, fontsize=6.8, ha="center", va="center", color="0.25", linespacing=1.2)


def _arrow(ax: Axes, start, end, colour, width: float) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "color": colour, "lw": width}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **look))


def _localise(ax: Axes, x: float) -> None:
    places = {
        (layer, i): (x + 0.32 * i, 0.72 + 0.34 * layer) for layer in range(4) for i in range(4)
    }
    links = zip(CIRCUIT[:-1], CIRCUIT[1:])
    for a, b in (
        (CIRCUIT[0], CIRCUIT[1]),
        (CIRCUIT[0], CIRCUIT[2]),
        (CIRCUIT[1], CIRCUIT[3]),
        *links,
    ):
        if a[0] < b[0]:
            ax.plot(*zip(places[a], places[b]), color=LOSS, lw=1.3, zorder=1)
    for key, (left, bottom) in places.items():
        inside = key in CIRCUIT
        ax.scatter(left, bottom, s=52, color=PALETTE[0] if inside else "0.88", zorder=2, lw=0)
    _step(
        ax,
        x + 0.48,
        "1 · localise",
        "EAP-IG: which heads and neurons\ncarry refusal of one category?",
    )


def _mask(ax: Axes, x: float) -> None:
    left, bottom, size, cells = x, 0.74, 1.0, 12
    ax.add_patch(Rectangle((left, bottom), size, size, fc="0.96", ec="0.4", lw=0.8))
    for row in (2, 7):
        box = ((left, bottom + size * row / cells), size, size / cells)
        ax.add_patch(Rectangle(*box, fc=PALETTE[0], lw=0))
    for column in (4, 9):
        box = ((left + size * column / cells, bottom), size / cells, size)
        ax.add_patch(Rectangle(*box, fc=PALETTE[0], lw=0))
    _step(ax, x + 0.5, "2 · mask", "the rows and columns of the\nweights that these parts own")


def _train(ax: Axes, x: float) -> None:
    for y, sign, says, colour in ((1.62, "θ⁺", "refuses", GAIN), (0.84, "θ⁻", "answers", LOSS)):
        box = FancyBboxPatch(
            (x, y - 0.17), 0.78, 0.34, boxstyle="round,pad=0.02", fc="white", ec=colour
        )
        ax.add_patch(box)
        ax.text(x + 0.39, y, f"{sign} {says}", fontsize=7.2, ha="center", va="center", color=colour)
        _arrow(ax, (x + 0.83, y), (x + 1.07, 1.25 + 0.11 * np.sign(y - 1.25)), colour, 1.1)
    ax.text(x + 1.24, 1.25, "ΔΘ\n= θ⁺ − θ⁻", fontsize=7.6, ha="center", va="center")
    _step(
        ax,
        x + 0.72,
        "3 · train on the mask",
        "the difference must keep the\nbase's answers to all other prompts",
    )


def _checkpoint(ax: Axes, x: float) -> None:
    box = FancyBboxPatch((x, 0.92), 0.95, 0.66, boxstyle="round,pad=0.03", fc="0.97", ec=GREY, lw=1)
    ax.add_patch(box)
    ax.text(x + 0.475, 1.25, "θ + k·ΔΘ\nmodel.safetensors", fontsize=7, ha="center", va="center")
    _step(ax, x + 0.475, "4 · add", "an ordinary checkpoint:\nno hook, no gate; can be reverted")


def main() -> None:
    """Draw the README's picture: ``python -m cdelta.artifact.figures.method``."""
    method().savefig(FIGURES / "method.png", dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
