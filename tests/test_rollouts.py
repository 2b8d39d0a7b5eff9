import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import cut_off, damage_inside, rollout
from toy_run import write_rollouts as write

from rerank.rollouts.schema import SCHEMA, SCHEMA_VERSION
from rerank.rollouts.store import RolloutWriter, open_rollouts, read_rollouts


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path):
    records = [rollout(), rollout(group=1, order=None, failure="junk", target_rank_after=None)]
    write(tmp_path, *records, rollout(group=2, completion="a\udcffb"))  # which is no UTF-8
    found = read_rollouts(tmp_path)
    assert found.to_pylist(maps_as_pydicts="strict") == [*records, rollout(group=2, completion="a?b")]
    assert found.schema == SCHEMA and found.schema.metadata == {b"schema_version": SCHEMA_VERSION.encode()}


def test_one_part_a_step_and_process_in_step_order(tmp_path):
    write(tmp_path, rollout(step=10), rollout(step=9), rollout(step=9))
    assert names_in(tmp_path) == ["part-00000009-0.parquet", "part-00000010-0.parquet"]
    write(tmp_path, rollout(step=9), rank=1)
    assert read_rollouts(tmp_path)["step"].to_pylist() == [9, 9, 9, 10]


def test_the_flushes_of_one_step_are_all_kept_in_their_order(tmp_path):
    writer = RolloutWriter(tmp_path)
    for group in range(12):
        writer.add([rollout(group=group)])
        writer.flush()
    writer.close()
    assert len(names_in(tmp_path)) == 12
    assert read_rollouts(tmp_path, ["group"])["group"].to_pylist() == list(range(12))


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    write(tmp_path, *(rollout(step=step, reward=1.0) for step in range(4)))
    write(tmp_path, rollout(step=3), rank=11)
    (tmp_path / "part-00000001-0.parquet.tmp").write_bytes(b"PAR1")
    writer = RolloutWriter(tmp_path)
    writer.discard_from(2, num_processes=2)
    of_another_process = "part-00000003-11.parquet"
    assert names_in(tmp_path) == ["part-00000000-0.parquet", "part-00000001-0.parquet", of_another_process]
    writer.add([rollout(step=1, reward=2.0)])
    writer.flush(wait=True)
    assert read_rollouts(tmp_path, ["reward"])["reward"].to_pylist() == [1.0, 2.0, 0.5]


def test_a_run_resumed_with_fewer_processes_discards_the_parts_of_the_others(tmp_path):
    for rank in (0, 1, 2, 3):
        write(tmp_path, rollout(step=1), rollout(step=2), rank=rank)
    for rank in (0, 1):
        RolloutWriter(tmp_path, rank).discard_from(2, num_processes=2)
    assert names_in(tmp_path) == [f"part-00000001-{rank}.parquet" for rank in range(4)]


@pytest.mark.parametrize("folder", ["dapo/rollouts", "dapo.partial/rollouts"])
def test_a_run_is_read_while_and_after_it_trains(tmp_path, folder):
    write(tmp_path / folder, rollout())
    assert read_rollouts(tmp_path).num_rows == 1
    assert read_rollouts((tmp_path / folder).parent).num_rows == 1


def test_a_record_must_have_the_columns_of_the_schema(tmp_path):
    record = rollout(rewards=3)
    del record["kept"]
    with pytest.raises(ValueError, match=r"missing \['kept'\], unknown \['rewards'\]"):
        RolloutWriter(tmp_path).add([record])


@pytest.mark.parametrize("call", ["add", "flush", "close"])
def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(tmp_path, call):
    writer = RolloutWriter(tmp_path / "rollouts")
    shutil.rmtree(tmp_path / "rollouts")
    writer.add([rollout()])
    with pytest.raises(FileNotFoundError, match="part-00000000-0"):
        writer.flush()
        while True:  # an add or flush that comes too early passes
            writer.add([]) if call == "add" else getattr(writer, call)()
    writer.close()


def test_a_value_of_another_type_is_refused(tmp_path):
    writer = RolloutWriter(tmp_path)
    writer.add([rollout(reward="high")])
    with pytest.raises(ValueError, match="high"):
        writer.flush(wait=True)
    writer.close()
    assert not names_in(tmp_path)


WRITE_FOREVER = """
import sys
from toy_run import rollout
from rerank.rollouts.store import RolloutWriter

writer = RolloutWriter(sys.argv[1])
for step in range(10**6):
    writer.add([rollout(step=step, completion="x" * 10**5)] * 8)
    writer.flush(wait=step % 2 == 0)
    print(step, flush=True)
"""


