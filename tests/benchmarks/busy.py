"""A benchmark on a busy machine says nothing, so it does not start there."""

import psutil

MOST_BUSY, WATCHED_SECONDS = 0.1, 3.0  # share of the processors that others may take, and over how long it is measured


def busy_share(seconds: float = WATCHED_SECONDS) -> float:
    """The share of all processors' time that is in use."""
    return psutil.cpu_percent(seconds) / 100


def refuse_busy(share: float) -> None:
    """End where others compute: a time that is taken then is worth nothing."""
    if share > MOST_BUSY:
        raise SystemExit(
            f"the machine is busy: its processors were {share:.0%} in use over {WATCHED_SECONDS:.0f} s, and may be "
            f"{MOST_BUSY:.0%}; run this alone"
        )
