"""95 % intervals of differences between two rankers on the same rows, from a paired bootstrap.

Whole users are drawn, with replacement, since rows of one user depend on each other. R rows, U users.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Column = Sequence[float] | np.ndarray  # (R,)
Difference = tuple[float, list[float]]  # and percentiles 2.5 and 97.5 of its bootstrap


@dataclass(frozen=True)
class Sampling:
    """The bootstrap of an evaluation.

    Attributes:
        users: (R,) the user of each row.
        num_samples: Bootstrap samples.
        seed: Of the samples.
    """

    users: Sequence[int] | np.ndarray
    num_samples: int = 2000
    seed: int = 0

    def difference(self, values: Column, baseline: Column) -> Difference:
        """Mean difference of the values of each row."""
        first, second = self._columns(values, baseline)
        return float((first - second).mean()), self._interval(self._by_user(first - second, np.ones(len(first))))

    def rate_difference(self, events: Column, cases: Column, other_events: Column, other_cases: Column) -> Difference:
        """Difference of two rates, each events over cases; NaN where fewer than two users have cases.

        Unlike in `difference` the two may have different cases, such as targets that only one model ranks high.
        """
        sums = self._by_user(*self._columns(events, cases, other_events, other_cases))
        sums = sums[:, (sums[1::2] > 0).any(axis=0)]  # the other users change neither rate
        with np.errstate(invalid="ignore"):  # a sample without cases has no rate: NaN
            interval = self._interval(sums) if sums.shape[1] > 1 else [float("nan")] * 2
            return _difference(sums.sum(axis=1)), interval

    def _columns(self, *columns: Column) -> np.ndarray:
        lengths = [len(column) for column in columns]
        if set(lengths) != {len(self.users)} or not lengths[0]:
            raise ValueError(f"{lengths} values for {len(self.users)} users; an interval needs one for each user")
        return np.array(columns, dtype=float)

    def _by_user(self, *columns: np.ndarray) -> np.ndarray:
        """(columns, U) sums."""
        _, cluster = np.unique(np.asarray(self.users), return_inverse=True)
        return np.array([np.bincount(cluster, weights=column) for column in columns])

    def _interval(self, sums: np.ndarray) -> list[float]:
        rng, num_users = np.random.default_rng(self.seed), sums.shape[1]
        drawn = (rng.integers(num_users, size=num_users) for _ in range(self.num_samples))
        bounds = np.percentile([_difference(sums[:, users].sum(axis=1)) for users in drawn], [2.5, 97.5])
        return [float(bound) for bound in bounds]


def _difference(sums: np.ndarray) -> float:
    """The rate of (events, cases), less that of two further sums where there are four."""
    rates = sums[::2] / sums[1::2]
    return float(rates[0] - rates[1:].sum())
