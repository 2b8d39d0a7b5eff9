"""One row through all it goes through: read, shuffled, asked, answered, rewarded, stored and read back."""

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
NAMES, EDGES = (
    ["popularity", "lift"],
    {"popularity": [float(e) for e in range(1, 10)], "lift": [0.5 * e for e in range(1, 10)]},
)

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
        "first_stage_scores": [1.0 / (1 + place) for place in range(size)],
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
    assert [row.row_id for row in read_rows(table, only_hits=False)] == [2, 3, 24, 99]
    assert [row.user for row in rows] == [7, None, 7]
    assert rows[1] == RankingRow(
        row_id=3, history=(28, 29), candidates=(0, 1, 2), relevance=(1.0, 0.0, 2.0), ranks=(1, 2, 3),
        scores=(1.0, 1 / 2, 1 / 3), fields={"device": "phone", "hour": 21},
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
        assert (shown.ranks[place], shown.relevance[place], shown.scores[place]) == (
            item + 1,
            GRADES[size][item],
            1 / (1 + item),
        )
        assert shown.features[place].tolist() == [item, 0.25 * item]
    assert shown.target_rank == TARGETS[size] and shown.candidates[shown.target] == TARGETS[size] - 1
    assert shuffle(row, seed=3) == shown
    assert [shuffle(row, 3, epoch) != shown for epoch in (1, 2, 3, 4)].count(
        True
    ) >= 2  # two candidates have two orders


@pytest.mark.parametrize("size", GRADES)
@pytest.mark.parametrize("settings", [NUMBERS, SEMANTIC_IDS], ids=["no ids", "ids"])
def test_a_prompt_shows_each_candidate_and_its_labels_are_what_a_completion_writes(size, settings):
    asked = prompter(**settings).ask(shuffle(RankingRow.of(record(size)), seed=0), 64)
    shown = asked.row.candidates
    lines = asked.prompt.split("Candidates:\n")[1].splitlines()
    for place, (line, item) in enumerate(zip(lines, shown, strict=True)):
        # title, or without one the item's own id; the facts in buckets: popularity `item`, lift item / 4 in halves
        text = TITLES[item] or f"m{item}"
        facts = f" pop:{min(item, 9)} lift:{min(item // 2, 9)}"
        if settings is NUMBERS:
            assert line == f" {place + 1}. {text}{facts}"
        else:
            fields = " | ".join(filter(None, [TITLES[item], "drama"]))
            assert line == f"{IDS[item]} {fields}{facts}"
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
    sampled = {
        "step": 0, "run": "toy", "round": 0, "group": 0, "target": asked.row.candidates[asked.row.target],
        "prompt": asked.prompt, "completion": "no ranking", "completion_ids": [1], "policy_logps": None,
        "sampling_logps": None, "reward_components": {}, "conditions": {}, "reward": 0.0, "advantage": None,
        "truncated": False, "failure": "no_trace_end", "order": None, "target_rank_after": None, "kept": False,
        "discard_reason": "all_equal",
    }  # fmt: skip
    writer = store.RolloutWriter(tmp_path)
    writer.add([sampled | {column.name: column.value(asked) for column in REWARD_COLUMNS}])
    writer.close()
    (back,) = store.read_rollouts(tmp_path).to_pylist(maps_as_pydicts="strict")
    assert list(back) == SCHEMA.names
    told = {name: [back[name]] for name in (column.name for column in REWARD_COLUMNS)}
    assert told | {"prompts": [back["prompt"]]} == reward_columns([asked])
    assert json.loads(back["fields"]) == {"device": "phone", "hour": 21}
    assert back["target_rank"] == TARGETS[size] and back["max_completion_tokens"] == 8192


def test_a_table_that_lacks_something_is_refused_by_name(table, tmp_path):
    read = pq.read_table(table)
    cases = [
        (read.drop_columns("relevance"), {}, "has no column 'relevance'; it has row_id, user"),
        (read.drop_columns("features"), {"needs_features": True}, "has no column features, which evidence rests on"),
        (read.slice(3), {}, "none of its 1 rows lists a relevant item; use longer candidate lists"),
        (
            pa.Table.from_pylist([{**record(3), "features": []}], schema=read.schema),
            {"needs_features": True},
            "row_id 3 has no features, which evidence rests on",
        ),
    ]
    for number, (broken, options, message) in enumerate(cases):
        path = tmp_path / f"broken{number}.parquet"
        pq.write_table(broken, path)
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            read_rows(path, **options)


def test_training_rows_are_those_that_the_traces_stage_gave_to_a_stage(table, tmp_path):
    for name in ("candidates", "traces"):
        (tmp_path / name).mkdir()
    table.rename(tmp_path / "candidates/train.parquet")
    split = pa.table({"row_id": [2, 3, 24], "used_for": ["sft", "dapo", "sft"]})
    pq.write_table(split, tmp_path / "traces/row_split.parquet")
    found = {use: [row.row_id for row in training_rows(tmp_path, use)] for use in ("sft", "dapo", "all")}
    assert found == {"sft": [2, 24], "dapo": [3], "all": [2, 3, 24]}
    with pytest.raises(ValueError, match="rows is 'both'; choose one of sft, dapo, all"):
        training_rows(tmp_path, "both")
    pq.write_table(split.slice(0, 1), tmp_path / "traces/row_split.parquet")
    with pytest.raises(ValueError, match="no training rows are left for dapo; lower rows_for_sft of the traces stage"):
        training_rows(tmp_path, "dapo")


def test_a_choice_of_rows_keeps_their_order_and_follows_from_the_seed():
    chosen = choose_rows(range(100), 10, seed=1)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen)
    assert choose_rows(range(100), 10, seed=1) == chosen != choose_rows(range(100), 10, seed=2)
    assert choose_rows(range(3), 0, seed=1) == choose_rows(range(3), 5, seed=1) == [0, 1, 2]


def test_histories_come_through_one_reader(tmp_path):
    (tmp_path / "data").mkdir()
    lines = [(1, 4, 1, "rerank"), (0, 2, 0, "train"), (1, 3, 0, "train"), (0, 5, 1, "valid"), (1, 6, 2, "test")]
    columns = dict(zip(("user", "item", "position", "split"), map(list, zip(*lines, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "data/interactions.parquet")
    users, items = training_items(tmp_path / "data")
    assert (users.tolist(), items.tolist()) == ([0, 1, 1], [2, 3, 4])  # nothing that is held out
    assert {user: items.tolist() for user, items in training_sequences(tmp_path / "data").items()} == {
        0: [2],
        1: [3, 4],
    }
    rows = {"row_id": [0, 1], "user": [0, 1], "split": ["valid", "test"], "history": [[2], [3, 4]], "target": [5, 6]}
    pq.write_table(pa.table(rows), tmp_path / "data/rows.parquet")
    test = TargetRows.load(tmp_path).of_split("test")
    assert (len(test), test.histories[0].tolist(), test.targets.tolist(), test.users.tolist()) == (1, [3, 4], [6], [1])
