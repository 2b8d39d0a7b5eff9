"""A second day: new items and interactions, and the model of the first day ranks on."""

import json
import shutil
import uuid
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from daily_run import DAY, GROUPS, NEW, OLD, USERS, answers, draw_rows, items_of, make_daily_run
from toy_recipe import run_command

from rerank import rank
from rerank.catalogue import Catalogue
from rerank.metrics import ndcg_at_k
from rerank.models.ranker import RankingModel
from rerank.prompts import PromptSettings
from rerank.rank.encoder import encode_rows
from rerank.rank.files import read_rows_file
from rerank.results.intervals import Sampling


@pytest.fixture(scope="module")
def daily(tmp_path_factory):
    return make_daily_run(tmp_path_factory.mktemp("daily"))


def write_lists(path, catalogue, rows):
    """The rows as a file of `rerank rank`, of the second day."""
    ids = [
        {
            "history": [catalogue.item_ids[item] for item in row.history],
            "candidates": [catalogue.item_ids[item] for item in row.candidates],
            "time": 9 * DAY,
        }
        for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, ids)))
    return path


def ranked(model, lists, *words, monkeypatch):
    """The rankings of a file of lists."""
    monkeypatch.setattr(rank, "generate_answers", answers)
    out = lists.with_name("ranked.jsonl")
    run_command("rank", model, "--rows", lists, "--out", out, *words)
    return [json.loads(line)["ranking"] for line in out.read_text().splitlines()]


def gain(catalogue, rows, rankings):
    """NDCG@4 minus that of the input order, with its interval."""
    targets = [catalogue.item_ids[row.candidates[row.target]] for row in rows]
    pairs = zip(targets, rankings, strict=True)
    found = [ndcg_at_k([float(one == target) for one in ranking], 4) for target, ranking in pairs]
    before = [ndcg_at_k(row.relevance, 4) for row in rows]
    return Sampling([row.user for row in rows]).difference(found, before)


def by_letters(model, lists, *words):
    """The rankings of a file of lists by --one-token, with the prompts and weights of a folder but for letters."""
    folder = lists.with_name(f"by_letters_{uuid.uuid4().hex}")
    shutil.copytree(model, folder)
    replace(PromptSettings.load(folder), ranking="letter").save(folder)  # an id is two tokens
    out = folder / "ranked.jsonl"
    run_command("rank", folder, "--rows", lists, "--out", out, "--one-token", *words)
    return [json.loads(line)["ranking"] for line in out.read_text().splitlines()]


def write_second_day(daily, path):
    """What the counts of the first day know, and what users took of the new items a day later."""
    data = pq.read_table(daily.run / "data/interactions.parquet").to_pylist()
    ids = pq.read_table(daily.run / "data/items.parquet")["item_id"].to_pylist()
    known = [row for row in data if row["split"] in ("train", "rerank")]
    lines = [f"{row['user']},{ids[row['item']]},{row['time']}" for row in known]
    taken = [
        f"{user},{items_of(user % GROUPS, True)[k]},{8 * DAY + user}" for user in range(USERS) for k in range(NEW)
    ]
    path.write_text("\n".join(["user,item,ts", *lines, *taken, f"0,unknown,{20 * DAY}"]) + "\n")
    return len(known) + len(taken)


def test_items_held_out_of_training_are_ranked_above_the_input_order(daily, tmp_path, monkeypatch, caplog):
    known = Catalogue.load(daily.model)
    new = Catalogue([one for g in range(GROUPS) for one in items_of(g, True)], *[[""] * GROUPS * NEW] * 3)
    every = known.extended(new)
    rows = draw_rows(every, np.random.default_rng(2), 60, new=True)
    lists = write_lists(tmp_path / "lists.jsonl", every, rows)
    words = ("--items", daily.new_items, "--embeddings", daily.embeddings)
    difference, (low, _) = gain(every, rows, ranked(daily.model, lists, *words, monkeypatch=monkeypatch))
    assert low > 0.1, (difference, low)
    assert "ids of 16 new items: 0% under a first-level prefix that no item of training has" in caplog.text
    unknown = ranked(daily.model, lists, monkeypatch=monkeypatch)
    assert gain(every, rows, unknown)[0] < 0  # placed last
    assert f"{len(rows)} ids in candidates of {len(rows)} rows are unknown to the model and placed last" in caplog.text


