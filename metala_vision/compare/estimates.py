"""Means over seeds with their uncertainty, and the places that it allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass
class Estimate:
    """mean, and half the width of its 95 % interval; None with fewer than two values."""

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        """ "22.78 ± 0.31", or "22.78 (n/a)"."""
        width = "(n/a)" if self.half_width is None else f"± {self.half_width:.2f}"
        return f"{self.mean:.2f} {width}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of n values and its 95 % confidence interval of Student's t.

        mean ± t_(0.975, n - 1) s / sqrt(n),  s^2 = sum (x - mean)^2 / (n - 1)

    It holds 95 times in 100 where the values are independent and normal.

    Raises:
        ValueError: without a value.
    """
    if not values:
        raise ValueError("an estimate needs at least one value")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((x - mean) ** 2 for x in values) / (count - 1)
    quantile = float(student_t.ppf(0.975, count - 1))
    return Estimate(mean, quantile * math.sqrt(variance / count), count)


def overlap(first: Estimate, second: Estimate) -> bool:
    """Whether the intervals have a point in common; one of unknown width may be anywhere."""
    if first.half_width is None or second.half_width is None:
        return True
    return abs(first.mean - second.mean) <= first.half_width + second.half_width


def places(estimates: Sequence[Estimate]) -> list[int | None]:
    """The place of each, 1 for the largest mean; None where its interval meets another's, is not
    known, or is the only one."""
    ranked = sorted(range(len(estimates)), key=lambda i: -estimates[i].mean)
    found: list[int | None] = [None] * len(estimates)
    for place, i in enumerate(ranked, 1):
        others = [other for j, other in enumerate(estimates) if j != i]
        if others and not any(overlap(estimates[i], other) for other in others):
            found[i] = place
    return found
