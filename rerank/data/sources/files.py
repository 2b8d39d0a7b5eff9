"""The files that a recipe names: one, a glob or a folder of parts, gzipped or not, in any encoding."""

import codecs
import contextlib
import glob
import gzip
import io
import itertools
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import ibis

from rerank.data.asked import FORMAT_OF_SUFFIX, Asked, suffix_of
from rerank.launch.files import glob_of

TABLES = ("csv", "tsv", "jsonl", "parquet", "recbole")  # of which a folder may hold parts
SPLIT_WORDS = {"train", "test", "valid", "validation", "dev"}  # of file names; `datasets` reads such Parquet


def find_files(asked: Asked) -> tuple[str, list[str]]:
    """The format of what a recipe names, and its files in order; of format datasets none."""
    path = asked.path()
    if asked.format == "datasets":
        return "datasets", []
    if Path(path).is_dir():
        return _parts(asked, path)
    if Path(path).is_file():
        return asked.format_of(path), [path]
    files = [str(file) for file in glob_of(path)]
    if not files and glob.has_magic(path):
        raise FileNotFoundError(f"{asked.named} is {path}, a pattern that no file matches; correct it")
    if not files:
        asked.format_of(path)  # refuses a name that would not help
        raise FileNotFoundError(f"{asked.named} is {path}, which does not exist; correct the path")
    return _one_format(asked, path, files), files


def _one_format(asked: Asked, path: str, files: Sequence[str]) -> str:
    formats = {asked.format_of(file): file for file in files}
    if len(formats) > 1:
        kinds = ", ".join(f"{Path(file).name} ({form})" for form, file in formats.items())
        raise ValueError(f"{asked.named} is {path}, which holds files of several formats: {kinds}; name those of one")
    return next(iter(formats))


def _parts(asked: Asked, folder: str) -> tuple[str, list[str]]:
    """The parts of a table in a folder; a folder with splits in its names, or without a table, is for `datasets`.

    Splits of text are refused: `datasets` would take ids such as `007` for numbers.
    """
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file() and not _is_hidden(path, folder))
    if any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "datasets", []
    tables = [str(path) for path in found if FORMAT_OF_SUFFIX.get(suffix_of(path)) in TABLES or asked.format in TABLES]
    has_splits = any(SPLIT_WORDS & {*re.split("[^a-z]+", path.stem.lower())} for path in found)
    if not tables or any(path.suffix == ".py" for path in found):
        return "datasets", []
    form = _one_format(asked, folder, tables)
    if not has_splits or asked.format != "auto":
        return form, tables
    if form == "parquet":
        return "datasets", []
    listed = ", ".join(Path(table).name for table in tables[:4])
    depth = "" if all(Path(table).parent == Path(folder) for table in tables) else "**/"
    parts = f"{folder}/{depth}*{Path(tables[0]).suffix}"
    problem = f"{asked.named} is {folder}, whose files are named as splits ({listed})"
    raise ValueError(f"{problem}; name one of them, or {parts} for all as one table")


def _is_hidden(path: Path, folder: str) -> bool:
    """Whether a file, or a folder that it is in, is no data: `.ipynb_checkpoints`, `_temporary`, `_SUCCESS`."""
    return any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts)


def open_text(path: str, encoding: str = "utf-8") -> io.TextIOBase:
    """A text file, gzipped if named so, without a byte-order mark."""
    opener = gzip.open if path.endswith(".gz") else open
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    return opener(path, "rt", encoding="utf-8-sig" if is_utf8 else encoding, newline="")


@contextlib.contextmanager
def readable(asked: Asked, path: str) -> Iterator[None]:
    """Refuse, while a file is read, text of another encoding, and a file that is cut off or not gzipped as named."""
    try:
        yield
    except UnicodeError as error:
        name = "UTF-8" if asked.encoding == "utf-8" else asked.encoding
        cure = asked.cure(f"set {asked.csv_key}: {{encoding: latin-1}}, or another that it has", "write it as UTF-8")
        raise ValueError(f"{path} is not {name} text ({error}); {cure}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        if str(error).startswith("Not a gzipped file"):
            raise ValueError(f"{path} is not gzipped ({error}); rename it without .gz") from None
        raise ValueError(f"{path} is cut off or damaged ({error}); copy the file again") from None


def refuse_empty_file(asked: Asked, path: str) -> None:
    """Refuse a file that is empty, or no text of its encoding."""
    with readable(asked, path), open_text(path, asked.encoding) as file:
        start = file.read(1)
    if not start:
        raise ValueError(f"{path} is empty; give a file with at least one row")


def scratch_file(con: ibis.BaseBackend, suffix: str) -> str:
    """A new file in the folder into which DuckDB spills."""
    folder = con.con.execute("SELECT current_setting('temp_directory')").fetchone()[0]
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = tempfile.NamedTemporaryFile(dir=folder, suffix=suffix, delete=False)
    handle.close()
    return handle.name


def in_utf8(con: ibis.BaseBackend, asked: Asked, path: str) -> str:
    """The file, or a copy of it in UTF-8; refuses an empty one."""
    refuse_empty_file(asked, path)
    if codecs.lookup(asked.encoding).name == "utf-8":
        return path
    copy = scratch_file(con, f".{suffix_of(path)}")
    with readable(asked, path), open_text(path, asked.encoding) as file:
        with open(copy, "w", encoding="utf-8", newline="") as target:
            shutil.copyfileobj(file, target)
    return copy


def line_of_row(files: Sequence[str], row: int, quote: str, num_header: int, left_out: Sequence[int] = ()) -> str:
    """The file and the line at which a row of text begins, both counted as an editor does.

    Args:
        files: In order, in UTF-8.
        row: From 0, of all files together; blank lines are none.
        quote: Character between which a line break is part of a value, or nothing.
        num_header: Lines before the rows of each file.
        left_out: Lines of a single file that were not read.
    """
    for path in files:
        with open_text(path) as file:
            starts = itertools.islice(_row_lines(file, quote), num_header, None)
            for line in starts:
                if line in left_out:
                    continue
                if row == 0:
                    return f"{path} line {line}"
                row -= 1
    raise AssertionError("a row that was read stands in no file")


def _row_lines(file: io.TextIOBase, quote: str) -> Iterator[int]:
    is_open = False
    for number, line in enumerate(file, start=1):
        if line.strip("\r\n") and not is_open:
            yield number
        if quote and line.count(quote) % 2:
            is_open = not is_open
