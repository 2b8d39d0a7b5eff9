"""Time of looking at rollouts, on synthetic stores; part of `tests.benchmarks.rollouts`.

- `inspect_first_screen_seconds_1m`: from starting `rerank inspect` on a terminal until the list of a million rollouts
  stands there.
- `report_seconds_100k`, `report_megabytes_100k`: `rerank report` of a run that has 100,000 rollouts and nothing else,
  and the page it writes, a megabyte being a million bytes.

Times are medians, each of a process of its own, interpreter and imports included.
"""

import os
import pty
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.synthetic_rollouts import GROUP_SIZE, write_synthetic_store

FEW, MANY = 100_000, 1_000_000


def inspect_first_screen_seconds(run_dir: Path, num_rollouts: int) -> float:
    """Seconds until a terminal shows the first page of the run's groups."""
    terminal, inside = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "45"}
    begin = time.perf_counter()
    browser = subprocess.Popen(
        [sys.executable, "-m", "rerank.cli", "inspect", str(run_dir)],
        stdin=inside, stdout=inside, stderr=inside, env=environment,
    )  # fmt: skip
    awaited, screen = f"of {num_rollouts // GROUP_SIZE:,}".encode(), b""
    while awaited not in screen or b"all_equal" not in screen:  # the status line, and a line of the list
        screen += os.read(terminal, 65536)
    seconds = time.perf_counter() - begin
    browser.kill()
    browser.wait()
    for end in (terminal, inside):
        os.close(end)
    return seconds


def report_seconds(run_dir: Path, page: Path) -> float:
    """Seconds that `rerank report` takes to write a page."""
    begin = time.perf_counter()
    line = [sys.executable, "-m", "rerank.cli", "report", str(run_dir), "--out", str(page)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Every figure by name."""
    for num_rollouts in (FEW, MANY):
        if not (folder / str(num_rollouts)).exists():
            print(f"writing {num_rollouts:,} rollouts", flush=True)
            write_synthetic_store(folder / str(num_rollouts), num_rollouts)
    first_screens = [inspect_first_screen_seconds(folder / str(MANY), MANY) for _ in range(repeats)]
    page = folder / "report.html"
    reports = [report_seconds(folder / str(FEW), page) for _ in range(repeats)]
    return {
        "inspect_first_screen_seconds_1m": statistics.median(first_screens),
        "report_seconds_100k": statistics.median(reports),
        "report_megabytes_100k": page.stat().st_size / 1e6,
    }
