"""The candidates stage on a run of six items and three users, made by hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer
from toy_run import features_of, finish, write_interactions, write_items, write_semantic_ids

from rerank import candidates
from rerank.baselines import FEATURES, Counts
from rerank.candidates import CandidatesArguments
from rerank.catalogue import Catalogue
from rerank.launch.files import write_json
from rerank.models import base as base_model
from rerank.next_item.encoder import NextItemEncoder
from rerank.rows.lists import read_lists

SEQUENCES = {0: [0, 1, 2, 3, 4], 1: [1, 2, 0, 4, 3], 2: [2, 0, 1, 5, 3]}
SPLITS = ["train", "train", "rerank", "valid", "test"]
ITEM_IDS = [f"i{item}" for item in range(6)]


@pytest.fixture
def run(tmp_path):
    """A run with finished data and semantic_ids stages: each user has one rerank, one valid and one test row."""
    write_items(tmp_path / "data", 6, item_id=ITEM_IDS, title=[f"Film {i}" for i in range(6)], category=["a"] * 6)
    write_interactions(tmp_path / "data", SEQUENCES, SPLITS * 3)
    write_semantic_ids(tmp_path / "semantic_ids", np.arange(6)[:, None])
    np.save(tmp_path / "semantic_ids/embeddings.npy", np.eye(6, dtype=np.float32))
    finish(tmp_path / "semantic_ids")
    return tmp_path


def checked(run, **options):
    """The stage's options, which have passed its check."""
    arguments = CandidatesArguments(run_dir=str(run), **{"num_candidates": 2, **options})
    candidates.check(arguments)
    return arguments


def run_stage(run, **options):
    """The stage's metrics and the rows of each of its tables."""
    (run / "out").mkdir()
    metrics = candidates.main(checked(run, **options), run / "out")
    tables = {name: pq.read_table(run / f"out/{name}.parquet").to_pylist() for name in candidates.FILES.values()}
    return metrics, tables


def own_lists(run, **changes):
    """A complete file of lists of two with the target first in every list but row 4's; returns its path."""
    targets = pq.read_table(run / "data/rows.parquet")["target"].to_pylist()
    lists = [[f"i{target}", f"i{(target + 1) % 6}"] for target in targets]
    lists[4] = ["i1", "i2"]  # row 4: user 1's validation row, target 4
    columns = {"row_id": list(range(9))[::-1], "candidates": lists[::-1], **changes}
    given = {name: values for name, values in columns.items() if values is not None}
    pq.write_table(pa.table(given), run / "l.parquet")
    return str(run / "l.parquet")


def test_transition_lists_leave_the_rows_user_out(run):
    row = run_stage(run)[1]["train"][0]
    # User 0's training row: history 0, 1. Of the others, user 1 has 1, 2, 0 and user 2 has 2, 0, 1 before validation:
    # T[1->2] = 1 + 0.3/2 and T[0->2] = 0.3 + 0.3, so item 2 scores 1.15 + 0.6 / 2. No other item is left: 3, 4 and 5
    # have score 0 and popularity 0, and the first of them fills the list.
    assert (row["history"], row["candidates"]) == ([0, 1], [2, 3])
    assert row["first_stage_scores"] == pytest.approx([1.15 + 0.3, 0])
    assert row["relevance"] == [1, 0] and row["hit"] and row["target"] == 2


def test_features_are_those_of_the_saved_counts_and_edges_rest_on_training_rows_only(run):
    _, tables = run_stage(run)
    counts = Counts.load(run / "out/evidence.npz")
    for split in ("train", "test"):
        for row in tables[split]:
            own = SEQUENCES[row["user"]][:3] if split == "train" else None
            columns = [row[name] for name in ("history", "candidates", "first_stage_scores")]
            expected = features_of(counts, *columns, own_sequence=own)
            assert np.array_equal(np.array(row["features"], dtype=np.float32), expected)
    stored = json.loads((run / "out/features.json").read_text())
    assert tuple(stored["names"]) == FEATURES and set(stored["edges"]) == set(FEATURES)
    # training histories have two items, those of the other splits three and four
    assert stored["edges"]["history_length"] == [2 * 2**doubling for doubling in range(9)]


def test_counts_and_recall_of_every_split_are_reported(run):
    metrics, tables = run_stage(run, source="lists", lists=own_lists(run))
    full = {"rows": 3, "hits": 3, "missed": 0, "recall@1": 1.0, "recall@2": 1.0}
    assert metrics["splits"]["train"] == metrics["splits"]["test"] == full
    assert metrics["splits"]["valid"] == {"rows": 3, "hits": 2, "missed": 1, "recall@1": 2 / 3, "recall@2": 2 / 3}
    missed = tables["valid"][1]
    assert not missed["hit"] and missed["relevance"] == [0, 0] and missed["target"] == 4  # kept all the same


