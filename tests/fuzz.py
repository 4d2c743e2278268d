"""Fuzzing of what users bring: either it works, or it is a `CdeltaError` of one sentence.

``CDELTA_FUZZ=100`` makes every fuzz test a hundred times as long.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cdelta.errors import CdeltaError

TIMES = int(os.environ.get("CDELTA_FUZZ", "1"))

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats(allow_nan=True)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Any small JSON value."""


def examples(count: int) -> settings:
    """Settings of a fuzz test of `count` examples, or `CDELTA_FUZZ` times as many."""
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=TIMES == 1,
    )


class Outcomes:
    """Counts what became of the inputs of one fuzz test."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def attempt(self, call: Callable[[], object]) -> bool:
        """Whether the call worked; any error but a sentence fails the test."""
        try:
            call()
        except CdeltaError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 2000, message
            self.counts["one sentence"] += 1
            return False
        self.counts["worked"] += 1
        return True

    def show(self, name: str, capsys) -> None:
        """Print the counts, also when the test passes; some inputs must have come each way."""
        with capsys.disabled():
            print(f"\nfuzz {name}: {dict(self.counts)}")
        assert len(self.counts) == 2, self.counts
