"""95 % intervals: of a mean over seeds, and of a score over the rows that it was measured on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

CONFIDENCE = 0.95
N_RESAMPLES = 1000
RESAMPLING_SEED = 0

# A score of some rows of an evaluation, by their numbers `(rows,)`, of which any may come more than once.
RowScorer = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Interval:
    """Between `low` and `high`."""

    low: float
    high: float


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean; `None` for fewer than two values."""
    if len(values) < 2:
        return None
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return Interval(mean - half, mean + half)


@cache
def student_quantile(degrees: int) -> float:
    """What Student's t stays below, up or down, with a probability of 95 %: the 97.5 percent quantile.

    Args:
        degrees: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 13.0  # 12.706 is the largest, that of one degree
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _student_probability(t: float, degrees: int) -> float:
    """That |T| is below `t`: a finite sum for whole degrees (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    first = degrees % 2  # the powers of the cosine are odd or even as the degrees are
    term = total = 0.0
    for power in range(first, degrees - 1, 2):
        term = cosine**power if power == first else term * cosine**2 * (power - 1) / power
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if first else total


def over_rows(scorer: RowScorer, n_rows: int) -> Interval | None:
    """Percentile bootstrap of a score: as many rows are drawn with replacement, many times, and scored each time.

    It says how far the score depends on which rows the test split has; not how far it depends on the training's seed.
    The draws are the same for every model that is scored on as many rows. `None` for fewer than two rows.

    Args:
        scorer: Scores the rows that are drawn.
        n_rows: Number of all rows.
    """
    if n_rows < 2:
        return None
    rng = np.random.default_rng(RESAMPLING_SEED)
    scores = [scorer(rng.integers(n_rows, size=n_rows)) for _ in range(N_RESAMPLES)]
    outside = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(scores, [outside, 100 - outside])
    return Interval(float(low), float(high))
