import datetime
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toy_run import CATALOGUE, NUM_ITEMS, SETTINGS, toy_sequences, write_run

from rerank import rank
from rerank.baselines import Counts, ItemFacts, feature_rows
from rerank.launch.files import write_json
from rerank.models.ranker import Answer, RankingModel, last_tag_alone
from rerank.prompts import parse_completion
from rerank.rank.encoder import encode_rows
from rerank.rank.files import read_rows_file
from rerank.rank.rows import check_columns

ROWS = [
    {"row_id": 5, "history": ["m0", "m1"], "candidates": ["m2", "m3", "m4", "m5"]},
    {"row_id": 9, "history": ["m7"], "candidates": ["m8", "m9", "m1", "m0"]},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("rank") / "run") / "sft/model"


@pytest.fixture
def model(model_dir):
    return RankingModel.load(model_dir)


def encode(records, model, unknown="last"):
    return encode_rows(records, model, model.load_counts(), unknown)


def test_encoded_rows_hold_items_and_the_features_of_the_saved_counts(model):
    first, second = (one.row for one in encode(ROWS, model))
    assert first.history == (0, 1) and second.candidates == (8, 9, 1, 0) and second.row_id == 2
    counts = Counts.fit(toy_sequences(), NUM_ITEMS)
    alone = feature_rows(counts, [np.array([0, 1])], np.array([[2, 3, 4, 5]]), np.zeros((1, 4)), None)
    assert np.array_equal(first.features, alone[0])
    shorter = [one.row for one in encode([ROWS[1], {**ROWS[0], "candidates": ["m2", "m3"]}, ROWS[0]], model)]
    assert shorter[1].features.shape == (2, len(first.features[0]))
    assert np.array_equal(shorter[2].features, alone[0])  # whatever the lists beside it
    prompt = replace(model.prompter, tokenizer=model.load_tokenizer()).prompt(first)
    assert CATALOGUE.semantic_ids[5] + " Title 5 | drama next:" in prompt


def test_ids_that_are_numbers_are_found_and_written_back_as_numbers(model):
    model.prompter.catalogue.item_ids[:] = [str(item) for item in range(NUM_ITEMS)]
    (row,) = encode([{"history": [3], "candidates": [4, 5]}], model)
    assert row.row.candidates == (4, 5)
    assert row.ranking(Answer([1, 0], None, "why", "", 3, False)) == [5, 4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"candidates": ["m1", "m2", "m1", "m3"]}, "candidates holds 'm1' twice; give each item once."),
        ({"candidates": ["m1"]}, "candidates has 1 item; there is nothing to rank."),
        ({"candidates": []}, "candidates has no item; there is nothing to rank."),
        ({"candidates": "m1 m2"}, "candidates is 'm1 m2' but must be a list of item ids."),
        ({"candidates": ["m1", None]}, "candidates holds None but must be a list of item ids, texts or numbers."),
        ({"history": None}, "history is None but must be a list of item ids."),
        ({"history": ...}, "column 'history' is missing; add it."),
    ],
)
def test_a_bad_row_has_its_reason_and_the_others_are_ranked(model, change, reason):
    bad = {name: value for name, value in {**ROWS[1], **change}.items() if value is not ...}
    first, second, third = encode([ROWS[0], bad, ROWS[1]], model)
    assert second == reason
    alone = encode([ROWS[0], ROWS[0], ROWS[1]], model)
    assert (first, third.row) == (alone[0], alone[2].row)
    assert np.array_equal(third.row.features, alone[2].row.features)


