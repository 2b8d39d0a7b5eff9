"""The message of a disk that fills."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FULL = ("No space left on device", "failed to offload data block", "max_temp_directory_size")  # in errors of engines


@contextlib.contextmanager
def told_of_full_disk(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Within it a disk that fills ends in one line that says how much was needed.

    Args:
        folder: Into which files are written.
        needed: Bytes that the tables of interactions and of rows take at most, where it is known.

    Raises:
        ValueError: When the disk is full.
    """
    try:
        yield
    except Exception as error:  # of Python, Arrow, DuckDB or Spark
        if not _says_full(error):
            raise
        free = shutil.disk_usage(folder).free
        size = "" if needed is None else f", and the interactions and rows take up to {_gigabytes(needed)}"
        cure = f"free that disk, choose another --out, or set TMPDIR where {tempfile.gettempdir()} is full"
        raise ValueError(f"the disk of {folder} is full: {_gigabytes(free)} are free{size}; {cure}") from None


def _says_full(error: BaseException) -> bool:
    is_ours = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return is_ours or any(words in str(error) for words in _FULL)


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
