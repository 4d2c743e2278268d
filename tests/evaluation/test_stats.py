"""Intervals against published values and scipy, tests against hand calculation."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cdelta.errors import CdeltaError
from cdelta.evaluation.stats import (
    bootstrap_mean,
    bootstrap_ratio,
    holm,
    mcnemar,
    paired_interval,
    wilson,
)


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_newcombes_table(k, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("k, n", [(0, 7), (7, 7), (3, 50)])
def test_wilson_equals_scipy(k, n):
    interval = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_wilson_knows_nothing_without_trials_and_refuses_impossible_counts():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(CdeltaError, match="no rate"):
        wilson(5, 4)


@pytest.mark.parametrize("seed", range(3))
def test_mcnemar_equals_the_binomial_test_on_discordant_pairs(seed):
    first, second = np.random.default_rng(seed).random((2, 60)) < [[0.7], [0.4]]
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (
        (first & ~second).sum(),
        (~first & second).sum(),
    )
    assert found.p == pytest.approx(
        binomtest(found.only_first, found.only_first + found.only_second).pvalue, rel=1e-12
    )


def test_mcnemar_without_differences_says_so():
    assert mcnemar([True, False], [True, False]).p == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_bootstrap_covers_the_mean_and_matches_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert found == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), abs=0.02
    )


def test_groups_widen_the_interval_of_dependent_rows():
    values, groups = np.repeat([0.0, 1.0] * 20, 10), np.repeat(range(40), 10)
    alone, grouped = bootstrap_mean(values), bootstrap_mean(values, groups)
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_paired_values_need_equal_prompts():
    with pytest.raises(CdeltaError, match="same prompts"):
        paired_interval([1], [1, 0])


def test_ratio_of_proportional_sides_is_exact():
    assert bootstrap_ratio([2, 4, 6], [1, 2, 3]) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("n", [1, 10, 100, 1000])
def test_equal_sides_prove_only_what_their_number_allows(n):
    value, low, high = paired_interval([1.0] * n, [1.0] * n)
    bound = binomtest(0, n).proportion_ci(method="exact").high
    assert value == 0 and (low, high) == pytest.approx((-bound, bound))


def test_an_interval_with_differences_is_the_bootstraps():
    first, second = [1, 0, 1, 1, 0.5], [0, 0, 1, 0, 1]
    assert paired_interval(first, second) == bootstrap_mean(np.subtract(first, second))


def test_mcnemar_counts_every_seed():
    """A mean over seeds counts for the side on which it is higher, by however little."""
    assert mcnemar([1 / 3, 2 / 3, 1.0], [0, 1.0, 1.0])[:2] == (1, 1)


def test_the_last_digit_does_not_decide_what_is_drawn():
    values = np.random.default_rng(0).normal(size=50)
    noisy = values * (1 + 1e-12)
    assert bootstrap_mean(values) == pytest.approx(bootstrap_mean(noisy), abs=1e-9)
    ratio = bootstrap_ratio(values + 5, np.ones(50))
    assert bootstrap_ratio(noisy + 5, np.ones(50)) == pytest.approx(ratio, abs=1e-9)
