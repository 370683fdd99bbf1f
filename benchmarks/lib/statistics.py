"""Statistics of what was measured. Plain numbers."""

import math
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least of `values` that at least `share` of them do not exceed.

    The nearest rank, so it is always one that was measured.
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, the largest of the values and their number; empty without values."""
    if not values:
        return {}
    return {
        "p50": round(percentile(values, 0.5), 2),
        "p95": round(percentile(values, 0.95), 2),
        "max": round(max(values), 2),
        "of": len(values),
    }


def jain(values: Sequence[float]) -> float:
    """Return Jain's fairness index.

    1 when all values are equal, 1 ÷ their number when one has everything.
    """
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def growth(readings: Sequence[float]) -> float:
    """Return the median of the last third of the readings ÷ that of the first, less 1.

    No single reading decides it.
    """
    third = len(readings) // 3
    return statistics.median(readings[-third:]) / statistics.median(readings[:third]) - 1


def growth_per_request(readings: Sequence[float], requests_between: int) -> float:
    """Return the slope of the least-squares line through the readings.

    requests_between: how many requests lie between two readings.
    """
    requests = range(0, len(readings) * requests_between, requests_between)
    return statistics.linear_regression(requests, readings).slope
