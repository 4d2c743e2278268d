"""From scores to a circuit and the parameters that it owns."""

from cdelta.attribution.scores import Scores
from cdelta.circuit.selection import select

Scores.select = select  # attribution knows nothing of circuits, yet `scores.select(...)` reads best