def test_own_lists_come_in_any_order_with_or_without_scores(run):
    path = own_lists(run)
    items, scores = read_lists(path, np.arange(9), ITEM_IDS, 2)
    assert items[0].tolist() == [2, 3] and items[4].tolist() == [1, 2]
    assert scores[0].tolist() == [2, 1]  # N + 1 minus the place
    path = own_lists(run, scores=[[0.5, float(row)] for row in range(9)])
    assert read_lists(path, np.arange(9), ITEM_IDS, 2)[1][8].tolist() == [0.5, 0.0]


def make_model(run, folder):
    """A model that knows the run's ids of one token each, its tokenizer and these tokens."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    ids = base_model.add_tokens(model, tokenizer, Catalogue.load(run).semantic_ids, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, ids


@pytest.mark.parametrize("is_sft_model", [False, True])
def test_lists_of_a_model_are_its_most_likely_unseen_items(run, is_sft_model):
    folder = run / ("other/model" if is_sft_model else "midtrain/model")
    model, tokenizer, ids = make_model(run, folder)
    if is_sft_model:
        NextItemEncoder(Catalogue.load(run), tokenizer, "semantic_id", 50).save(folder)
    else:
        (run / "midtrain/recipe.yaml").write_text("max_items: 50\n")
    _, tables = run_stage(run, source="model", num_beams=6, model_dir=str(folder) if is_sft_model else None)
    for row in tables["test"]:
        prompt = NextItemEncoder(Catalogue.load(run), tokenizer, "semantic_id", 50).next_item_prompt(row["history"])
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        logps = torch.log_softmax(logits.float(), -1)[ids]  # ids of one token: exact scores of the whole catalogue
        logps[row["history"]] = -torch.inf
        assert row["candidates"] == logps.argsort(descending=True)[:2].tolist()
        assert row["first_stage_scores"] == pytest.approx(logps.sort(descending=True).values[:2].tolist(), rel=1e-4)


def test_lists_of_a_model_need_the_midtrain_stage(run):
    with pytest.raises(FileNotFoundError, match="midtrain/model is not there; run the midtrain stage first"):
        run_stage(run, source="model")


USERS = ("ann", "bob", "cid")


def write_users(run, names=USERS):
    pq.write_table(pa.table({"user": [0, 1, 2], "user_id": list(names)}), run / "data/users.parquet")


def sft_model(run):
    """The folder of a model of next items of a run, as the sft stage leaves it; no weights."""
    _, tokenizer, _ = make_model(run, run / "sft/model")
    NextItemEncoder(Catalogue.load(run), tokenizer, "semantic_id", 50).save(run / "sft/model")
    finish(run / "sft", inputs=("data",))
    return run / "sft/model"


def other_run(run, splits, names=USERS, order=(0, 1, 2)):
    """A run of the same items and sequences with other splits, its users named and in an order."""
    other = run / "other"
    write_items(other / "data", 6, item_id=ITEM_IDS, title=[f"Film {i}" for i in range(6)], category=["a"] * 6)
    write_interactions(other / "data", {user: SEQUENCES[place] for user, place in enumerate(order)}, splits)
    write_users(other, [names[place] for place in order])
    shutil.copytree(run / "semantic_ids", other / "semantic_ids")
    return other


def test_a_model_that_was_trained_on_targets_of_the_training_lists_is_refused(run):
    """Its own run's sft model has seen all of them, whatever its data recipe."""
    write_users(run)
    options = {"source": "model", "model_dir": str(sft_model(run))}
    line = (
        r"sft/model was trained on 3 of 3 targets of the training lists, such as item 'i2' of user 'ann', so that .*"
    )
    with pytest.raises(ValueError, match=line + "leave model_dir out, or name a model of a run whose num_valid holds"):
        checked(run, **options)
    # all of bob is for training there, also item 0, the target of his training row; those of the others are held out
    splits = ["train", "train", "valid", "valid", "test", *["train"] * 5, "train", "train", "valid", "valid", "test"]
    other = other_run(run, splits)
    with pytest.raises(ValueError, match="trained on 1 of 3 targets .* such as item 'i0' of user 'bob'"):
        checked(run, source="model", model_dir=str(sft_model(other)))


def test_a_model_of_a_run_that_holds_the_targets_out_makes_lists_and_users_are_known_by_their_ids(run):
    write_users(run)
    held_out = ["train", "train", "valid", "valid", "test"] * 3
    folder = str(sft_model(other_run(run, held_out, order=(2, 0, 1))))
    assert checked(run, source="model", model_dir=folder).model_dir == folder
    (run / "other").rename(run / "of_other_users")
    other = other_run(run, ["train"] * 15, ["dan", "eve", "fay"])
    assert checked(run, source="model", model_dir=str(sft_model(other)))


def test_a_model_whose_data_is_not_known_is_taken_with_a_warning(run, caplog):
    write_users(run)
    folder = sft_model(run)
    (run / "sft/stage.json").unlink()
    checked(run, source="model", model_dir=str(folder))
    assert "sft/model is in no run with its data: whether it has seen the training targets is not" in caplog.text


