"""95 % intervals of differences between two rankers on the same rows.

Rows of one user depend on each other, so that whole users vary. With one training seed the interval is a paired
bootstrap over users, which leaves seeds out. With several seeds it holds both: seeds and users are two crossed random
effects, whose variances of the mean difference are added, less their interaction, which each of them holds (ANOVA
moments; Searle, Casella and McCulloch 1992). Student's t is the mean of those of S - 1 and U - 1 degrees of freedom,
weighted by the two variances (Cochran and Cox 1950): it covers 93 to 97 % at three and at five seeds. One t of
Satterthwaite's degrees of freedom covers 92 % at three seeds that vary more than users, and 98 % where the interaction
is most of the variance. Two seeds are too few: 87 to 98 %. Above MOST_DRAWN users each user counts Poisson(1) times in
a sample (Chamandy et al. 2012, "Estimating uncertainty for massive data streams"), in one pass over the users. R rows,
S seeds, U users, C columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Column = Sequence[float] | np.ndarray  # (R,), or (S, R)
LEAVES_SEEDS_OUT = "paired bootstrap over whole users, of one training seed: another seed may lie outside"
Difference = tuple[float, list[float]]  # and the bounds of its interval
MOST_DRAWN = 100_000  # users that are drawn one by one
USERS_AT_ONCE = 128  # of Poisson weights
_OF_65536 = np.diff(np.round(65536 * stats.poisson.cdf(np.arange(-1, 9), 1))).astype(int)  # weights 0 to 8
POISSON = np.repeat(np.arange(9.0), _OF_65536)  # (65536,) each as often as it is probable: faster to draw


def holds(num_seeds: int) -> str:
    """How an interval is made, for the text beside it."""
    return f"95 %, over users and {num_seeds} training seeds" if num_seeds > 1 else f"95 %, {LEAVES_SEEDS_OUT}"


@dataclass(frozen=True)
class Sampling:
    """The rows of an evaluation, as intervals see them.

    Attributes:
        users: (R,) the user of each row.
        num_samples: Bootstrap samples.
        seed: Of the samples.
    """

    users: Sequence[int] | np.ndarray
    num_samples: int = 2000
    seed: int = 0

    def difference(self, values: Column, baseline: Column) -> Difference:
        """Mean difference of the values of each row; where either has several seeds, of those of each seed.

        A row that is not evaluated with every seed is NaN with the others.
        """
        first, second = self._columns(values, baseline)
        gains = first - second
        is_there = ~np.isnan(gains)
        if not is_there.any(axis=0).all():
            raise ValueError(f"row {int(is_there.any(axis=0).argmin())} of {len(self.users)} has no value")
        return self._of_rates(np.array([np.where(is_there, gains, 0.0), is_there]))

    def differences(self, columns: Sequence[Column]) -> dict[tuple[int, int], Difference]:
        """Of every two columns the later one minus the earlier, as `difference` finds it, by their places."""
        pairs = [(later, earlier) for later in range(len(columns)) for earlier in range(later)]
        found = [np.atleast_2d(np.asarray(column, dtype=float)) for column in columns]
        if not found or max(map(len, found)) > 1 or any(np.isnan(values).any() for values in found):
            return {pair: self.difference(columns[pair[0]], columns[pair[1]]) for pair in pairs}
        sums = self._by_user(np.concatenate(found))  # (columns, U); the samples are drawn once for all pairs
        cases = self._by_user(np.ones((1, len(self.users))))[0]
        if len(cases) > MOST_DRAWN:
            totals = self._by_poisson(np.vstack([sums, cases]))
            means = totals[:, :-1] / totals[:, -1:]
        else:
            drawn = (np.bincount(users, minlength=len(cases)) for users in self._draws(len(cases)))
            means = np.array([sums @ times / (cases @ times) for times in drawn])  # (samples, columns)
        of_all = sums.sum(axis=1) / cases.sum()
        bounds = {pair: np.percentile(means[:, pair[0]] - means[:, pair[1]], [2.5, 97.5]) for pair in pairs}
        return {pair: (float(of_all[pair[0]] - of_all[pair[1]]), bounds[pair].tolist()) for pair in pairs}

    def rate_difference(self, events: Column, cases: Column, other_events: Column, other_cases: Column) -> Difference:
        """Difference of two rates, each events over cases; NaN where fewer than two users have cases.

        Unlike in `difference` the two may have different cases, such as targets that only one model ranks high.
        """
        return self._of_rates(self._columns(events, cases, other_events, other_cases))

    def _of_rates(self, columns: np.ndarray) -> Difference:
        """From (2 or 4, S, R) events and cases."""
        with np.errstate(invalid="ignore"):  # no case, no rate: NaN
            found = _difference(columns.sum(axis=(1, 2)))
            if columns.shape[1] > 1:
                return found, self._with_seeds(columns, found)
            sums = self._by_user(columns[:, 0])
            sums = sums[:, (sums[1::2] > 0).any(axis=0)]  # the other users change no rate
            return found, self._bootstrap(sums) if sums.shape[1] > 1 or len(columns) == 2 else [float("nan")] * 2

    def _with_seeds(self, columns: np.ndarray, found: float) -> list[float]:
        """The interval of (2 or 4, S, R) events and cases."""
        totals = columns.sum(axis=(1, 2))
        deviations = np.zeros(columns.shape[1:])  # (S, R), what each value adds to the difference; their sum is 0
        for number, sign in zip(range(0, len(columns), 2), (1, -1), strict=False):
            events, cases = columns[number : number + 2]
            deviations += sign * (events - cases * totals[number] / totals[number + 1]) / totals[number + 1]
        cases_of_user = self._by_user(columns[1::2].sum(axis=(0, 1))[None])[0]
        by_user, weights = self._by_user(deviations)[:, cases_of_user > 0], cases_of_user[cases_of_user > 0]
        if len(weights) < 2:
            return [float("nan")] * 2
        half = _half_width(by_user, weights / weights.sum())
        return [found - half, found + half]

    def _columns(self, *columns: Column) -> np.ndarray:
        """(columns, S, R); what has no seeds is the same for each."""
        found = [np.atleast_2d(np.asarray(column, dtype=float)) for column in columns]
        lengths = [column.shape[1] for column in found]
        if set(lengths) != {len(self.users)} or not lengths[0]:
            raise ValueError(f"{lengths} values for {len(self.users)} users; an interval needs one for each user")
        return np.array(np.broadcast_arrays(*found))

    def _by_user(self, columns: np.ndarray) -> np.ndarray:
        """(..., R) values, added up to (..., U)."""
        _, cluster = np.unique(np.asarray(self.users), return_inverse=True)
        return np.array([np.bincount(cluster, weights=column) for column in columns])

    def _bootstrap(self, sums: np.ndarray) -> list[float]:
        if sums.shape[1] > MOST_DRAWN:
            totals = self._by_poisson(sums)
            rates = totals[:, ::2] / totals[:, 1::2]
            found = rates[:, 0] - rates[:, 1:].sum(axis=1)
        else:
            drawn = self._draws(sums.shape[1])
            found = np.array([_difference(sums[:, users].sum(axis=1)) for users in drawn])
        bounds = np.percentile(found, [2.5, 97.5])
        return [float(bound) for bound in bounds]

    def _by_poisson(self, sums: np.ndarray) -> np.ndarray:
        """(samples, C) totals of (C, U), each user counted Poisson(1) times in each sample."""
        rng, totals = np.random.default_rng(self.seed), np.zeros((self.num_samples, len(sums)))
        for start in range(0, sums.shape[1], USERS_AT_ONCE):
            part = sums[:, start : start + USERS_AT_ONCE]
            numbers = rng.integers(len(POISSON), size=(self.num_samples, part.shape[1]), dtype=np.uint16)
            totals += POISSON[numbers] @ part.T
        return totals

    def _draws(self, num_users: int) -> Iterator[np.ndarray]:
        """The users of each bootstrap sample."""
        rng = np.random.default_rng(self.seed)
        return (rng.integers(num_users, size=num_users) for _ in range(self.num_samples))


def _difference(sums: np.ndarray) -> float:
    """The rate of (events, cases), less that of two further sums where there are four."""
    rates = sums[::2] / sums[1::2]
    return float(rates[0] - rates[1:].sum())


def _half_width(by_user: np.ndarray, weights: np.ndarray) -> float:
    """Half of the interval of the sum of (S, U) deviations, with the share of cases of each user, (U,)."""
    num_seeds, num_users = by_user.shape
    of_seed, of_user = by_user.sum(axis=1, keepdims=True), by_user.sum(axis=0, keepdims=True)
    scale_seeds, scale_users = num_seeds / (num_seeds - 1), num_users / (num_users - 1)
    interaction = by_user - of_seed * weights - of_user / num_seeds
    both = scale_seeds * scale_users * float((interaction**2).sum())
    with_seeds, users = scale_seeds * float((of_seed**2).sum()), scale_users * float((of_user**2).sum())
    variance = users + max(with_seeds - both, 0.0)
    if not variance > 0:  # also nan
        return variance
    share = min(with_seeds / variance, 1.0) if with_seeds > both else 0.0
    of_seeds, of_users = stats.t.ppf(0.975, [num_seeds - 1, num_users - 1])
    return float((share * of_seeds + (1 - share) * of_users) * variance**0.5)
