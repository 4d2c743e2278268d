"""What a stop rule says of a training."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum


class Verdict(Enum):
    """The state of a training."""

    SELECTIVE = "selective"
    """The update does what it should, and nothing else: stop."""
    NOT_YET = "not yet"
    """More steps may make it so."""
    RESTART = "restart"
    """More steps will not: begin again with other batches."""


Stop = Callable[..., Verdict]
"""``stop(model with the update applied, which update, step)``."""
