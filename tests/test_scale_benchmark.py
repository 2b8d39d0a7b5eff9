"""The benchmark of growing logs: its log, its watch over a process tree, and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest

from tests.benchmarks import scale, scale_cut, scale_log, scale_peers, scale_watch
from tests.benchmarks.scale_log import num_users, write_log
from tests.benchmarks.scale_watch import watch

GROW = """
import subprocess, sys, time
if len(sys.argv) > 2:
    open(sys.argv[1] + "/spilled", "wb").write(bytes(20_000_000))
    held = b"x" * 150_000_000
    time.sleep(1.5)
    import os
    os.remove(sys.argv[1] + "/spilled")
else:
    sys.exit(subprocess.run([sys.executable, "-c", sys.orig_argv[2], sys.argv[1], "child"]).returncode)
"""


def read(folder: Path):
    return duckdb.sql(f"SELECT * FROM '{folder}/log/*.parquet'").df()


def test_the_log_is_seeded_and_has_the_popularities_that_it_says(tmp_path, monkeypatch):
    write_log(tmp_path / "one", 60_000, 1_000)
    monkeypatch.setattr(scale_log, "PART", 7_000)  # what a row is does not depend on its part
    write_log(tmp_path / "two", 60_000, 1_000)
    write_log(tmp_path / "other", 60_000, 1_000, seed=1)
    log, again, other = (read(tmp_path / name) for name in ("one", "two", "other"))
    assert len(list((tmp_path / "two/log").iterdir())) == 9 and len(log) == 60_000
    key = ["time", "user", "item"]
    first, second, third = (of.sort_values(key).reset_index(drop=True) for of in (log, again, other))
    assert first.equals(second) and not first.equals(third)
    users, items = log["user"].value_counts(), log["item"].value_counts()
    assert users.iloc[0] == 6_000 and 2_900 < len(users) <= num_users(60_000) + 1
    assert users.iloc[1] == pytest.approx(54_000 / 3_000**0.5, rel=0.1)
    # P(item <= k) = log(k + 1) / log(1001)
    assert items["I000000001"] / 60_000 == pytest.approx(0.1003, abs=0.006)
    assert (log["item"] <= "I000000031").mean() == pytest.approx(0.5016, abs=0.01)
    assert set(log["item"]) <= set(duckdb.sql(f"SELECT item FROM '{tmp_path}/one/items.parquet'").df()["item"])


def test_a_large_log_has_one_user_of_a_million_and_a_million_rows_to_rank():
    assert 3 * num_users(100_000_000) == pytest.approx(1_000_000, abs=3) and num_users(1_000_000) == 50_000
    assert 100_000_000 // max(100_000_000 // scale_log.MOST_OF_ONE_USER, 10) == 1_000_000


def test_memory_and_disk_of_a_child_are_counted_and_what_is_gone_again_is_spilled(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_watch, "FOLDERS_EVERY", 1)
    found = watch([sys.executable, "-c", GROW, str(tmp_path)], tmp_path, {}, [tmp_path], 60)
    assert not found.failed and 0.15 < found.peak_gb < 0.3 and found.spilled_gb == pytest.approx(0.02)
    assert 1.5 < found.seconds < 60 and 0.01 < found.cpu_seconds < found.seconds


def test_a_command_that_fails_or_takes_too_long_says_so(tmp_path):
    failed = watch([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path, {}, [], 60)
    assert failed.failed == "exit code 1: no such thing"
    late = watch([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, {}, [], 0.1)
    assert "all that were left" in late.failed and late.seconds < 30


def test_sizes_are_those_of_the_command_or_of_its_cells():
    million = 10**6
    ladder = [(million, 10**4), (10 * million, 10**5), (100 * million, million), (10 * million, million)]
    assert scale.cells_of(100 * million, million, []) == ladder
    assert scale.cells_of(1, 1, ["100k,1k", "1.5M,20"]) == [(100_000, 1000), (1_500_000, 20)]


def test_a_disk_with_too_little_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 39.9e9}))
    with pytest.raises(
        SystemExit, match="has 40 GB free, and 100000000 interactions need 40 GB; free some, set TMPDIR"
    ):
        scale.refuse_full([(10**6, 10**4), (10**8, 10**6)], tmp_path)
    scale.refuse_full([(10**7, 10**6)], tmp_path)


def cell(interactions, items, seconds, peak, failed=""):
    of = {"seconds": seconds, "peak_gb": peak, "written_gb": 1.0, "spilled_gb": 0.5, "failed": failed}
    return {"interactions": interactions, "items": items, "stages": {"data": of, "candidates": of | {"seconds": 60.0}}}


CELLS = [cell(10**6, 10**4, 6, 1), cell(10**7, 10**5, 60, 1), cell(10**8, 10**6, 1200, 2), cell(10**7, 10**6, 1, 9)]


def test_exponents_are_between_sizes_of_equal_proportions():
    first, second = scale.exponents(CELLS)
    assert first == pytest.approx({"data": 1, "candidates": 0})
    assert second == pytest.approx({"data": 1.30103, "candidates": 0})  # log10(20)
    assert scale.summary(CELLS) == pytest.approx({"peak_gb": 2, "minutes": 21, "worst_exponent": 1.30103})
    broken = [*CELLS[:2], cell(10**8, 10**6, 1, 1, failed="exit code 1")]
    assert scale.summary(broken)["worst_exponent"] == pytest.approx(1) and len(scale.exponents(broken)) == 1


def test_a_larger_log_is_reckoned_by_the_measured_exponents(tmp_path, monkeypatch, capsys):
    path = tmp_path / "scale.json"
    path.write_text(json.dumps({"cells": CELLS}))
    monkeypatch.setattr(sys, "argv", ["scale", "--project", "1G", "--out", str(path)])
    scale.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("Arithmetic, not a measurement: 1,000,000,000 interactions")
    # ten times: 1200 s x 20 and 2 GB x 2
    assert lines[1] == "data: 6.7 hours (exponent 1.30), 4 GB of memory (exponent 0.30), 15 GB written."
    with pytest.raises(SystemExit, match="no two sizes of equal proportions"):
        scale.project(10**9, {"cells": CELLS[-1:]})


def test_the_files_of_a_commit_are_taken_without_touching_the_checkout(tmp_path):
    repository = tmp_path / "repository"
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    (repository / "old.py").write_text("old")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (repository / "old.py").write_text("new")
    tree = scale_peers.tree_of("HEAD", repository, tmp_path)
    assert tree is not None and (tree / "old.py").read_text() == "old" and (repository / "old.py").read_text() == "new"
    assert scale_peers.tree_of("aacb4c7", repository, tmp_path) is None


def test_a_fact_that_is_absent_by_both_counts_is_not_changed_by_the_cut():
    whole, cut = np.array([1.0, np.nan, np.nan, 2.0]), np.array([1.0, np.nan, 3.0, 2.5])
    assert scale_cut.differs(whole, cut).tolist() == [False, False, True, True]
