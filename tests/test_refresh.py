"""Counts of a trained folder that are renewed: the same interactions give the counts that the run's stages made."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from daily_run import SETTINGS, make_stage
from toy_recipe import refusal, run_command
from toy_run import finish, write_traces

from rerank import candidates, data
from rerank.baselines import Counts
from rerank.models.saving import SOURCES_FILE, save_ranker
from rerank.rows import Prompter

RECIPE = {
    "columns": {"user": "u", "item": "i", "time": "t", "position": "p"},
    "where": "r >= 2",
    "on_bad_rows": "drop",
}
RECIPE |= {"dedupe": "first", "min_user_interactions": 5, "min_item_interactions": 4}
COLUMNS = "uirtp"


def write_log(path, rows):
    path.write_text("\n".join([",".join(COLUMNS), *(",".join(map(str, row)) for row in rows)]) + "\n")


@pytest.fixture(scope="module", params=["per_user", "by_time"])
def made(request, tmp_path_factory):
    """A run with rare users and items, the folder of a model, and the rows of its log.

    Positions and times order a user's rows differently.
    """
    folder, rng = tmp_path_factory.mktemp("refresh"), np.random.default_rng(0)
    rows = []
    for user in range(60):
        for _ in range(int(rng.integers(1, 16))):
            item, rating, time = int(26 * rng.random() ** 3), rng.integers(1, 6), rng.integers(1, 1000)
            rows.append((f"u{user}", f"i{item}", rating, time if rng.random() < 0.95 else "noon", 1000 - time))
    write_log(folder / "log.csv", rows)
    run = folder / "run"
    given = {"interactions": str(folder / "log.csv"), "split": request.param, **RECIPE}
    make_stage(run, "data", data, data.DataArguments(run_dir=str(run), **given), given)
    args = candidates.CandidatesArguments(run_dir=str(run), num_candidates=2)
    make_stage(run, "candidates", candidates, args, {"num_candidates": 2})
    settings = replace(SETTINGS, item_fields=["title"], ranking="number")
    write_traces(run / "traces", {0: "sft"}, settings)
    finish(run / "traces")
    (run / "sft/model").mkdir(parents=True)
    (run / "sft/model/config.json").write_text("{}")  # of weights, which refreshing does not need
    save_ranker(run, Prompter.of_run(run), run / "sft/model", trace=False, max_completion_tokens=24)
    return run, rows


def interactions(run):
    """(user, item, split) of the run's data, each user's in order."""
    tables = {name: pq.read_table(run / f"data/{name}.parquet") for name in ("interactions", "users", "items")}
    users, items = tables["users"]["user_id"].to_pylist(), tables["items"]["item_id"].to_pylist()
    return [(users[r["user"]], items[r["item"]], r["split"]) for r in tables["interactions"].to_pylist()], items


def assert_same(found: Counts, wanted: Counts):
    """To the last digit."""
    for name in ("transitions", "successors", "near"):
        assert (getattr(found, name) != getattr(wanted, name)).nnz == 0
    assert np.array_equal(found.popularity, wanted.popularity)
    assert np.array_equal(found.regression.inverse, wanted.regression.inverse)
    assert np.array_equal(found.regression.places, wanted.regression.places)


def refreshed(folder, log, out):
    run_command("refresh", folder, "--interactions", log, "--out", out)
    return Counts.load(out / "evidence.npz")


def test_the_interactions_of_training_give_the_counts_of_training(made, tmp_path):
    run, rows = made
    taken, _ = interactions(run)
    users, held_out = {user for user, _, _ in taken}, {row[:2] for row in taken if row[2] in ("valid", "test")}
    write_log(tmp_path / "log.csv", [row for row in rows if row[0] in users and row[:2] not in held_out])
    counted = Counts.load(run / "candidates/evidence.npz")
    shutil.copytree(run / "sft/model", tmp_path / "old")  # for users whose last interactions are held out
    sources = json.loads((tmp_path / "old" / SOURCES_FILE).read_text())
    sources["reading"]["min_user_interactions"] = 1
    (tmp_path / "old" / SOURCES_FILE).write_text(json.dumps(sources))
    found = refreshed(tmp_path / "old", tmp_path / "log.csv", tmp_path / "model")
    assert_same(found, counted)
    assert found.until == counted.until
    assert len({user for user, _, _ in taken}) < 60 and len(counted.popularity) < len(
        {row[1] for row in rows}
    )  # some are rare


def test_all_interactions_give_the_counts_of_what_the_data_stage_keeps(made, tmp_path, caplog):
    run, rows = made
    taken, items = interactions(run)
    sequences = {}
    for user, item, _ in taken:
        sequences.setdefault(user, []).append(items.index(item))
    write_log(tmp_path / "log.csv", [*rows, *[("new", "i1", 5, 2000 + k, 0) for k in range(4)]])
    wanted = Counts.fit({user: np.array(of_user) for user, of_user in enumerate(sequences.values())}, len(items))
    assert_same(refreshed(run / "sft/model", tmp_path / "log.csv", tmp_path / "model"), wanted)
    assert "(min_user_interactions of the run's data)" in caplog.text


def test_users_of_too_few_interactions_alone_are_refused(made, tmp_path, capfd):
    run, _ = made
    write_log(tmp_path / "log.csv", [("new", "i1", 5, 2000, 0)])
    words = ("refresh", run / "sft/model", "--interactions", tmp_path / "log.csv", "--out", tmp_path / "model")
    assert "none of its users has the min_user_interactions of the run's data" in refusal(capfd, *words)
