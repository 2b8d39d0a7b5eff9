"""Files as people have them: columns, cells and parts whose types or places could be taken for others."""

import pyarrow as pa
import pytest
from real_files import read_interactions, read_items, write


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(message, *args, of=read_interactions, **options):
    """The line with which a file is refused."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        of(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_column_named_as_our_places_changes_no_order():
    columns = {"user": ["u"] * 3, "item": list("abc"), "source_row": [2, 1, 0]}
    assert [item for _, item, _ in read_interactions("t.parquet", pa.table(columns))[0]] == list("abc")
    found = read_items("i.parquet", pa.table(columns), "place", item_columns={"place": "source_row"})[0]
    assert [(row[0], row[-1]) for row in found] == [("a", "2"), ("b", "1"), ("c", "0")]


def test_parts_of_different_types_are_refused_where_they_are_wanted(tmp_path):
    write(tmp_path / "1.parquet", pa.table({"user": ["u"], "item": [7], "other": pa.nulls(1)}))
    write(tmp_path / "2.parquet", pa.table({"user": ["v"], "item": ["007"], "other": ["08"]}))
    refused("^2.parquet has the column 'item' as string but 1.parquet as int64; write it as one type", "*.parquet")
    rows, _ = read_interactions("*.parquet", columns={"item": "other", "user": "user"}, on_bad_rows="drop")
    assert rows == [("v", "08", None)]