def test_unknown_ids_are_left_out_of_histories_and_dealt_with_among_candidates(model, caplog):
    record = {"history": ["zz", "m0", "yy"], "candidates": ["new", "m3", "m4", "newer"]}
    answer = Answer([1, 0], None, None, "", 3, False)
    (last,), (drop,), (refuse,) = (encode([record], model, unknown) for unknown in ("last", "drop", "refuse"))
    assert last.row.history == (0,) and last.row.candidates == (3, 4)
    assert last.ranking(answer) == ["m4", "m3", "new", "newer"] and drop.ranking(answer) == ["m4", "m3"]
    assert refuse == "candidates holds 'new', which the model does not know; leave it out, or give it by --items."
    (known,) = encode([{"history": ["m0"], "candidates": ["m3", "m4"]}], model)
    assert np.array_equal(known.row.features, last.row.features)
    rank.warn_of_unknown([last, known, last], "last")
    assert "4 ids in histories of 2 rows are unknown to the model and left out" in caplog.text
    assert "4 ids in candidates of 2 rows are unknown to the model and placed last" in caplog.text


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_warning_says_that_rows_are_younger_than_the_counts_whatever_their_times_are(caplog, unit):
    utc = datetime.UTC
    old = datetime.datetime(2026, 1, 2, tzinfo=utc).timestamp()
    counts = Counts.fit({0: np.array([0, 1])}, 2, until=old * unit)
    rank.warn_of_old_counts(
        [{"time": old}, {"time": "2026-01-09"}, {"time": old * 1000}, {"time": "noon"}, {"time": "\ud800"}], counts
    )
    assert not caplog.text
    young = [datetime.date(2026, 1, 12), datetime.datetime(2026, 1, 12), datetime.datetime(2026, 1, 12, tzinfo=utc)]
    young += ["2026-01-12", "2026-01-12T00:00:00", "2026-01-12 00:00:00+00:00", pd.Timestamp("2026-01-12")]
    young += [old + 10 * 86_400, str(old + 10 * 86_400), (old + 10 * 86_400) * 1000, None]
    rank.warn_of_old_counts([{"time": time} for time in [*young, float("nan"), pd.NaT]] + [{}], counts)
    assert "10 of 14 rows are more than 7 days younger than the counts of the model" in caplog.text
    assert "which reach until 2026-01-02, the youngest by 10 days" in caplog.text


def test_a_row_of_fewer_than_two_known_candidates_needs_no_model_where_the_others_go_last(model, caplog):
    records = [{"history": ["m0"], "candidates": ids} for ids in (["zz", "m1", "yy"], ["yy", "zz"])]
    encoded = encode([records[0], ROWS[0], records[1]], model)
    assert encoded[1].row.candidates == (2, 3, 4, 5)
    added = rank.answer_rows([encoded[0], encoded[2]], model)
    assert [one["ranking"] for one in added] == [["m1", "zz", "yy"], ["yy", "zz"]]
    assert [one["failure"] for one in added] == [None, None]
    rank.warn_of_unknown(encoded, "last")
    assert "4 ids in candidates of 2 rows are unknown to the model and placed last" in caplog.text
    for record, number in zip(records, ("1 item", "no item"), strict=True):
        (reason,) = encode([record], model, "drop")
        assert reason == f"candidates has {number} that the model knows; give the others by --items."


# --- rows of what a log has


SHOWN = {
    "item_fields": ["semantic_id", "brand"],
    "user_fields": ["age"],
    "request_fields": ["device"],
    "history_fields": ["time", "event"],
    "evidence_names": ["first_stage_score", "candidate_price", "popularity", "stock"],
}
LOGGED = {"history": ["m0", "m1"], "candidates": ["m2", "m3", "m4"], "age": 30, "device": "tv", "time": 172800}
LOGGED |= {"history_times": [0, None], "history_events": ["click", None]}
LOGGED |= {"scores": [3.5, 2, 1], "price": [1.0, None, 3.0]}


