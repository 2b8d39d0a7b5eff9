"""The engines of the data stage: what is refused, dropped and left whole, and what a launch reads once."""

import errno
import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from toy_recipe import TOY

from rerank import data
from rerank.data.prepare import prepared
from rerank.launch import engines, pipeline, recipe
from rerank.launch.disk import told_of_full_disk
from rerank.launch.stages import load_stage

ROWS = [f"{user},{item},{time}" for user in "uvw" for time, item in enumerate("abcdefgh")]


@pytest.fixture
def log(tmp_path):
    """A file of three users of eight interactions each."""
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["user,item,time", *ROWS, ""]))
    return path


def arguments(log, **options):
    return data.DataArguments(run_dir=str(log.parent), interactions=str(log), **options)


def test_a_backend_that_is_not_installed_is_refused_before_a_file_is_read(log, monkeypatch, tmp_path):
    args = arguments(log, backend="pyspark")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    for check in (data.check, data.check_names):
        with pytest.raises(
            ValueError, match=r"pyspark is not installed; pip install 'rerank\[spark\]', or set backend"
        ):
            check(args)
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"JAVA_HOME is {tmp_path}, which has no bin/java; apt-get install -y openjdk"
    ):
        data.check_names(args)
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="backend is pyspark but there is no java; apt-get install -y openjdk-17"):
        data.check_names(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "spark"}, "backend is 'spark'"),
        (
            {"interactions": None, "requests": "r.jsonl", "split": "by_time"},
            "backend is pyspark but requests is r.jsonl",
        ),
        (
            {"rebuild": True, "split": "given"},
            "backend is pyspark but rebuild is True, of which .*set backend: duckdb",
        ),
    ],
)
def test_what_a_backend_cannot_make_is_refused(log, options, message):
    with pytest.raises(ValueError, match=message):
        data.DataArguments(**{"run_dir": "run", "interactions": str(log), "backend": "pyspark", **options})


def test_the_engine_holds_the_tables_that_are_written_and_no_others(log):
    options = {"min_user_interactions": 2, "min_item_interactions": 2, "dedupe": "first"}
    with prepared(arguments(log, **options)) as found:
        query = "SELECT table_name FROM duckdb_tables()"
        held = {name for (name,) in found.engine.reader.con.execute(query).fetchall()}
        assert held == {table.get_name().split(".")[-1] for table in (found.items, found.users, found.interactions)}
        memory = found.engine.reader.con.execute("SELECT current_setting('memory_limit')").fetchone()
    assert memory[0].endswith("GiB") and float(memory[0].split()[0]) <= 6


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), duckdb.IOException("Could not write: No space left on device")]
)
def test_a_full_disk_leaves_whole_files_and_says_how_much_was_needed(log, tmp_path, monkeypatch, error):
    write, out = engines.DuckDB.write, tmp_path / "out"
    out.mkdir()

    def write_until_full(engine, table, path):
        if path.name == "interactions.parquet":
            path.with_name("interactions.parquet.tmp").write_bytes(b"PAR1")
            raise error
        write(engine, table, path)

    monkeypatch.setattr(engines.DuckDB, "write", write_until_full)
    # 24 interactions and 3 x 3 rows of at most 60 bytes each
    said = f"the disk of {out} is full: .* GB are free, and the interactions and rows take up to 1.98e-06 GB; free"
    with pytest.raises(ValueError, match=said):
        data.main(arguments(log), out)
    assert sorted(path.name for path in out.glob("*.parquet")) == ["items.parquet", "users.parquet"]
    assert len(pq.read_table(out / "items.parquet")) == 8 and len(pq.read_table(out / "users.parquet")) == 3


def test_another_error_of_the_engine_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(duckdb.IOException, match="no such file"):
        with told_of_full_disk(tmp_path):
            raise duckdb.IOException("no such file")


def test_a_launch_reads_its_input_once_and_a_dry_run_reads_it_too(monkeypatch, tmp_path):
    steps, read = pipeline.select(pipeline.read_steps(TOY, str(tmp_path / "run"), []), None, None, "data"), []
    monkeypatch.setattr("rerank.data.prepare.prepared", lambda args: read.append(args) or pytest.fail("is read"))
    assert list(pipeline.check_steps(steps, launches=True)) == ["data"] and not read
    for options in ({}, {"launches": True, "remake": ["data"]}):  # what is finished is set aside for good input only
        with pytest.raises(pytest.fail.Exception, match="is read"):
            pipeline.check_steps(steps, **options)
    bad = pipeline.read_steps(TOY, str(tmp_path / "run"), ["data.columns={user: nobody}"])[:1]
    with pytest.raises(ValueError, match="has no column 'nobody' for user"):
        pipeline.check_steps(bad, launches=True)


def test_a_launch_that_refuses_its_input_leaves_no_recipe_to_resume(log, capsys):
    log.write_text(log.read_text() + "u,,9\n")
    given = {"run_dir": str(log.parent), "interactions": str(log)}
    (log.parent / "1_data.yaml").write_text(json.dumps(given))
    for words in ([], ["--min_history=3"]):  # the second is another recipe
        with pytest.raises(SystemExit) as ended:
            recipe._run("data", ["--config", str(log.parent / "1_data.yaml"), *words])
        assert ended.value.code == 2
        assert "t.csv line 26: item is empty" in capsys.readouterr().err
    assert not (log.parent / "data.partial/begun.json").exists() and load_stage("data").quick_check
    assert not Path(log.parent / "data").exists()


def test_a_run_whose_data_stage_refuses_its_input_ends_with_exit_code_2(tmp_path, monkeypatch):
    (step, *_), said = pipeline.read_steps(TOY, str(tmp_path / "run"), []), []
    (tmp_path / "run/data.partial").mkdir(parents=True)
    for code, ends in ((1, 2), (130, 130)):  # the launcher has 1 for a refusal, and 130 for Ctrl-C
        monkeypatch.setattr(pipeline, "run_step", lambda *_, code=code: code)
        assert pipeline.run([step], "recipes/accelerate/cpu.yaml", said.append) == ends
    begun = tmp_path / "run/data.partial/begun.json"
    begun.write_text('{"given": {}, "inputs": {}, "files": []}')
    monkeypatch.setattr(pipeline, "run_step", lambda *_: 1)
    assert pipeline._launch_step(step, "data", "cpu.yaml", said.append, "it") == 1  # what it has begun has failed
    assert said[1:] == ["[1/1] data ...", "[1/1] data was stopped; the same command continues from here",
                        "data ...", "data failed with exit code 1; it continues from here"]  # fmt: skip
