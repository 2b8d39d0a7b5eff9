"""The embedded DuckDB that reads files and counts interactions, in bounded memory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ibis
import psutil

MOST_MEMORY = 6 * 2**30  # bytes that it holds before it spills; a process has about as much again beside it


@contextmanager
def database(most: int = MOST_MEMORY, part: int = 2, on_disk: bool = False) -> Iterator[ibis.BaseBackend]:
    """A DuckDB that spills into a folder that goes with it.

    Args:
        most: Bytes that it holds.
        part: At most one such part of the machine's memory.
        on_disk: Whether tables that are created stand in a file there, not in memory.
    """
    memory = min(most, psutil.virtual_memory().total // part)
    with tempfile.TemporaryDirectory() as folder:  # else it spills into the working folder
        path = Path(folder) / "tables.duckdb" if on_disk else ":memory:"
        con = ibis.duckdb.connect(path, temp_directory=folder, memory_limit=f"{memory >> 20}MiB")
        try:
            yield con
        finally:
            con.disconnect()
