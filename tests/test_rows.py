"""One row through all it goes through: read, shuffled, asked, answered, rewarded, stored and read back."""

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import rollout, write_interactions, write_rollouts, write_traces

from rerank import plugins
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings, completion, parse_completion
from rerank.rollouts import store
from rerank.rollouts.schema import SCHEMA
from rerank.rows import (
    REWARD_COLUMNS,
    Prompter,
    RankingRow,
    TargetRows,
    choose_rows,
    read_rows,
    reward_columns,
    shuffle,
    training_items,
    training_rows,
    training_sequences,
)
from rerank.scoring import load_rewards, score

NUM_ITEMS = 30
IDS = [f"<s_a_{item // 6}><s_b_{item % 6}>" for item in range(NUM_ITEMS)]
TITLES = [f"Title {item}" if item % 5 else "" for item in range(NUM_ITEMS)]
NUMBERS, SEMANTIC_IDS = {"ranking": "number", "item_fields": ["title"]}, {"ranking": "semantic_id"}
NAMES = ["popularity", "lift"]
EDGES = {"popularity": np.arange(1.0, 10).tolist(), "lift": np.arange(0.5, 5, 0.5).tolist()}

# Number of candidates -> grades: one positive of two, two positives of different grades, two of the highest grade.
GRADES = {
    2: (0.0, 1.0),
    3: (1.0, 0.0, 2.0),
    24: tuple(2.0 if place in (5, 17) else float(place == 3) for place in range(24)),
}
# First-stage rank of the target: the most relevant candidate, of equals the one that the first stage ranks best.
TARGETS = {2: 2, 3: 3, 24: 6}


def record(size: int) -> dict:
    """A line of a candidates table; the one of three candidates has no user."""
    return {
        "row_id": size,
        "user": None if size == 3 else 7,
        "history": [28, 29],
        "candidates": list(range(size)),
        "relevance": list(GRADES[size]),
        "features": [[float(place), 0.25 * place] for place in range(size)],
        "fields": json.dumps({"device": "phone", "hour": 21}),
    }


@pytest.fixture
def table(tmp_path):
    """A candidates table with rows of 24, 2 and 3 candidates, and one without a relevant candidate."""
    records = [record(24), record(2), record(3), {**record(2), "row_id": 99, "relevance": [0.0, 0.0]}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def prompter(**settings) -> Prompter:
    ids = IDS if settings["ranking"] == "semantic_id" else [""] * NUM_ITEMS  # without semantic ids
    items = Catalogue([f"m{item}" for item in range(NUM_ITEMS)], ids, TITLES, ["drama"] * NUM_ITEMS)
    facts = {"evidence": "codes", "evidence_names": NAMES}
    return Prompter(items, PromptSettings(**facts, **settings), NAMES, EDGES)


def test_rows_are_read_by_row_id_with_every_field(table):
    rows = read_rows(table, needs_features=True)
    assert [row.row_id for row in rows] == [2, 3, 24]
    assert [row.user for row in rows] == [7, None, 7]
    assert rows[1] == RankingRow(
        row_id=3, history=(28, 29), candidates=(0, 1, 2), relevance=(1.0, 0.0, 2.0), ranks=(1, 2, 3),
        fields={"device": "phone", "hour": 21},
    )  # fmt: skip
    assert rows[1].features.tolist() == [[0.0, 0.0], [1.0, 0.25], [2.0, 0.5]]
    assert {len(row.candidates): row.target_rank for row in rows} == TARGETS
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows[0].user = 1


def test_a_row_without_a_relevant_candidate_has_no_target():
    row = RankingRow(1, (0,), (1, 2), (0.0, 0.0))
    assert (row.is_hit, row.target, row.target_rank, row.place_of_target([1, 0])) == (False, None, None, None)


def test_entries_that_are_not_one_for_each_candidate_are_refused():
    with pytest.raises(ValueError, match="row_id 4: relevance has 3 entries but there are 2 candidates; give one for"):
        RankingRow(4, (0,), (1, 2), (0.0, 1.0, 0.0))


@pytest.mark.parametrize("size", GRADES)
def test_a_shuffled_row_keeps_what_belongs_to_each_candidate(size):
    row = RankingRow.of(record(size))
    shown = shuffle(row, seed=3)
    assert shown != row and sorted(shown.candidates) == list(row.candidates)
    for place, item in enumerate(shown.candidates):  # item i was at place i
        assert (shown.ranks[place], shown.relevance[place]) == (item + 1, GRADES[size][item])
        assert shown.features[place].tolist() == [item, 0.25 * item]
    assert shown.target_rank == TARGETS[size] and shown.candidates[shown.target] == TARGETS[size] - 1
    assert shuffle(row, seed=3) == shown
    others = [shuffle(row, 3, epoch) != shown for epoch in (1, 2, 3, 4)]
    assert others.count(True) >= 2  # two candidates have two orders


@pytest.mark.parametrize("size", GRADES)
@pytest.mark.parametrize("settings", [NUMBERS, SEMANTIC_IDS], ids=["no ids", "ids"])
def test_a_prompt_shows_each_candidate_and_its_labels_are_what_a_completion_writes(size, settings):
    asked = prompter(**settings).ask(shuffle(RankingRow.of(record(size)), seed=0), 64)
    shown = asked.row.candidates
    lines = asked.prompt.split("Candidates:\n")[1].splitlines()
    for place, (line, item) in enumerate(zip(lines, shown, strict=True)):
        # title, or without one the item's own id; the facts in buckets: popularity `item`, lift item / 4 in halves
        numbered = f" {place + 1}. {TITLES[item] or f'm{item}'}"
        with_id = f"{IDS[item]} {' | '.join(filter(None, [TITLES[item], 'drama']))}"
        facts = f" pop:{min(item, 9)} lift:{min(item // 2, 9)}"
        assert line == (numbered if settings is NUMBERS else with_id) + facts
    order = list(range(size))[::-1]
    parsed = parse_completion(completion("why", order, asked.labels), asked.labels)
    assert (parsed.order, parsed.trace) == (order, "why")
    assert asked.row.place_of_target(parsed.order) == size - asked.row.target


def completions_of(asked) -> list[str]:
    """The best order there is, the input order, and no ranking."""
    best = sorted(range(len(asked.labels)), key=lambda place: (-asked.row.relevance[place], asked.row.ranks[place]))
    shown = sorted(range(len(asked.labels)), key=lambda place: asked.row.ranks[place])
    return [completion("why", best, asked.labels), completion("why", shown, asked.labels), "no ranking"]


@pytest.mark.parametrize("size", GRADES)
@pytest.mark.parametrize("settings", [NUMBERS, SEMANTIC_IDS], ids=["no ids", "ids"])
def test_every_shipped_reward_takes_the_row(size, settings):
    asked = prompter(**settings).ask(shuffle(RankingRow.of(record(size)), seed=1), 8192)
    texts = completions_of(asked)
    columns = reward_columns([asked] * 3) | {"completion_ids": [[1, 2], [1, 2], [1]]}
    for condition in (None, *plugins.known_names("rewards.conditions")):
        specs = [{"name": name, "condition": condition} for name in plugins.known_names("rewards")]
        scores = score(load_rewards(specs), texts, columns)
        values = dict(zip([spec["name"] for spec in specs], scores.values.T.tolist(), strict=True))
        assert all(math.isfinite(value) for of_reward in values.values() for value in of_reward)
        assert all(of_reward[0] >= max(of_reward) - 1e-9 for of_reward in values.values())  # none beats the best order
        # the target rises from its first-stage rank to the top
        assert values["rank_promotion"][0] == pytest.approx((TARGETS[size] - 1) / size)
        assert scores.totals == pytest.approx(np.sum(scores.values, axis=1))


@pytest.mark.parametrize("size", GRADES)
def test_a_row_is_stored_and_read_back(size, tmp_path):
    asked = prompter(**NUMBERS).ask(shuffle(RankingRow.of(record(size)), seed=1), 8192)
    told = {column.name: column.value(asked) for column in REWARD_COLUMNS}
    write_rollouts(tmp_path, rollout(prompt=asked.prompt, order=None, discard_reason="all_equal", **told))
    (back,) = store.read_rollouts(tmp_path).to_pylist(maps_as_pydicts="strict")
    assert list(back) == SCHEMA.names
    assert {name: [back[name]] for name in told} | {"prompts": [back["prompt"]]} == reward_columns([asked])
    assert json.loads(back["fields"]) == {"device": "phone", "hour": 21}
    assert back["target_rank"] == TARGETS[size] and back["max_completion_tokens"] == 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda read: read.drop_columns("relevance"), "has no column 'relevance'; it has row_id, user"),
        (lambda read: read.drop_columns("features"), "has no column features, which evidence rests on"),
        (lambda read: read.slice(3), "none of its 1 rows lists a relevant item; use longer candidate lists"),
        (
            lambda read: pa.Table.from_pylist([{**record(3), "features": []}], schema=read.schema),
            "row_id 3 has no features, which evidence rests on",
        ),
    ],
)
def test_a_table_that_lacks_something_is_refused_by_name(table, change, message):
    pq.write_table(change(pq.read_table(table)), table)
    with pytest.raises(ValueError, match=f"train.parquet.*{message}"):
        read_rows(table, needs_features=True)


