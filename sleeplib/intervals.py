"""What a few seeds can show: standard errors, and intervals for means and differences."""

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

# 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom; beyond that the last is a little wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def proportion_error(p, count):
    """Standard error of a share p of `count` independent answers: ``sqrt(p (1 - p) / count)``.

    Chapter: seeds
    """
    if not (0 <= p <= 1 and count > 0):
        raise ValueError(f"p must lie in [0, 1] and count be positive; got {p!r} and {count!r}")
    return sqrt(p * (1 - p) / count)


@dataclass(frozen=True)
class Interval:
    """An estimate, and how far the truth may be from it with 95 % confidence.

    Parameters
    ----------
    value, half : float
        The interval is ``value - half`` to ``value + half``.
    seeds : int
        How many seeds it was made from.

    Chapter: seeds
    """

    value: float
    half: float
    seeds: int

    @property
    def sign(self):
        """1 if the whole interval lies above zero, -1 if below, 0 if it holds zero: nothing is decided."""
        return int(self.value > self.half) - int(self.value < -self.half)  # NumPy's booleans have no minus

    def __str__(self):
        return f"{self.value:+.3f} ± {self.half:.3f}"


def seed_interval(values):
    """The mean of one value a seed, with Student's interval: ``t * s / sqrt(n)`` to either side.

    Parameters
    ----------
    values : sequence of float
        At least two: one seed says nothing about how seeds differ.

    Returns
    -------
    Interval

    Chapter: seeds
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values must be of at least two seeds; got {n}")
    return Interval(mean(values), STUDENT[min(n, len(STUDENT) + 1) - 2] * stdev(values) / sqrt(n), n)


def paired_interval(before, after):
    """The mean of ``after - before`` over the seeds that both have, with Student's interval.

    `before` and `after` map seeds to values.  Runs of one seed see the same data in the same order and start
    from the same weights, so that much of what makes seeds differ drops out of their difference.

    Chapter: seeds
    """
    shared = sorted(before.keys() & after.keys())
    if len(shared) < 2:
        raise ValueError(f"before and after must share at least two seeds; they share {shared}")
    return seed_interval([after[seed] - before[seed] for seed in shared])
