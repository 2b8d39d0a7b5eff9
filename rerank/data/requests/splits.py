"""Splits of requests into rerank (training), valid and test.

R requests.
"""

import hashlib
from pathlib import Path

import numpy as np

from rerank.data import DataArguments
from rerank.data.requests.log import RequestLog
from rerank.data.tables import SPLITS
from rerank.models import names

LEVELS = ("rerank", "valid", "test")  # a split number is a place in it


def split_requests(log: RequestLog, args: DataArguments) -> np.ndarray:
    """The split of each request, as a number of LEVELS, (R,)."""
    if args.split == "by_time":
        return _split_by_time(log.times, args.valid_fraction, args.test_fraction)
    if args.split == "by_user":
        return _split_by_user(log, args)
    if args.split == "per_user":
        return _split_per_user(log, args.num_test, args.num_valid)
    return _split_as_given(log, args.valid_fraction)


def _time_at(times: np.ndarray, share: float) -> float:
    """The time of the request before which the given share of all lies."""
    return np.sort(times)[min(len(times) - 1, round(len(times) * share))]


def _split_by_time(times: np.ndarray, valid_fraction: float, test_fraction: float) -> np.ndarray:
    """The latest share is test, the share before it validation; one moment is never divided."""
    test_from, valid_from = _time_at(times, 1 - test_fraction), _time_at(times, 1 - test_fraction - valid_fraction)
    return np.where(times >= test_from, 2, np.where(times >= valid_from, 1, 0))


def _split_by_user(log: RequestLog, args: DataArguments) -> np.ndarray:
    """Fractions of the users, with all their requests; `test_users` names those of the test part.

    A digest of seed and id orders the users, so the draw is the same everywhere.
    """
    _, first_requests = np.unique(log.users, return_index=True)
    request_ids, user_ids = log.request_ids.to_pylist(), log.user_ids.to_pylist()
    keys = [user_ids[u] or f"request {request_ids[row]}" for u, row in enumerate(first_requests.tolist())]
    digests = [hashlib.md5(f"{args.seed} {key}".encode()).hexdigest() for key in keys]
    drawn = np.array(sorted(range(len(keys)), key=digests.__getitem__))
    level = np.zeros(len(keys), dtype=int)
    if args.test_users:
        level[_read_users(args.test_users, user_ids)] = 2
    else:
        level[drawn[: max(1, round(len(keys) * args.test_fraction))]] = 2
    others = drawn[level[drawn] == 0]
    size = len(others) if args.test_users else len(keys)
    level[others[: max(1, round(size * args.valid_fraction))]] = 1
    return level[log.users]


def _read_users(value: str, user_ids: list[str | None]) -> list[int]:
    """The numbers of the users that a file names, one a line."""
    path = Path(names.locate(value, "test_users"))
    if not path.is_file():
        raise FileNotFoundError(f"test_users is {path}, which does not exist; correct the path")
    numbers = {user_id: number for number, user_id in enumerate(user_ids) if user_id is not None}
    found = []
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        user_id = " ".join(text.split())
        if user_id and user_id not in numbers:
            raise ValueError(f"{path} line {line}: no request is of the user {user_id!r}; correct or remove the line")
        found += [numbers[user_id]] if user_id else []
    if not found:
        raise ValueError(f"{path} names no user; give one id a line")
    return found


def _split_per_user(log: RequestLog, num_test: int, num_valid: int) -> np.ndarray:
    """A user's last requests are test, those before them validation; a request without a user trains."""
    order = np.lexsort((np.arange(len(log)), log.ordering_times, log.users))
    sizes = np.bincount(log.users)
    ends = np.cumsum(sizes)
    from_end = np.empty(len(log), dtype=int)
    from_end[order] = ends[log.users[order]] - 1 - np.arange(len(log))
    level = np.where(from_end < num_test, 2, np.where(from_end < num_test + num_valid, 1, 0))
    is_anonymous = log.user_ids.is_null().to_numpy(zero_copy_only=False)[log.users]
    return np.where(is_anonymous, 0, level)


def _split_as_given(log: RequestLog, valid_fraction: float) -> np.ndarray:
    """The split column; where it has no validation part, the latest share of its training part becomes one."""
    given = [SPLITS[text.lower()] for text in log.raw_splits.to_pylist()]
    level = np.array([{"train": 0, "valid": 1, "test": 2}[split] for split in given])
    is_training = level == 0
    if (level == 1).any() or not is_training.any():
        return level
    if np.isnan(log.times[is_training]).any():
        raise ValueError(
            "split is given and has no valid part, and without a time no training requests are the latest; "
            "map request_columns: {time: COLUMN} or mark requests as valid"
        )
    valid_from = _time_at(log.times[is_training], 1 - valid_fraction)
    return np.where(is_training & (log.times >= valid_from), 1, level)
