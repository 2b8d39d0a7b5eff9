"""A second day of MovieLens-100K: new films and interactions, and the model of the first day ranks on, by commands.

A model of two layers that the sft stage trains for one-token ranking is asked, so no engine is needed.
"""

import json

import numpy as np
import pytest
from real_day import SIZE, make_real_day
from toy_recipe import run_command

from rerank.baselines import Counts
from rerank.catalogue import Catalogue
from rerank.metrics import ndcg_at_k
from rerank.results.intervals import Sampling

STEPS = 150


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    return make_real_day(tmp_path_factory.mktemp("day"), STEPS)


def rank(model, lists, path, *words):
    """The rankings of lists by `rerank rank --one-token`."""
    path.write_text("".join(json.dumps(one) + "\n" for one in lists))
    run_command("rank", model, "--rows", path, "--out", path.with_suffix(".ranked.jsonl"), "--one-token", *words)
    return [json.loads(line)["ranking"] for line in path.with_suffix(".ranked.jsonl").read_text().splitlines()]


def ndcg(lists, rankings):
    """NDCG@5 of each ranking, whose relevant film is the one that the user took."""
    return [
        ndcg_at_k([float(item == one["target"]) for item in ranking], SIZE)
        for one, ranking in zip(lists, rankings, strict=True)
    ]


def gain(lists, rankings):
    """Mean NDCG@5 minus that of the input order, and the lower end of its interval."""
    before = ndcg(lists, [one["candidates"] for one in lists])
    difference, (low, _) = Sampling(list(range(len(lists)))).difference(ndcg(lists, rankings), before)
    return difference, low


def test_a_day_of_new_films_and_interactions(day, tmp_path, caplog):
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    before = rank(day.model, day.old_lists, rows)
    assert gain(day.old_lists, before)[1] > 0.05  # it has learned something
    unknown = rank(day.model, day.new_lists, rows)
    assert gain(day.new_lists, unknown)[0] < 0  # placed last
    assert "are unknown to the model and placed last" in caplog.text

    known = Catalogue.load(day.model)
    printed = run_command("add-items", day.model, "--items", day.new_items, "--out", model)
    every = Catalogue.load(model)
    assert printed == f"{model}: {len(every)} items, {len(every) - len(known)} of them new\n"
    assert every.item_ids[: len(known)] == known.item_ids and len(every) > len(known) > 1000
    assert rank(model, day.old_lists, rows) == before
    added = rank(model, day.new_lists, rows)
    assert added == rank(day.model, day.new_lists, rows, "--items", day.new_items)  # for one call, or for good

    run_command("refresh", model, "--interactions", day.interactions)
    old, counts = (Counts.load(folder / "evidence.npz") for folder in (day.model, model))
    assert (
        np.array_equal(counts.popularity[: len(known)], old.popularity) and counts.popularity[len(known) :].sum() > 500
    )
    after = rank(model, day.old_lists, rows)
    assert ndcg(day.old_lists, after) == pytest.approx(ndcg(day.old_lists, before), abs=1e-6)
    refreshed = rank(model, day.new_lists, rows)
    assert gain(day.new_lists, refreshed)[1] > 0.05
    assert (
        np.mean(ndcg(day.new_lists, refreshed)) > np.mean(ndcg(day.new_lists, added)) + 0.05
    )  # by the renewed counts
    assert rank(tmp_path / "model.old", day.new_lists, rows) == added  # renamed back, it undoes the refresh

    forgetful, few = tmp_path / "forgetful", tmp_path / "few.inter"
    few.write_text("".join(day.interactions.read_text().splitlines(keepends=True)[:500]))
    run_command("refresh", model, "--interactions", few, "--out", forgetful)
    assert "they are replaced, so give the older ones too" in caplog.text
    assert rank(forgetful, day.old_lists, rows) != before  # which other counts show
