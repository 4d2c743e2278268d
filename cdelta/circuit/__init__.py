"""From scores to a circuit and the parameters that it owns."""

from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.mask import ParameterMask
from cdelta.circuit.ranking import unit_scores
from cdelta.circuit.selection import select, select_units

__all__ = ["Circuit", "ParameterMask", "select", "select_units", "unit_scores"]

Scores.select = select  # attribution knows nothing of circuits, yet `scores.select(...)` reads best
