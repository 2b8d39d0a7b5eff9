import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rerank import rollouts
from rerank.rollouts import RolloutWriter, read_rollouts


def make_rollout(step=0, group=0, **changes):
    rollout = {
        "step": step,
        "run": "toy",
        "round": step,
        "group": group,
        "row_id": 40 + group,
        "user": 7,
        "target": 1,
        "prompt": "Rank:\nHistory",
        "completion": "<think>it fits</think>2,1,3",
        "completion_ids": [5, 6],
        "policy_logps": [-0.5, -0.25],
        "sampling_logps": [-0.5, -0.125],
        "reward_components": {"rank_promotion": 1 / 3, "well_formed": None},
        "reward_gates": {"well_formed": False},
        "reward": 0.5,
        "advantage": 1.25,
        "truncated": False,
        "failure": None,
        "order": [1, 0, 2],
        "candidates": [0, 1, 2],
        "relevance": [0.0, 1.0, 0.0],
        "first_stage_ranks": [1, 2, 3],
        "target_rank_before": 2,
        "target_rank_after": 1,
        "kept": True,
        "discard_reason": None,
    }
    return {**rollout, **changes}


def write(folder, *records, rank=0):
    writer = RolloutWriter(folder, rank)
    writer.add(records)
    return writer.flush()


def test_what_is_written_is_read(tmp_path):
    records = [make_rollout(), make_rollout(group=1, order=None, failure="junk", target_rank_after=None)]
    write(tmp_path, *records)
    assert read_rollouts(tmp_path).to_pylist(maps_as_pydicts="strict") == records
    schema = read_rollouts(tmp_path).schema
    assert schema.names == rollouts.SCHEMA.names and schema.metadata == {b"schema_version": b"2"}


def test_one_part_a_step_and_process_in_step_order(tmp_path):
    names = [path.name for path in write(tmp_path, make_rollout(step=10), make_rollout(step=9), make_rollout(step=9))]
    assert names == ["part-00000009-0.parquet", "part-00000010-0.parquet"]
    write(tmp_path, make_rollout(step=9), rank=1)
    assert read_rollouts(tmp_path)["step"].to_pylist() == [9, 9, 9, 10]
    assert not list(tmp_path.glob("*.tmp"))


def test_two_flushes_of_one_step_are_both_kept(tmp_path):
    writer = RolloutWriter(tmp_path)
    for group in (0, 1):
        writer.add([make_rollout(group=group)])
        writer.flush()
    assert read_rollouts(tmp_path, ["group"])["group"].to_pylist() == [0, 1]
    assert writer.flush() == []


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    write(tmp_path, *(make_rollout(step=step, reward=1.0) for step in range(4)))
    write(tmp_path, make_rollout(step=3), rank=10)
    writer = RolloutWriter(tmp_path)
    writer.discard_from(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "part-00000000-0.parquet",
        "part-00000001-0.parquet",
        "part-00000003-10.parquet",  # another process's, not ours to delete
    ]
    writer.add([make_rollout(step=1, reward=2.0)])
    writer.flush()
    assert read_rollouts(tmp_path, ["reward"])["reward"].to_pylist() == [1.0, 2.0, 0.5]


def test_text_that_is_no_utf8_is_stored(tmp_path):
    write(tmp_path, make_rollout(completion="a\udcffb"))
    assert read_rollouts(tmp_path)["completion"].to_pylist() == ["a?b"]


@pytest.mark.parametrize("folder", ["dapo/rollouts", "dapo.partial/rollouts"])
def test_a_run_is_read_while_and_after_it_trains(tmp_path, folder):
    write(tmp_path / folder, make_rollout())
    assert read_rollouts(tmp_path).num_rows == 1
    assert read_rollouts((tmp_path / folder).parent).num_rows == 1


def test_a_record_must_have_the_columns_of_the_schema(tmp_path):
    record = make_rollout(rewards=3)
    del record["kept"]
    with pytest.raises(ValueError, match=r"missing \['kept'\], unknown \['rewards'\]"):
        RolloutWriter(tmp_path).add([record])


def test_a_cut_off_file_is_skipped_and_counted(tmp_path, caplog):
    write(tmp_path, make_rollout(step=0), make_rollout(step=1))
    part = tmp_path / "part-00000001-0.parquet"
    part.write_bytes(part.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        assert read_rollouts(tmp_path)["step"].to_pylist() == [0]
    assert "1 of 2 rollout files are cut off or damaged" in caplog.text and part.name in caplog.text


def test_damage_inside_a_file_is_skipped_too(tmp_path):
    write(tmp_path, make_rollout(step=0), make_rollout(step=1))
    part = tmp_path / "part-00000001-0.parquet"
    data = bytearray(part.read_bytes())
    data[4:600] = bytes(596)
    part.write_bytes(data)
    assert read_rollouts(tmp_path)["step"].to_pylist() == [0]


def test_folders_without_rollouts_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent is not a folder; give the folder of a run"):
        read_rollouts(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no rollouts; run the dapo stage"):
        read_rollouts(tmp_path)
    (tmp_path / "part-0-0.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no readable rollouts; run the dapo stage"):
        read_rollouts(tmp_path)


@pytest.mark.parametrize(("metadata", "version"), [({"schema_version": "9"}, "9"), (None, "none")])
def test_another_schema_version_is_refused(tmp_path, metadata, version):
    write(tmp_path, make_rollout(step=0))
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), tmp_path / "part-00000001-0.parquet")
    with pytest.raises(
        ValueError, match=f"part-00000001-0.parquet has rollout schema version {version} but .* reads 2"
    ):
        read_rollouts(tmp_path, ["step"])