def test_the_second_day(daily, tmp_path, monkeypatch, caplog):
    model, known = tmp_path / "model", Catalogue.load(daily.model)
    printed = run_command(
        "add-items", daily.model, "--items", daily.new_items, "--embeddings", daily.embeddings, "--out", model
    )
    assert printed == f"{model}: {GROUPS * (OLD + NEW)} items, {GROUPS * NEW} of them new\n"
    every = Catalogue.load(model)
    assert every.item_ids[: len(known)] == known.item_ids and every.semantic_ids[: len(known)] == known.semantic_ids
    assert len(set(every.semantic_ids)) == len(every)
    old_rows = draw_rows(every, np.random.default_rng(3), 30)
    old_lists = write_lists(tmp_path / "old_lists.jsonl", every, old_rows)
    before = by_letters(daily.model, old_lists)
    assert by_letters(model, old_lists) == before  # nothing changed for them

    interactions = tmp_path / "interactions.csv"
    number = write_second_day(daily, interactions)
    counted = RankingModel.load(model).load_counts()
    printed = run_command("refresh", model, "--interactions", interactions, "--columns", "{time: ts}")
    assert printed == f"{model}: counts of {number} interactions, the latest of 1970-01-09\n"
    assert f"1 of {number + 1} interactions are of items that the model does not know" in caplog.text
    counts = RankingModel.load(model).load_counts()
    assert np.array_equal(counts.popularity[: len(known)], counted.popularity[: len(known)])
    assert set(counts.popularity[len(known) :]) == {USERS // GROUPS} and set(counted.popularity[len(known) :]) == {0}
    assert by_letters(model, old_lists) == before  # their counts did not change
    forgetful = tmp_path / "forgetful"
    (tmp_path / "few.csv").write_text(f"user,item,time\nu0,{items_of(0, False)[0]},0\n")
    run_command("refresh", model, "--interactions", tmp_path / "few.csv", "--out", forgetful)
    assert by_letters(forgetful, old_lists) != before  # which other counts would have shown

    rows = draw_rows(every, np.random.default_rng(4), 60, new=True)
    lists = write_lists(tmp_path / "lists.jsonl", every, rows)
    renewed = RankingModel.load(model)
    prompts = [
        renewed.prompter.message(one.row)
        for one in encode_rows(read_rows_file(lists).rows, renewed, renewed.load_counts(), "refuse")
    ]
    assert all("pop:0" not in prompt for prompt in prompts)  # the renewed counts are shown
    difference, (low, _) = gain(every, rows, ranked(model, lists, monkeypatch=monkeypatch))
    assert low > 0.1, (difference, low)
    old = RankingModel.load(tmp_path / "model.old").load_counts()
    assert np.array_equal(old.popularity, counted.popularity)  # renamed back, it undoes the refresh


def test_a_warning_says_that_rows_are_younger_than_the_counts(daily, tmp_path, caplog):
    known = Catalogue.load(daily.model)
    lists = write_lists(tmp_path / "lists.jsonl", known, draw_rows(known, np.random.default_rng(5), 2))
    by_letters(daily.model, lists)
    assert "younger" not in caplog.text  # by three days
    lists.write_text(lists.read_text().replace(str(9 * DAY), str(20 * DAY)))
    by_letters(daily.model, lists)
    assert (
        "2 of 2 rows are more than 7 days younger than the counts of the model, which reach until 1970" in caplog.text
    )
