"""Time of looking at rollouts, on synthetic stores: the terminal browser's first screen and the report.

- `inspect_first_screen_seconds_1m`: from starting `rerank inspect` on a terminal until the list of a million rollouts
  stands there, interpreter and imports included; the median of --repeats, each a process of its own.

On a quiet machine, files in the operating system's cache:

    python -m tests.benchmarks.rollout_viewers
"""

import argparse
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
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


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Every figure by name."""
    for num_rollouts in (FEW, MANY):
        if not (folder / str(num_rollouts)).exists():
            print(f"writing {num_rollouts:,} rollouts", flush=True)
            write_synthetic_store(folder / str(num_rollouts), num_rollouts)
    first_screens = [inspect_first_screen_seconds(folder / str(MANY), MANY) for _ in range(repeats)]
    return {"inspect_first_screen_seconds_1m": statistics.median(first_screens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times of each, of which the median counts")
    parser.add_argument("--folder", type=Path, help="where the stores are kept for the next call; none by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(args.folder or Path(temporary), args.repeats)
    for name, value in figures.items():
        print(f"{name:34}{value:8.2f}")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
