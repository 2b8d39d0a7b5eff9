"""Spark and DuckDB make the same tables of data, counts and candidates: `pytest tests/test_backends.py -m spark`.

Both run for real, Spark on two threads of this machine, and fetching more than MOST rows from it fails.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from request_run import DAY, draw_requests, write_requests
from toy_recipe import TOY
from toy_run import finish

from rerank import candidates, data
from rerank.candidates import counting, making
from rerank.launch import recipe
from rerank.launch.engines import check_backend
from rerank.launch.values import BACKENDS
from rerank.rows.sequences import SEQUENCES, STARTS

MOST, RANKED = 100_000, 3000  # rows that may be fetched, and that lists are made for
FETCHES = ("collect", "toPandas", "toArrow", "toLocalIterator", "_collect_as_arrow")  # of a DataFrame
LEFT = {"spark-warehouse", "metastore_db", "derby.log"}  # what Spark leaves in the working folder, if it is let
KEYS = {"items": "item", "users": "user", "interactions": ["user", "position"], "rows": "row_id"}
SUBMIT = [
    *("--master", "local[2]", "--driver-memory", "1g", "--conf", "spark.sql.shuffle.partitions=2"),
    *(
        "--conf",
        "spark.sql.codegen.wholeStage=false",
        "--driver-java-options",
        "-XX:TieredStopAtLevel=1",
    ),  # small data
]
LOG = """
COPY (
    SELECT 'u' || floor({users} * pow(hash(n) / 2.0**64, 2))::INT AS user,
        'i' || floor(1000 * pow(hash(-n) / 2.0**64, 3))::INT AS item, hash(n + {size}) % 50000 AS time
    FROM range({size}) AS numbers(n) ORDER BY hash(n + 7)
) TO '{path}'
"""
GIVEN = """
COPY (
    SELECT 'u' || n % 40 AS user, 'i' || hash(n) % 30 AS item, n % 3 AS place,
        CASE WHEN n % 7 > 0 THEN n // 90 END AS time,
        (['train', 'train', 'valid', 'test'])[1 + (hash(n + 1) % 4)::INT] AS split
    FROM range(400) AS numbers(n)
) TO '{path}'
"""


def missing() -> str:
    """Why Spark cannot run here, or nothing."""
    try:
        check_backend("pyspark")
    except ValueError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.spark, pytest.mark.skipif(bool(missing()), reason=missing())]


def limited(fetch, most=MOST):
    """A method of a DataFrame that fails once it returns more rows, or a stream of them."""

    @functools.wraps(fetch)
    def fetch_few(*args, **options):
        found = fetch(*args, **options)
        number = sum(len(batch) for batch in found) if fetch.__name__ == "_collect_as_arrow" else len(found)
        assert number <= most, f"{fetch.__name__} of {number} rows"
        return found

    return fetch_few


@pytest.fixture(scope="module", autouse=True)
def spark():
    """A Java process of few rows, which ends with the module."""
    from pyspark import SparkContext
    from pyspark.sql.classic.dataframe import DataFrame

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", " ".join([*SUBMIT, "pyspark-shell"]))
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        for name in FETCHES:
            patch.setattr(DataFrame, name, limited(getattr(DataFrame, name)))
        yield
    if SparkContext._gateway is not None:
        SparkContext._gateway.shutdown()
        SparkContext._gateway.proc.stdin.close()  # at which the process ends
        SparkContext._gateway = SparkContext._jvm = None


def compare(folder: Path, lists: dict | None = None, **options) -> dict:
    """Run the stages data and candidates with both backends in empty folders; returns what both count of the data.

    Args:
        folder: For the runs.
        lists: Options of the candidates stage.
        options: Of the data stage.
    """
    metrics, before = [], {path.name for path in Path().iterdir()}
    for backend in BACKENDS:
        (folder / backend / "data").mkdir(parents=True)
        args = data.DataArguments(run_dir="run", backend=backend, **options)
        metrics.append(data.main(args, folder / backend / "data"))
    runs = [folder / backend for backend in BACKENDS]
    names = [{path.name for path in (run / "data").iterdir()} for run in runs]
    assert names[0] == names[1]
    for name, keys in KEYS.items():
        found = assert_same_tables(*(run / f"data/{name}.parquet" for run in runs))
        assert found.sort_values(keys).index.equals(found.index)  # the file has this order
    for name in (SEQUENCES, STARTS):
        assert np.array_equal(*(np.load(run / "data" / name) for run in runs))
    assert metrics[0] == metrics[1] and len(found) > 0
    for run, of_data in zip(runs, metrics, strict=True):
        finish(run / "data", of_data, options)
        rows = pq.read_table(run / "data/rows.parquet")
        places = np.linspace(0, len(rows) - 1, min(len(rows), RANKED)).astype(int)
        pq.write_table(rows.take(pa.array(places)), run / "data/rows.parquet")
    compare_candidates(runs, **{"num_candidates": 5, "exclude_seen": False, **(lists or {})})
    assert not LEFT & {path.name for path in Path().iterdir()} - before
    return metrics[0]


def compare_candidates(runs: list[Path], **options) -> None:
    """Run the stage candidates on a run by each backend: equal tables and counts."""
    for run, backend in zip(runs, BACKENDS, strict=True):
        (run / "candidates").mkdir()
        args = candidates.CandidatesArguments(run_dir=str(run), backend=backend, **options)
        candidates.check(args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(counting, "PART", 700)  # several parts a call
            if backend == "pyspark":
                patch.setattr(making, "list_features", None)  # facts are made by processes of Spark
            candidates.main(args, run / "candidates")
    for name in candidates.FILES.values():
        assert_same_tables(*(run / f"candidates/{name}.parquet" for run in runs))
    first, second = (dict(np.load(run / "candidates/evidence.npz")) for run in runs)
    assert first.keys() == second.keys() and first["near_data"].any()
    for name, values in first.items():
        assert values.dtype == second[name].dtype and np.allclose(values, second[name], rtol=1e-9, atol=1e-9), name


def assert_same_tables(*paths: Path):
    """Two Parquet files with equal schemas and rows, floats to 1e-9; returns one of them."""
    tables = [pq.read_table(path) for path in paths]
    assert tables[0].schema.names == tables[1].schema.names and tables[0].schema.types == tables[1].schema.types
    for name in tables[0].column_names:
        for first, second in zip(*(levels(table[name].combine_chunks()) for table in tables), strict=True):
            if pa.types.is_floating(first.type):
                values = (column.to_numpy(zero_copy_only=False) for column in (first, second))
                np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-9)
            else:
                assert first.equals(second), (paths[0].name, name)
    return tables[0].to_pandas()


def levels(column: pa.Array) -> Iterator[pa.Array]:
    """The values of a column; of lists how long they are, then those of their entries."""
    while pa.types.is_list(column.type):
        yield pc.list_value_length(column)
        column = column.flatten()
    yield column


def test_the_limit_on_fetched_rows_holds():
    def collect(rows):
        return [0] * rows

    assert limited(collect, 3)(3) == [0] * 3
    with pytest.raises(AssertionError, match="collect of 4 rows"):
        limited(collect, 3)(4)


def test_the_toy(tmp_path):
    given = recipe.load(TOY / "1_data.yaml")
    metrics = compare(tmp_path, **{name: value for name, value in given.items() if name != "run_dir"})
    assert metrics["items"] == 24


@pytest.mark.matrix  # `make spark` runs it, and what has the mark below
def test_movielens_split_by_time_and_pruned(tmp_path):
    given = recipe.load("recipes/ml100k/1_data.yaml")
    changes = {"split": "by_time", "min_user_interactions": 30, "min_item_interactions": 5, "dedupe": "last"}
    kept = {name: value for name, value in given.items() if name not in ("run_dir", "num_test", "num_valid")}
    metrics = compare(tmp_path, **{**kept, **changes})
    assert metrics["interactions_read"] == 100_000 and metrics["share_of_time_ties"] > 0.5


@pytest.mark.parametrize("split", [pytest.param("by_user", marks=pytest.mark.matrix), "by_time"])
def test_requests_whose_rows_have_counts_of_other_users_or_of_before(tmp_path, monkeypatch, split):
    monkeypatch.setattr(counting, "NUM_FOLDS", 2)
    runs = [tmp_path / backend for backend in BACKENDS]
    for run in runs:
        write_requests(run, draw_requests(), split=split)
    compare_candidates(runs, source="requests", count_window=8 * DAY, neighbours=None if split == "by_time" else 4)


@pytest.mark.parametrize("split", ["given", pytest.param("random", marks=pytest.mark.matrix)])
def test_objects_a_line_without_a_time_in_some(tmp_path, split):
    path = tmp_path / "log.json"
    duckdb.execute(GIVEN.format(path=path))
    path = path.rename(tmp_path / "log.jsonl")
    columns = {"position": "place"}  # of which many are equal, and of those some have no time
    metrics = compare(tmp_path / "out", interactions=str(path), split=split, columns=columns)
    assert metrics["interactions"] == 400


@pytest.mark.parametrize(
    "size", [100_000, pytest.param(1_000_000, marks=pytest.mark.matrix)], ids=["100 thousand", "1 million"]
)
def test_a_synthetic_log(tmp_path, size):
    path = tmp_path / "log.parquet"
    duckdb.execute(LOG.format(path=path, size=size, users=size // 20))
    metrics = compare(tmp_path / "out", {"neighbours": 20}, interactions=str(path), num_rerank="all")
    assert metrics["interactions"] > 0.98 * size and metrics["rows"]["rerank"] > MOST / 2
    assert os.path.getsize(tmp_path / "out/duckdb/data" / SEQUENCES) < 4 * size + 200
