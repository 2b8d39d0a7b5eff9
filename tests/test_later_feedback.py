"""Feedback that comes long after its list: no row knows what came after it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from request_logs import START, arguments, interaction, ranking, request, write_csv, write_lines
from request_run import DAY
from toy_run import finish

from rerank import candidates, data
from rerank.candidates import CandidatesArguments, reordering
from rerank.candidates.shown_lists import ShownLists
from rerank.rows import TargetRows

ITEMS = [f"i{number}" for number in range(20)]
NUMBERS = ("history", "history_times", "history_events", "candidates", "first_stage_scores", "first_stage_ranks")
VALID_FROM, TEST_FROM = 14.0, 17.0  # days


def draw_events(num=120, seed=0):
    """Rankings of twenty days; every second is clicked, up to four days later, and some clicks are bought after that.

    The first candidates are liked more, and so is the item 0.
    """
    rng = np.random.default_rng(seed)
    events = []
    for number, day in enumerate(np.sort(rng.uniform(0, 20, num)).tolist()):
        items = rng.choice(20, int(rng.integers(3, 7)), replace=False).tolist()
        row = request(f"q{number}", f"u{rng.integers(8)}", 0, [ITEMS[item] for item in items], [])
        events.append((day, ranking(row, moment(day))))
        for item in items:
            if rng.random() < 0.15 + 0.4 * (item < 5):
                clicked = day + rng.uniform(0, 4) * (number % 2)
                events.append((clicked, interaction(row, ITEMS[item], moment(clicked), "click")))
                bought = clicked + rng.uniform(0, 3)
                if rng.random() < 0.5:
                    events.append((bought, interaction(row, ITEMS[item], moment(bought), "buy")))
    return sorted(events, key=lambda event: event[0])


def moment(day):
    return round(1000 * (START + day * DAY))


def run_data(folder, events, valid_from=VALID_FROM, test_from=TEST_FROM):
    """The data stage on a raw log split at two days."""
    (folder / "data").mkdir(parents=True)
    days = np.array([day for day, event in events if event["event"] == "ranking"])
    path = write_lines(folder / "events.jsonl", [json.dumps(event) for _, event in events])
    of_split = {
        "valid_fraction": float(np.mean((days >= valid_from) & (days < test_from))),
        "test_fraction": float(np.mean(days >= test_from)),
    }
    items = write_csv(folder / "items.csv", "item,title", [(item, item) for item in ITEMS])
    args = arguments(path, items=items, grades={"click": 1, "buy": 2}, **of_split)
    finish(folder / "data", data.main(args, folder / "data"), {"split": "by_time"})
    finish(folder / "semantic_ids")


def run_stages(folder, events, *splits, source="requests", window=2 * DAY):
    """The rows of both stages by request."""
    run_data(folder, events, *splits)
    (folder / "out").mkdir()
    args = CandidatesArguments(run_dir=str(folder), source=source, count_window=window)
    candidates.main(args, folder / "out")
    found = {}
    for split in ("train", "valid", "test"):
        rows = pq.read_table(folder / f"out/{split}.parquet").to_pylist()
        found |= {row["request_id"]: {**row, "split": split} for row in rows}
    return found


def test_no_number_of_a_row_changes_when_later_events_are_deleted_from_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(reordering, "LEAST_ROWS", 25)
    events, options = draw_events(), {"source": "lambdamart", "window": 4 * DAY}
    whole = run_stages(tmp_path / "whole", events, **options)
    days = [day for day, event in events if event["event"] == "ranking"]
    for until in (11.7, 18.5):
        left = [(day, event) for day, event in events if day < until]
        asked = [day for day in days if day < until]
        splits = (VALID_FROM, TEST_FROM) if until > TEST_FROM else (asked[-2], asked[-1])
        cut = run_stages(tmp_path / f"before_{until}", left, *splits, **options)
        same = [name for name, row in cut.items() if row["split"] == whole[name]["split"]]
        assert len(same) == len(asked) - (0 if until > TEST_FROM else 2)  # which are held out only in what is left
        assert any(cut[name]["relevance"] != whole[name]["relevance"] for name in same)
        for name in same:
            assert [cut[name][column] for column in NUMBERS] == [whole[name][column] for column in NUMBERS]
            assert np.array_equal(cut[name]["features"], whole[name]["features"], equal_nan=True)


def test_a_click_counts_from_its_own_time_on_and_its_list_from_the_request_on(tmp_path):
    # Days, of which START is 0.52; windows begin with every second one. The last two are held out.
    asked = [0.99, 1.5, 3.5, 5.5, 6.0, 8.0]
    rows = [request(f"q{n}", f"u{n}", 0, ["i0", "i1"], []) for n in range(6)]
    events = [(day, ranking(row, moment(day))) for day, row in zip(asked, rows, strict=True)]
    clicks = [(2.0, 0, "i0"), (4.0, 2, "i0"), (7.0, 3, "i1"), (8.5, 5, "i0")]
    events += [(day, interaction(rows[row], item, moment(day))) for day, row, item in clicks]
    found = run_stages(tmp_path, events, 6.0, 8.0)
    names = json.loads((tmp_path / "out/features.json").read_text())["names"]
    told = ("shown", "popularity", "click_rate")
    of_first = {name: [row["features"][0][names.index(column)] for column in told] for name, row in found.items()}
    # i0 of the lists before: shown, clicked, and (clicked + 10 * clicks / all shown) / (shown + 10)
    assert of_first["q1"] == [1, 0, 0]
    assert of_first["q2"] == pytest.approx([2, 1, (1 + 10 / 4) / 12])
    assert of_first["q3"] == pytest.approx([3, 2, (2 + 10 * 2 / 6) / 13])
    assert of_first["q4"] == of_first["q5"] == pytest.approx([4, 2, (2 + 10 * 2 / 8) / 14])  # not i1's, at 7
    splits = pq.read_table(tmp_path / "data/interactions.parquet")["split"].to_pylist()
    assert sorted(splits) == ["rerank", "rerank", "test", "valid"]  # the click at 7 is after the first held-out row


def test_rows_without_the_time_of_feedback_are_read_as_if_it_had_come_at_once(tmp_path):
    events = [(day, event) for day, event in draw_events(60) if event.get("type") != "buy"]
    run_data(tmp_path, events)
    path = tmp_path / "data/rows.parquet"
    late = TargetRows.load(tmp_path)
    pq.write_table(pq.read_table(path).drop_columns("feedback"), path)
    old = TargetRows.load(tmp_path)
    assert late.lists is not None and old.lists is not None
    for row, (mine, others) in enumerate(zip(old.lists.feedback, late.lists.feedback, strict=True)):
        assert mine[:, :2].tolist() == others[:, :2].tolist()
        assert (mine[:, 2] == old.lists.times[row]).all() and (others[:, 2] >= mine[:, 2]).all()
    assert np.array_equal(ShownLists.of(old).feedback(20), ShownLists.of(late).feedback(20))