def test_a_model_dir_that_does_not_fit_is_refused(run):
    options = {"source": "model", "model_dir": str(run / "model")}
    with pytest.raises(FileNotFoundError, match="has no next_item.json; train it with the sft stage, task next_item"):
        checked(run, **options)
    _, tokenizer, _ = make_model(run, run / "model")
    catalogue = Catalogue.load(run)
    NextItemEncoder(catalogue, tokenizer, "semantic_id", 50).save(run / "model")
    with pytest.raises(FileNotFoundError, match="has no item_head.safetensors; train it with the sft stage"):
        checked(run, num_beams=0, **options)
    replace(catalogue, item_ids=["other"] * 6).save(run / "model")
    with pytest.raises(ValueError, match="knows other items or ids than .*; use runs of one data"):
        checked(run, **options)


def changed_list(row, value):
    """The nine lists with one exchanged, last row_id first as in the file."""
    return [value if place == row else ["i0", "i1"] for place in range(1, 10)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": changed_list(3, ["i0", "i9"])}, "l.parquet, row 3: candidate 'i9' is not among the items"),
        ({"candidates": changed_list(2, ["i0"])}, "l.parquet, row 2: 1 candidates, too few to rank; give at least 2"),
        ({"candidates": changed_list(9, None)}, "l.parquet, row 9: 0 candidates, too few to rank"),
        ({"candidates": changed_list(4, ["i5", "i5"])}, "l.parquet, row 4: candidate 'i5' appears twice"),
        ({"candidates": None}, "has no column 'candidates' but row_id; rename or add it"),
        ({"candidates": ["i0"] * 9}, "column 'candidates' holds string but must hold a list a row"),
        ({"row_id": [*range(8), 7]}, "row 9: row_id 7 appears twice"),
        ({"row_id": [*range(8), 70]}, "row 9: row_id 70 is not in data/rows.parquet"),
        ({"row_id": [*range(8)], "candidates": [["i0", "i1"]] * 8}, "l.parquet has no list for row_id 8"),
        ({"scores": [["1", "2"]] * 9}, "column 'scores' holds list<.*string> but must hold lists of numbers"),
        ({"scores": [[1.0, float("nan")]] * 9}, r"row 1: scores are \[1.0, nan\] but must be 2 finite numbers"),
    ],
)
def test_own_lists_that_do_not_fit_are_refused(run, changes, message):
    with pytest.raises(ValueError, match=message):
        checked(run, source="lists", lists=own_lists(run, **changes))


def test_a_file_of_lists_that_is_not_there_or_not_parquet_is_refused(run):
    with pytest.raises(FileNotFoundError, match="lists .*/l.parquet is not there"):
        checked(run, source="lists", lists=str(run / "l.parquet"))
    (run / "l.parquet").write_text("row_id,candidates")
    with pytest.raises(ValueError, match="l.parquet is not a Parquet file"):
        checked(run, source="lists", lists=str(run / "l.parquet"))


def test_check_refuses_lists_of_a_model_that_has_seen_the_targets(run):
    write_json(run / "data/metrics.json", {"midtrain_has_seen_rerank_targets": True})
    with pytest.raises(ValueError, match="num_rerank of the data stage is all, so the mid-trained model has seen"):
        checked(run, source="model")


def test_check_refuses_lists_longer_than_what_users_have_not_seen(run):
    with pytest.raises(ValueError, match="num_candidates is 3 but the longest history leaves 2 of 6 items"):
        checked(run, num_candidates=3)


def test_a_history_of_repeated_items_leaves_room_for_all_others(run):
    splits = SPLITS * 3 + ["train"] * 5 + ["rerank", "valid", "test"]
    write_interactions(run / "data", {**SEQUENCES, 3: [0, 1] * 4}, splits)
    _, tables = run_stage(run)  # the longest history has seven interactions of two items, others four of four
    lists = {row["user"]: row["candidates"] for row in tables["test"]}
    assert set(lists[3]) <= {2, 3, 4, 5} and sorted(lists[0]) == [4, 5]


def test_check_passes_before_the_data_stage_has_run(tmp_path):
    checked(tmp_path, source="model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "oracle"}, "source is 'oracle' but must be one of transitions, model, lists"),
        ({"source": "lists"}, "source is lists and lists is None"),
        ({"lists": "l.parquet"}, "source is transitions and lists is l.parquet"),
        ({"num_candidates": 1}, "num_candidates is 1 but must be at least 2"),
        ({"source": "model", "num_beams": 5}, "num_beams is 5 but must be at least 10"),
        ({"batch_size": 0}, "batch_size is 0 but must be at least 1"),
        (
            {"model_dir": "sft/model"},
            "model_dir is sft/model but source is transitions; it goes with source model or lambdamart",
        ),
        ({"source": "model", "num_beams": 0}, "num_beams is 0 but a mid-trained model has no item head"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CandidatesArguments(run_dir="runs/toy", **options)
