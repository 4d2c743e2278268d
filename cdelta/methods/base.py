"""What every method is: something that can be applied to a model at a strength."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cdelta.delta.weight_delta import WeightDelta

if TYPE_CHECKING:
    from cdelta.models.spec import ModelSpec

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Grid of strengths for weight deltas."""
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Grid for steering, wider because a vector's natural length says little about the strength that it
needs."""


class Applied:
    """A method that has been made for one model and category. Strength 0 is the base."""

    strengths = STRENGTHS
    """What tuning tries where nothing else is said."""
    system = ""
    """A system prompt that goes before every prompt."""
    keeps_rows = False
    """The method remembers the rows of a batch: none may leave it before all have ended."""

    @property
    def n_changed(self) -> int:
        """Parameters that the method changes; 0 for steering at run time."""
        return 0

    def applied(self, model, strength: float = 1.0) -> AbstractContextManager:
        """The model with the method; as it was afterwards, also after an exception."""
        raise NotImplementedError


@dataclass(frozen=True)
class Edited(Applied):
    """A weight delta as a method: its strength is the scale k."""

    delta: WeightDelta = field(repr=False)
    strengths = SCALES

    @property
    def n_changed(self) -> int:
        """Entries of the delta."""
        return self.delta.count()

    def applied(self, model, strength: float = 1.0) -> AbstractContextManager:
        """The edited model."""
        return self.delta.applied(model, scale=strength)


Candidates = Mapping[str, Applied]
"""What a method could be (a layer, a learning rate) -> the method; chosen among on validation."""


def as_method(method: Applied | WeightDelta) -> Applied:
    """A weight delta as the method that it is."""
    return Edited(method) if isinstance(method, WeightDelta) else method


def param_fraction(method: Applied | WeightDelta, spec: ModelSpec) -> float:
    """Share of the parameters that a method changes."""
    return as_method(method).n_changed / spec.n_params