@pytest.fixture
def log_model(model_dir, tmp_path):
    """A model whose prompts show fields of items, users and requests, and numbers of candidates and of items."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    fields = {"brand": [f"b{item}" for item in range(NUM_ITEMS)]}
    replace(CATALOGUE, fields=fields).save(folder, ["brand"])
    replace(SETTINGS, **SHOWN, evidence="words", ranking="letter").save(folder)
    facts = ItemFacts.of(NUM_ITEMS, numbers={"stock": np.arange(NUM_ITEMS) / 2})
    Counts.fit(toy_sequences(), NUM_ITEMS, facts).save(folder / "evidence.npz")
    names = ["candidate_price", "stock", "candidate_unshown", "popularity", "first_stage_score"]
    write_json(folder / "features.json", {"names": names, "edges": {}})
    return RankingModel.load(folder)


def test_rows_bring_the_fields_and_numbers_that_the_prompts_show(log_model):
    popularity = Counts.fit(toy_sequences(), NUM_ITEMS).popularity
    (row,) = (one.row for one in encode([LOGGED], log_model))
    counted = [f"chosen {popularity[item]} times by others; stock {item / 2:.2f}" for item in (2, 3, 4)]
    assert log_model.prompter.message(row).split("\n") == [
        "Rank:",
        "User: age: 30",
        "Request: device: tv",
        "History:",
        f"{CATALOGUE.semantic_ids[0]} brand: b0 | 2d | click",
        f"{CATALOGUE.semantic_ids[1]} brand: b1",
        "Candidates:",
        f" A.{CATALOGUE.semantic_ids[2]} brand: b2: first-stage score 3.50; candidate_price 1.00; {counted[0]}",
        f" B.{CATALOGUE.semantic_ids[3]} brand: b3: first-stage score 2.00; candidate_price unknown; {counted[1]}",
        f" C.{CATALOGUE.semantic_ids[4]} brand: b4: first-stage score 1.00; candidate_price 3.00; {counted[2]}",
    ]


@pytest.mark.parametrize(
    ("time", "then"),
    [("172800", "0"), ("1970-01-03", "1970-01-01T00:00"), ("1970-01-03T02:00+02:00", "1970-01-01T00:00Z"),
     (datetime.date(1970, 1, 3), datetime.datetime(1970, 1, 1)), ("1970-01-03 00:00", 0)],
)  # fmt: skip
def test_times_of_rows_are_numbers_or_dates(log_model, time, then):
    (row,) = (one.row for one in encode([{**LOGGED, "time": time, "history_times": [then, None]}], log_model))
    assert (row.time, row.history_times) == (172800, (0, None))
    (failure,) = encode([{**LOGGED, "history_times": ["noon", None]}], log_model)
    assert failure == "history_times holds 'noon' but must hold numbers, or dates such as 2026-01-31T12:00."


def test_lists_of_csv_hold_numbers_parted_by_spaces(log_model, tmp_path):
    names = [*LOGGED]
    cells = {"history": "m0 m1", "candidates": "m2 m3 m4", "history_times": "0 1", "history_events": "click buy"}
    cells |= {"scores": "3.5 2 1", "price": "1 2 3"}
    line = ",".join(cells.get(name, str(LOGGED[name])) for name in names)
    new = ",".join("" if name.startswith("history") else cells.get(name, str(LOGGED[name])) for name in names)
    (tmp_path / "rows.csv").write_text("\n".join([",".join(names), line, new]) + "\n")
    row, of_new_user = (one.row for one in encode(read_rows_file(tmp_path / "rows.csv").rows, log_model))
    assert row.history_times == (0.0, 1.0) and row.history_events == ("click", "buy")
    assert of_new_user.history == () == of_new_user.history_times
    assert row.features[:, 0].tolist() == [1, 2, 3] and row.features[:, 4].tolist() == [3.5, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"age": ...},
            r"rows: column 'age' is missing, which the model's prompts show \(user_fields\); add",
        ),
        ({"device": ...}, r"column 'device' is missing, which the model's prompts show \(request_fields\)"),
        ({"time": ...}, r"column 'time' is missing, which the model's prompts show \(history_fields: time\)"),
        ({"history_events": ...}, r"column 'history_events' is missing, .* \(history_fields: event\)"),
        ({"price": ...}, r"column 'price' is missing, which .* \(evidence_names: candidate_price\)"),
        ({"scores": ...}, r"column 'scores' is missing, which .* \(evidence_names: first_stage_score\)"),
        ({"scores": [1, 2]}, r"^scores has 2 entries but there are 3 items; give one for each"),
        ({"history_times": [1]}, r"^history_times has 1 entries but there are 2 items"),
        ({"price": ["a", 1, 2]}, r"^price holds 'a' but must hold numbers"),
        ({"time": "noon"}, r"^time holds 'noon' but must hold numbers"),
        ({"time": float("inf")}, r"^time holds inf but must hold numbers"),
        ({"age": {1}}, r"^age holds \{1\}, which prompts cannot show; give a text or a number"),
        ({"history_events": ["buy", 7]}, r"^history_events holds 7 but must hold texts"),
    ],
)
def test_what_prompts_show_and_a_row_lacks_is_refused_by_name(log_model, change, message):
    changed = {name: value for name, value in {**LOGGED, **change}.items() if value is not ...}
    if ... in change.values():  # no row has the column
        with pytest.raises(ValueError, match=message):
            check_columns([changed], log_model, "rows")
    _, reason = encode([LOGGED, changed], log_model)
    assert re.search(message.removeprefix("rows: "), reason)


def test_numbers_of_unknown_candidates_and_times_of_unknown_items_are_left_out(log_model):
    more = {"history": ["m0", "zz", "m1"], "history_times": [0, 9, None], "history_events": ["click", "buy", None]}
    more |= {"candidates": ["new", "m2", "m3", "m4"], "scores": [9, 3.5, 2, 1], "price": [7, 1.0, None, 3.0]}
    known, unknown = encode([LOGGED, {**LOGGED, **more}], log_model)
    assert unknown.unknown == (1, 1)
    assert log_model.prompter.message(unknown.row) == log_model.prompter.message(known.row)


def test_the_last_closing_tag_of_a_constrained_answer_ends_its_trace():
    text = "<think>so </think> it is</think> 2 1"  # the first one is written in other tokens
    assert parse_completion(text, ["1", "2"]).failure == "junk"
    parsed = parse_completion(last_tag_alone(text), ["1", "2"])
    assert (parsed.order, parsed.trace) == ([1, 0], "so  it is")


def test_a_list_may_have_any_length_that_letters_context_and_the_token_limit_allow(model, tmp_path):
    model = replace(model, folder=shutil.copytree(model.folder, tmp_path / "model"))
    config = json.loads((model.folder / "config.json").read_text())
    write_json(model.folder / "config.json", {**config, "max_position_embeddings": 2000})
    long = {"history": [], "candidates": [f"m{item}" for item in range(NUM_ITEMS)]}
    needed = 2 + 2 * NUM_ITEMS + 1  # two tags, ids of two tokens, and the end
    rows = encode([ROWS[0], long], replace(model, max_completion_tokens=needed))  # trained on lists of four
    assert [len(one.row.candidates) for one in rows] == [4, 12] and rows[1].row.history == ()
    message = f"a ranking of 12 of 12 candidates takes up to {needed} tokens but a completion has 16"
    short, reason = encode([ROWS[0], long], model)
    assert short.row.candidates == (2, 3, 4, 5) and reason.startswith(message)
    _, reason = encode([ROWS[0], ROWS[0]], replace(model, max_completion_tokens=1980))
    assert re.match(r"its prompt has \d+ tokens but the model's context leaves 20; give shorter lists", reason)
    model.prompter.catalogue.item_ids.extend(f"n{item}" for item in range(20))
    letters = replace(model, prompter=replace(model.prompter, settings=replace(SETTINGS, ranking="letter")))
    many = {"history": [], "candidates": letters.prompter.catalogue.item_ids[:27]}
    _, reason = encode([ROWS[0], many], letters)
    assert reason.startswith("candidates has 27 items but the model has 26 labels; give at most 26")
