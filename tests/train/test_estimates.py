"""Means and intervals: by hand, by their meaning, and on known distributions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metala_vision.compare.estimates import Estimate, estimate, overlap, places


def test_an_interval_by_hand():
    """Five values: t_(0.975, 4) = 2.776445."""
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0 and found.count == 5
    assert found.half_width == pytest.approx(2.776445 * (2.5 / 5) ** 0.5, rel=1e-6)


def test_one_value_has_no_interval():
    found = estimate([4.2])
    assert found == Estimate(4.2, None, 1) and str(found) == "4.20 (n/a)"
    assert str(estimate([1.0, 1.0])) == "1.00 ± 0.00"
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_interval_holds_95_times_in_100(count):
    """4,000 draws: the share's own standard deviation is 0.0034, five of them accepted."""
    draws = np.random.default_rng(count).normal(70.0, 0.4, (4000, count))
    held = [abs((e := estimate(list(row))).mean - 70.0) <= (e.half_width or 0) for row in draws]
    assert abs(np.mean(held) - 0.95) < 5 * (0.95 * 0.05 / 4000) ** 0.5


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_it_is_that_of_scipy(values):
    found = estimate(values)
    scale = stats.sem(values)
    expected = scale * stats.t.ppf(0.975, len(values) - 1)
    assert found.half_width == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_places_are_given_where_no_interval_meets_another():
    apart = [Estimate(70, 1, 3), Estimate(80, 1, 3), Estimate(60, 1, 3)]
    assert places(apart) == [2, 1, 3]
    assert places([*apart, Estimate(81.5, 1, 3)]) == [3, None, 4, None]
    assert places([Estimate(70, None, 1), Estimate(10, 0.1, 3)]) == [None, None]
    assert places([Estimate(70, None, 1)]) == places([Estimate(70, 1.0, 3)]) == [None]
    assert overlap(Estimate(1, 1, 2), Estimate(3, 1, 2))
    assert not overlap(Estimate(1, 0.9, 2), Estimate(3, 1, 2))
