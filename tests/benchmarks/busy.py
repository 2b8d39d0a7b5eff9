"""A benchmark on a busy machine says nothing, so it does not start there."""

import sys
import time

import psutil

MOST_BUSY, WATCHED_SECONDS = 0.1, 3.0  # share of the processors that others may take, and over how long it is measured
WAITING_SECONDS, PAUSE_SECONDS = 600.0, 10.0  # for a quiet machine, and between two looks


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


def wait_until_quiet() -> None:
    """Wait some minutes for others to end; `refuse_busy` where they do not."""
    until = time.monotonic() + WAITING_SECONDS
    while (share := busy_share()) > MOST_BUSY and time.monotonic() < until:
        print(f"the machine is busy ({share:.0%}); waiting", file=sys.stderr)
        time.sleep(PAUSE_SECONDS)
    refuse_busy(share)
