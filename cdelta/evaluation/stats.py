"""Intervals and paired tests. Rates are 0-1; every random draw comes from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from cdelta.errors import CdeltaError

LEVEL = 0.95
DRAWS = 5000
"""Bootstrap resamples."""


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """``NAME, low, high``."""
        return {name: self.value, "low": self.low, "high": self.high}


class McNemar(NamedTuple):
    """Discordant pairs and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p: float


def wilson(k: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of the rate k/n (Wilson 1927).

    `k` need not be whole (a mean over seeds); n = 0 tells nothing: (0, 1).
    """
    if not 0 <= k <= n:
        raise CdeltaError(f"{k} successes among {n} trials is no rate.")
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + level) / 2), k / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (0.0 if k == 0 else max(low, 0.0)), (1.0 if k == n else min(high, 1.0))


def bootstrap_mean(
    values: Sequence[float], groups: Sequence | None = None, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Mean and its percentile bootstrap interval.

    With `groups` (prompt ids, say), whole groups are drawn: rows of one group may depend.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise CdeltaError("no values to average.")
    drawn, (totals, sizes) = _drawn(np.stack(_group_sums(values, groups)), draws, seed)
    means = drawn @ totals / (drawn @ sizes)
    return Estimate(values.mean(), *_percentiles(means))


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], draws: int = DRAWS
) -> Estimate:
    """Σ numerator / Σ denominator of paired measurements, with its percentile bootstrap interval
    over the pairs.
    """
    top, bottom = _paired(numerator, denominator)
    drawn, (tops, bottoms) = _drawn(np.stack([top, bottom]), draws)
    ratios = drawn @ tops / (drawn @ bottoms)
    return Estimate(top.sum() / bottom.sum(), *_percentiles(ratios))


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of first − second on the same prompts, with its percentile bootstrap interval; where no
    prompt differs, resampling has nothing to draw, and the interval is Clopper and Pearson's bound
    on how many of all prompts may differ all the same.
    """
    a, b = _paired(first, second)
    estimate = bootstrap_mean(a - b)
    if estimate.low == estimate.high:
        bound = 1 - ((1 - LEVEL) / 2) ** (1 / len(first))
        return Estimate(estimate.value, estimate.low - bound, estimate.high + bound)
    return estimate


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
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted.tolist()


def _paired(first: Sequence, second: Sequence) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or not len(a):
        raise CdeltaError(
            "paired comparison needs the same prompts on both sides, at least one: "
            f"{len(a)} and {len(b)} given."
        )
    return a, b


def _group_sums(values: np.ndarray, groups: Sequence | None) -> tuple[np.ndarray, np.ndarray]:
    if groups is None:
        return values, np.ones_like(values)
    if len(groups) != len(values):
        raise CdeltaError(f"{len(values)} values but {len(groups)} group names.")
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _drawn(units: np.ndarray, draws: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each unit (a column) is drawn, per resample, and the units.

    Where most have equals, as rates do, equal units are drawn together. Otherwise they stay in
    order, so that the last digit of a measurement does not decide what is drawn.
    """
    n, rng = units.shape[1], np.random.default_rng(seed)
    found, counts = np.unique(units, axis=1, return_counts=True)
    if 2 * len(counts) > n:
        found, counts = units, np.ones(n)
    return rng.multinomial(n, counts / n, size=draws).astype(float), found


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
