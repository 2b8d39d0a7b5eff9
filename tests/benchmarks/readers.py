"""Seconds and peak memory of reading interactions, against plain DuckDB and polars.

    python -m tests.benchmarks.readers [--lines 10000000] [--kinds csv jsonl parquet]

A synthetic log of user, item, rating and time is written as CSV, JSONL and Parquet. Three readers take its columns
user, item and time: the data stage's, which checks every row besides, a plain DuckDB query with types guessed, and
polars where it is installed (`pip install polars`). Each reading is a process of its own, the readers taking turns;
seconds are medians of --repeats rounds, after the same reader has read a log of one line, and without imports; memory
is the peak of the process. A busy machine is refused. Ends with one JSON line.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

from tests.benchmarks.busy import busy_share, refuse_busy

COLUMNS = ["user", "item", "time"]
KINDS = ("csv", "jsonl", "parquet")
LOG = """
SELECT 'U' || lpad((hash(n) % (1 + {lines} // 10))::VARCHAR, 9, '0') AS user,
    'B' || lpad((hash(n + {lines}) % 200000)::VARCHAR, 9, '0') AS item,
    1 + hash(n) % 5 AS rating, 1500000000 + n // 3 AS time
FROM range({lines}) AS numbers(n)
"""


def write_logs(folder: Path, lines: int, kinds: list[str]) -> dict[str, Path]:
    """The same interactions as a file of each kind."""
    paths = {kind: folder / f"log.{kind}" for kind in kinds}
    for kind, path in paths.items():
        form = {"csv": "csv, header", "jsonl": "json", "parquet": "parquet"}[kind]
        duckdb.sql(f"COPY ({LOG.format(lines=lines)}) TO '{path}' (format {form})")
    return paths


def by_rerank(kind: str, path: str) -> Callable[[], int]:
    """The reader of the data stage."""
    import ibis

    from rerank.data import DataArguments, tables
    from rerank.data.filters import count
    from rerank.data.sources.opening import open_source

    args = DataArguments(run_dir="run", interactions=path)

    def read() -> int:
        with tempfile.TemporaryDirectory() as folder:
            con = ibis.duckdb.connect(temp_directory=folder)
            return count(tables.read_interactions(con, open_source(con, args.asked("interactions")), args)[0])

    return read


def by_duckdb(kind: str, path: str) -> Callable[[], int]:
    """A query."""
    function = {"csv": "read_csv", "jsonl": "read_json", "parquet": "read_parquet"}[kind]

    def read() -> int:
        con = duckdb.connect()
        con.execute(f"CREATE TABLE log AS SELECT {', '.join(COLUMNS)} FROM {function}('{path}')")
        found = con.execute("SELECT count(*) FROM log").fetchone()
        assert found is not None
        return found[0]

    return read


def by_polars(kind: str, path: str) -> Callable[[], int]:
    """Its reading functions."""
    import polars

    def read() -> int:
        if kind == "jsonl":
            return len(polars.read_ndjson(path).select(COLUMNS))
        return len({"csv": polars.read_csv, "parquet": polars.read_parquet}[kind](path, columns=COLUMNS))

    return read


READERS = {"rerank": by_rerank, "duckdb": by_duckdb, "polars": by_polars}


def measure(reader: str, kind: str, path: str) -> None:
    """Print lines, seconds and peak GB of one reading in this process."""
    with tempfile.TemporaryDirectory() as folder:
        READERS[reader](kind, str(write_logs(Path(folder), 1, [kind])[kind]))()  # what a library does once
    read = READERS[reader](kind, path)
    begun = time.perf_counter()
    lines = read()
    seconds = time.perf_counter() - begun
    print(json.dumps([lines, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9]))


def measured(reader: str, kind: str, path: Path) -> tuple[int, float, float]:
    """Lines, seconds and peak GB of one reading in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.readers", "--measure", reader, kind, str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{reader} failed on {kind}: {done.stderr[-2000:]}")
    lines, seconds, gigabytes = json.loads(done.stdout.splitlines()[-1])
    return lines, seconds, gigabytes


def compare(paths: dict[str, Path], lines: int, repeats: int) -> list[dict[str, float | str]]:
    """A record of each kind and reader: median seconds, peak memory, and the ratio of seconds to DuckDB's."""
    readers = [name for name in READERS if name != "polars" or importlib.util.find_spec("polars")]
    records: list[dict[str, float | str]] = []
    for kind, path in paths.items():
        found: dict[str, list[tuple[float, float]]] = {reader: [] for reader in readers}
        for _ in range(repeats):
            for reader in readers:
                num_read, seconds, gigabytes = measured(reader, kind, path)
                if num_read != lines:
                    raise SystemExit(f"{reader} read {num_read} of {lines} lines of {kind}")
                found[reader].append((seconds, gigabytes))
        medians = {reader: statistics.median(seconds for seconds, _ in runs) for reader, runs in found.items()}
        for reader, runs in found.items():
            peak, ratio = max(gigabytes for _, gigabytes in runs), medians[reader] / medians["duckdb"]
            records.append(
                {"kind": kind, "reader": reader, "seconds": medians[reader], "peak_gb": peak, "ratio": ratio}
            )
    return records


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000_000, help="of the log (%(default)s)")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS, help="of files (all)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds to take the median of (%(default)s)")
    parser.add_argument("--measure", nargs=3, metavar=("READER", "KIND", "PATH"), help="one reading in this process")
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    refuse_busy(busy_share())
    with tempfile.TemporaryDirectory() as folder:
        records = compare(write_logs(Path(folder), args.lines, args.kinds), args.lines, args.repeats)
    table = Table(title=f"{args.lines:,} lines; user, item and time")
    for column in ("kind", "reader", "seconds", "of DuckDB's", "peak GB"):
        table.add_column(column, justify="left" if column in ("kind", "reader") else "right")
    for record in records:
        numbers = (f"{record['seconds']:.2f}", f"{record['ratio']:.2f}", f"{record['peak_gb']:.2f}")
        table.add_row(str(record["kind"]), str(record["reader"]), *numbers)
    Console().print(table)
    print(json.dumps({"lines": args.lines, "readers": records}))


if __name__ == "__main__":
    main()