def test_training_rows_are_those_that_the_traces_stage_gave_to_a_stage(table, tmp_path):
    (tmp_path / "candidates").mkdir()
    table.rename(tmp_path / "candidates/train.parquet")
    write_traces(tmp_path / "traces", {2: "sft", 3: "dapo", 24: "sft"})
    found = {use: [row.row_id for row in training_rows(tmp_path, use)] for use in ("sft", "dapo", "all")}
    assert found == {"sft": [2, 24], "dapo": [3], "all": [2, 3, 24]}
    with pytest.raises(ValueError, match="rows is 'both'; choose one of sft, dapo, all"):
        training_rows(tmp_path, "both")
    write_traces(tmp_path / "traces", {2: "sft"})
    with pytest.raises(ValueError, match="no training rows are left for dapo; lower rows_for_sft of the traces stage"):
        training_rows(tmp_path, "dapo")


def test_a_choice_of_rows_keeps_their_order_and_follows_from_the_seed():
    chosen = choose_rows(range(100), 10, seed=1)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen)
    assert choose_rows(range(100), 10, seed=1) == chosen != choose_rows(range(100), 10, seed=2)
    assert choose_rows(range(3), 0, seed=1) == choose_rows(range(3), 5, seed=1) == [0, 1, 2]


def test_histories_come_through_one_reader(tmp_path):
    write_interactions(tmp_path / "data", {1: [3, 4, 6], 0: [2, 5]}, ["train", "rerank", "test", "train", "valid"])
    users, items = training_items(tmp_path / "data")
    assert (users.tolist(), items.tolist()) == ([0, 1, 1], [2, 3, 4])  # nothing that is held out
    sequences = training_sequences(tmp_path / "data")
    assert {user: items.tolist() for user, items in sequences.items()} == {0: [2], 1: [3, 4]}
    test = TargetRows.load(tmp_path).of_split("test")
    assert (len(test), test.histories[0].tolist(), test.targets.tolist(), test.users.tolist()) == (1, [3, 4], [6], [1])
    assert (test.row_ids.tolist(), test.splits.tolist()) == ([1], ["test"])
