"""The reader that a table needs."""

import ibis

from rerank.data.asked import Asked, suffix_of
from rerank.data.sources.columnar import ParquetFiles, open_dataset
from rerank.data.sources.delimited import Delimited
from rerank.data.sources.files import find_files
from rerank.data.sources.json_lines import JsonLines, open_json_parts
from rerank.data.sources.sequences import Sequences
from rerank.data.sources.source import Source


def open_source(con: ibis.BaseBackend, asked: Asked) -> Source:
    """The table that a recipe asks for, none of whose cells has been read.

    Raises:
        FileNotFoundError: When nothing is there.
        ValueError: When it is empty, of several tables, or not of its format.
    """
    form, files = find_files(asked)
    if asked.csv.keys() & {"separator", "header"} and form not in ("csv", "tsv", "recbole"):
        raise ValueError(f"{asked.csv_key} is {asked.csv} but {asked.path()} is read as {form}; remove it")
    if form == "datasets":
        return open_dataset(con, asked)
    if form == "jsonl":
        return JsonLines(con, asked, asked.path(), files)
    if form == "parquet":
        return ParquetFiles(con, asked, asked.path(), files)
    if form != "s3rec":
        return Delimited(con, asked, asked.path(), files, form)
    if all(suffix_of(file) == "json" for file in files):
        return open_json_parts(con, asked, asked.path(), files)
    if len(files) > 1:
        raise ValueError(f"{asked.named} is {asked.path()}, several files of sequences; name one")
    return Sequences(con, asked, files[0])
