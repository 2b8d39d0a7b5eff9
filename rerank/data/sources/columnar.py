"""Parquet files and `datasets`: columns keep their types, but for text of CSV and JSON, which is not typed at all."""

import contextlib
import gzip
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.data.asked import Asked
from rerank.data.sources.delimited import different_columns
from rerank.data.sources.files import readable, scratch_file
from rerank.data.sources.json_lines import open_json_parts
from rerank.data.sources.source import Cells, Source, in_memory


class ParquetFiles(Source):
    """Files of one table; their names are those of the files, then those of folders such as `day=1`."""

    def __init__(self, con: ibis.BaseBackend, asked: Asked, name: str, files: Sequence[str]) -> None:
        """Over files of one table; refuses those whose columns differ."""
        self.as_given, self.files = list(files), [_unzipped(con, asked, file) for file in files]
        super().__init__(con, asked, name, [])
        self.schemas = [self._schema(file) for file in self.files]
        columns = [schema.names for schema in self.schemas]
        for file, of_file in zip(files, columns, strict=True):
            if {*of_file} != {*columns[0]}:
                raise different_columns(asked, {files[0]: columns[0], file: of_file})
        try:
            # DuckDB casts all to the types of the first file, or by names to types that hold those of every one
            is_mixed = any(not schema.equals(self.schemas[0]) for schema in self.schemas)
            table = con.read_parquet(self.files, union_by_name=is_mixed)
        except duckdb.Error as error:
            raise self.unreadable(error) from None
        self.columns = [*columns[0], *table.columns[len(columns[0]) :]]
        self.table = table.rename({f"c{place}": name for place, name in enumerate(table.columns)})

    def _read(self, columns: list[str], as_text: bool) -> Cells:
        for column in columns:
            self._refuse_types(column)
        return super()._read(columns, as_text)

    def _refuse_types(self, column: str) -> None:
        """Refuse a column that has numbers in one file and text in another, as `7` and `007` are no one id."""
        if column not in self.schemas[0].names:  # of a folder such as `day=1`
            return
        types = [schema.types[schema.names.index(column)] for schema in self.schemas]
        pairs = zip(self.as_given, types, strict=True)
        known = [(file, of_file) for file, of_file in pairs if not _kind(of_file).endswith("null")]
        for file, of_file in known:
            if _kind(of_file) != _kind(known[0][1]):
                problem = f"{file} has the column {column!r} as {of_file} but {known[0][0]} as {known[0][1]}"
                raise ValueError(f"{problem}; write it as one type, of ids string, in every file")

    def _schema(self, file: str) -> pa.Schema:
        try:
            return pq.read_schema(file)
        except pa.ArrowInvalid as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.name} cannot be read: {reason}; correct the row or the format") from None

    def place(self, source_row: int) -> str:
        """The file and row of one input row."""
        for given, file in zip(self.as_given, self.files, strict=True):
            size = pq.read_metadata(file).num_rows
            if source_row < size:
                return f"{given} row {source_row + 1}"
            source_row -= size
        raise AssertionError("a row that was read stands in no file")


def _kind(of: pa.DataType) -> str:
    """The kind of a type, whatever its size."""
    if pa.types.is_dictionary(of):
        return _kind(of.value_type)
    if pa.types.is_list(of) or pa.types.is_large_list(of):
        return f"list of {_kind(of.value_type)}"
    if pa.types.is_timestamp(of):
        return "timestamp"
    if pa.types.is_integer(of):
        return "integer"
    if pa.types.is_floating(of):
        return "floating"
    return "string" if pa.types.is_large_string(of) else str(of)


def _unzipped(con: ibis.BaseBackend, asked: Asked, file: str) -> str:
    if not file.endswith(".gz"):
        return file
    copy = scratch_file(con, ".parquet")
    with readable(asked, file), gzip.open(file) as packed, open(copy, "wb") as target:
        shutil.copyfileobj(packed, target)
    return copy


def open_dataset(con: ibis.BaseBackend, asked: Asked) -> Source:
    """A `datasets` folder or name, written `NAME[:CONFIG][@SPLIT]`; JSON in it is read as other JSON is."""
    path = asked.path()
    name, _, split = path.partition("@")
    name, _, config = name.partition(":")
    with _loadable(asked):
        splits = _splits(name, config or None, split)
    if split not in splits and (split or len(splits) > 1):
        raise ValueError(
            f"{asked.named} is {path}, which has the splits {', '.join(splits)}; name one, as {name}@SPLIT"
        )
    found = splits[split] if split else next(iter(splits.values()))
    if isinstance(found, list):
        with _loadable(asked):
            files = list(map(_here, found))
        return open_json_parts(con, asked, path, files)
    table = found.with_format("arrow")[:]
    return Source(con, asked, path, table.column_names, in_memory(table))


@contextlib.contextmanager
def _loadable(asked: Asked) -> Iterator[None]:
    """Within it errors of `datasets`, which are of many kinds and some of several lines, are one line."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{asked.named} is {asked.path()}, no data set on disk or on the hub: {reason}"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        cure = "name its files, such as FOLDER/*.parquet"
        raise ValueError(f"{asked.named} is {asked.path()}, which datasets cannot load: {reason}; {cure}") from None


def _splits(name: str, config: str | None, split: str) -> Mapping[str, Any]:
    """The data set of each split, CSV as text throughout, or a list of its JSON files.

    `datasets` would take ids such as `007` in CSV and 20 digits in JSON for numbers, and `2024-03-01` for a date.
    """
    import datasets

    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(name)
        return saved if isinstance(saved, datasets.DatasetDict) else {split: saved}
    builder = datasets.load_dataset_builder(name, config)
    if builder.info.builder_name == "json" and not builder.config.field:
        return {str(one): list(files) for one, files in builder.config.data_files.items()}
    loaded = datasets.load_dataset(name, config)
    first = next(iter(loaded.values()))
    if builder.info.builder_name != "csv":
        return loaded
    features = datasets.Features({column: datasets.Value("string") for column in first.column_names})
    return datasets.load_dataset(name, config, features=features, keep_default_na=False)


def _here(file: str) -> str:
    """The path of a file, downloaded if it is not on this machine."""
    import datasets

    return file if Path(file).is_file() else datasets.DownloadManager().download_and_extract(file)