def test_what_was_flushed_survives_a_kill(tmp_path):
    line = [sys.executable, "-c", WRITE_FOREVER, str(tmp_path / "rollouts")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as process:
        for _ in range(21):  # steps 0 to 20, of which 20 waited for the disk
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    opened = open_rollouts(tmp_path)
    assert not opened.damaged
    steps = read_rollouts(tmp_path, ["step"])["step"].to_pylist()
    assert steps == [step for step in range(max(steps) + 1) for _ in range(8)] and max(steps) >= 20


def damage_footer(path):
    data = bytearray(path.read_bytes())
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[start : start + 100] = bytes(100)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_off, damage_footer])
@pytest.mark.parametrize(("count", "steps"), [(3, "1, 2"), (15, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more")])
def test_damaged_files_are_skipped_and_counted_with_their_steps(tmp_path, caplog, damage, count, steps):
    write(tmp_path, *(rollout(step=step) for step in range(count)))
    for path in sorted(tmp_path.iterdir())[1:]:
        damage(path)
    (tmp_path / "part-00000099-0.parquet.tmp").write_bytes(b"PAR1")  # what a crash cut off had no name yet
    assert read_rollouts(tmp_path)["step"].to_pylist() == [0]
    (line,) = caplog.messages
    counted = f"{count - 1} of {count} rollout files are cut off or damaged and left out (of steps {steps}), the first"
    assert line.startswith(counted) and line.endswith("part-00000001-0.parquet; delete what is damaged")


def test_a_file_that_is_damaged_inside_is_refused_by_its_name(tmp_path):
    write(tmp_path, rollout(step=0), rollout(step=1))
    damage_inside(tmp_path / "part-00000001-0.parquet")
    opened = open_rollouts(tmp_path)
    for read in (opened.read, lambda: opened.read(["step"], "step > 0")):
        with pytest.raises(ValueError, match=r"part-00000001-0.parquet is damaged; delete it$"):
            read()
    assert opened.read(["reward"], "step = 0").num_rows == 1


def test_open_rollouts_gives_a_view_of_what_can_be_read(tmp_path):
    folder = tmp_path / "run [a]*?/rollouts"  # DuckDB would take it for a pattern
    write(folder, rollout(step=0), rollout(step=1, reward=2.5), rollout(step=2))
    cut_off(folder / "part-00000002-0.parquet")
    opened = open_rollouts(folder.parent)
    assert opened.connection.sql("select step, reward from rollouts").fetchall() == [(0, 0.5), (1, 2.5)]
    assert [path.name for path in opened.parts] == ["part-00000000-0.parquet", "part-00000001-0.parquet"]
    assert [path.name for path in opened.damaged] == ["part-00000002-0.parquet"]


def test_folders_without_rollouts_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent is not a folder; give the folder of a run"):
        read_rollouts(tmp_path / "absent")
    (tmp_path / "part-of-something.parquet").write_text("x")
    with pytest.raises(ValueError, match="holds no rollouts; run the dapo stage"):
        read_rollouts(tmp_path)
    part = tmp_path / "part-0-0.parquet"
    part.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no readable rollouts; run the dapo stage"):
        read_rollouts(tmp_path)
    pq.write_table(SCHEMA.empty_table(), part)
    with pytest.raises(ValueError, match="holds no rollouts; run the dapo stage"):
        read_rollouts(tmp_path)


def write_version(path, version):
    metadata = None if version == "none" else {"schema_version": version}
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("version", ["9", "none"])
def test_another_schema_version_is_refused(tmp_path, version):
    write_version(tmp_path / "part-00000001-0.parquet", version)
    message = f"part-00000001-0.parquet has rollout schema version {version} but .* reads 2, 3, 4, 5; read it with"
    with pytest.raises(ValueError, match=message):
        read_rollouts(tmp_path, ["step"])


def test_two_schema_versions_in_one_folder_are_refused_with_a_file_of_each(tmp_path):
    write(tmp_path, rollout(step=0), rollout(step=1))
    for step in (2, 3):
        write_version(tmp_path / f"part-0000000{step}-0.parquet", "1")
    version = f"part-00000000-0.parquet has rollout schema version {SCHEMA_VERSION}"
    message = version + r" but \S*part-00000002-0.parquet has 1; move the"
    with pytest.raises(ValueError, match=message):
        open_rollouts(tmp_path)
