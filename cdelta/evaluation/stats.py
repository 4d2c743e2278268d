"""Intervals and paired tests. Rates are 0-1; every random draw comes from one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm

from cdelta.errors import CdeltaError

LEVEL = 0.95
DRAWS = 5000
"""Bootstrap resamples."""


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float

    def named(self, name: str, prefix: str = "") -> dict[str, float]:
        """``NAME, PREFIXlow, PREFIXhigh``."""
        return dict(zip((name, f"{prefix}low", f"{prefix}high"), self))


class McNemar(NamedTuple):
    """Discordant pairs and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p: float


def wilson(k: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of the rate k/n (Wilson 1927).

    `k` need not be whole (a mean over seeds); n = 0 tells nothing: (0, 1).
    """
    if not 0 <= k <= n:
        raise CdeltaError(f"{k} successes among {n} trials is no rate.")
    if n == 0:
        return 0.0, 1.0
    z, p = float(norm.ppf((1 + LEVEL) / 2)), k / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (0.0 if k == 0 else max(low, 0.0)), (1.0 if k == n else min(high, 1.0))


def bootstrap_mean(
    values: Sequence[float], groups: Sequence | None = None, draws: int = DRAWS
) -> Estimate:
    """Mean and its percentile bootstrap interval.

    With `groups` (prompt ids, say), whole groups are drawn: rows of one group may depend.
    """
    by = np.arange(len(values)) if groups is None else np.asarray(groups)
    units = pd.Series(np.asarray(values, dtype=float)).groupby(by).agg(["sum", "size"])
    return bootstrap_ratio(units["sum"], units["size"], draws)


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], draws: int = DRAWS
) -> Estimate:
    """Σ numerator / Σ denominator of paired measurements, with its percentile bootstrap interval
    over the pairs.

    Where most pairs have equals, as rates do, equal pairs are drawn together. Otherwise they stay
    in order, so that the last digit of a measurement does not decide what is drawn.
    """
    units = np.stack(_paired(numerator, denominator))
    n, total = units.shape[1], units.sum(axis=1)
    found, counts = np.unique(units, axis=1, return_counts=True)
    if 2 * len(counts) > n:
        found, counts = units, np.ones(n, dtype=int)
    drawn = np.random.default_rng(0).multinomial(n, counts / n, size=draws).astype(float)
    ratios = drawn @ found[0] / (drawn @ found[1])
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(total[0] / total[1], float(low), float(high))


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of first − second on the same prompts, with its percentile bootstrap interval; where no
    prompt differs, resampling has nothing to draw, and the interval is Clopper and Pearson's bound
    on how many of all prompts may differ all the same.
    """
    a, b = _paired(first, second)
    value, low, high = bootstrap_mean(a - b)
    bound = 1 - ((1 - LEVEL) / 2) ** (1 / len(a)) if low == high else 0.0
    return Estimate(value, low - bound, high + bound)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """McNemar's exact test (binomial on the discordant pairs) of two methods on the same prompts.

    Values may be means over seeds: a prompt counts for the side on which its mean is higher (the
    sign test), so that no seed is voted away.
    """
    a, b = _paired(first, second)
    higher, lower = int((a > b).sum()), int((a < b).sum())
    p = float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0
    return McNemar(higher, lower, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979), in the given order: the chance of any false claim among
    them stays at the level.
    """
    p = pd.Series(p_values, dtype=float).reset_index(drop=True).sort_values(kind="stable")
    steps = (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1.0)
    return steps.sort_index().tolist()


def _paired(first: Sequence, second: Sequence) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or not len(a):
        raise CdeltaError(
            "paired comparison needs the same prompts on both sides, at least one: "
            f"{len(a)} and {len(b)} given."
        )
    return a, b
