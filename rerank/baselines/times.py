"""Units of times since 1970."""

import math

import numpy as np

MILLISECONDS = 1e11  # the least time that is one in milliseconds, of 1973; in seconds it is in the year 5138
THIS_CENTURY = 1e9  # seconds, of 2001; as milliseconds still of January 1970
_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")


def in_seconds(times: np.ndarray | float) -> np.ndarray:
    """Times in seconds, of any shape, from times in seconds or milliseconds."""
    return np.where(np.asarray(times) >= MILLISECONDS, np.asarray(times) / 1000, times)


def unit_of(time: float) -> str:
    """The unit in which a time is one of our days."""
    steps = math.floor(math.log10(time / MILLISECONDS) / 3) + 1 if time >= MILLISECONDS else 0
    return _UNITS[min(steps, len(_UNITS) - 1)]
