"""How sure one can be of a share of right answers, and of a difference between two.

Answers are not independent. All seeds of a variant are asked the same questions, and questions about one clip (and its
twin) stand or fall together. So a share varies in two ways that cross each other: over seeds, and over groups of
questions. Both are counted (two-way clustering: Cameron, Gelbach and Miller, "Robust inference with multiway
clustering", 2011), each with its own degrees of freedom (Satterthwaite, 1946). With one seed, nothing is known about
other seeds, and the interval is one over questions alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer
from scipy import stats

from valley.evaluation.metrics import wilson_interval


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and questions.

    Attributes:
        mean: of all values.
        variance: of that mean, estimated.
        freedom: degrees of freedom of the variance.
        num_seeds: rows of the values.
        num_groups: questions that can be taken as independent of each other.
    """

    mean: float
    variance: float
    freedom: float
    num_seeds: int
    num_groups: int

    @property
    def t_95(self) -> float:
        """Standard errors to either side of the mean that hold 95 %."""
        return float(stats.t.ppf(0.975, self.freedom))

    @property
    def difference_interval(self) -> tuple[float, float]:
        """The 95 % interval of a difference, in [-1, 1]."""
        half = self.t_95 * math.sqrt(self.variance)
        return max(self.mean - half, -1.0), min(self.mean + half, 1.0)

    @property
    def share_interval(self) -> tuple[float, float]:
        """The 95 % interval of a share, in [0, 1].

        Wilson's, for as many independent questions as would have this variance ("effective sample size"; compared with
        others by Franco, Little, Louis and Slud, 2019): it holds near 0 and 1, where the usual one collapses.
        """
        spread = self.mean * (1 - self.mean)
        number = min(spread / self.variance if spread else self.num_groups, self.num_groups * self.num_seeds)
        return wilson_interval(self.mean * number, number, self.t_95)

    @property
    def p_value(self) -> float:
        """How likely so large a mean is, to either side, if the true one is 0.

        No less than what an exact test that flips the signs of whole groups could give.
        """
        by_t = 2 * stats.t.sf(abs(self.mean) / math.sqrt(self.variance), self.freedom)
        return float(max(by_t, min(1.0, 2.0 ** (1 - self.num_groups))))


def estimate(values: Float[np.ndarray, "S Q"], groups: Integer[np.ndarray, " Q"]) -> Estimate:
    """Returns the mean of what seeds did on questions, and its variance.

    Args:
        values: 1 or 0 for right and wrong answers, or the difference of two such; a row a seed.
        groups: the group of each question.

    Raises:
        ValueError: there are no values.
    """
    num_seeds = len(values)
    if not values.size:
        raise ValueError("no values")
    mean = float(values.mean())
    names, places = np.unique(groups, return_inverse=True)
    residuals = np.zeros((num_seeds, len(names)))
    for seed in range(num_seeds):
        np.add.at(residuals[seed], places, values[seed] - mean)
    total = values.size**2
    by_seed = _between(residuals.sum(1), total)
    by_group = _between(residuals.sum(0), total)
    both = _between(residuals.ravel(), total)
    floor = (0.5 / len(names)) ** 2  # as if half a group stood on the other side: few that agree prove little
    if num_seeds == 1:
        return Estimate(mean, max(by_group, floor), max(len(names) - 1, 1), 1, len(names))
    variance = max(by_seed + by_group - both, by_seed, by_group, floor)
    parts = [(by_seed, num_seeds - 1), (by_group, max(len(names) - 1, 1))]
    weight = sum(part**2 / freedom for part, freedom in parts)
    freedom = sum(part for part, _ in parts) ** 2 / weight if weight else float(parts[1][1])
    return Estimate(mean, variance, freedom, num_seeds, len(names))


def _between(sums: Float[np.ndarray, " G"], total: float) -> float:
    """The part of the variance that lies between clusters, from the sums of their residuals."""
    number = len(sums)
    return float((sums**2).sum() / total * number / (number - 1)) if number > 1 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected
