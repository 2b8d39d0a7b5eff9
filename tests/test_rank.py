import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from toy_run import CATALOGUE, NUM_ITEMS, SETTINGS, toy_sequences, write_run

from rerank import rank
from rerank.baselines import Counts, ItemFacts, feature_rows
from rerank.launch.files import write_json
from rerank.models.ranker import Answer, RankingModel, last_tag_alone
from rerank.prompts import parse_completion

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


def write_rows(folder, suffix, rows=ROWS):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        lines = [f"{row['row_id']},{' '.join(row['history'])},{' '.join(row['candidates'])}" for row in rows]
        path.write_text("\n".join(["row_id,history,candidates", *lines]) + "\n")
    return path


@pytest.mark.parametrize("suffix", rank.FORMATS)
def test_rows_read_alike_from_every_format(tmp_path, suffix):
    assert rank.read_records(write_rows(tmp_path, suffix)) == ROWS


def test_encoded_rows_hold_items_and_the_features_of_the_saved_counts(model):
    first, second = rank.encode_rows(ROWS, model, "rows")
    assert first.history == (0, 1) and second.candidates == (8, 9, 1, 0) and second.row_id == 2
    counts = Counts.fit(toy_sequences(), NUM_ITEMS)
    alone = feature_rows(counts, [np.array([0, 1])], np.array([[2, 3, 4, 5]]), np.zeros((1, 4)), None)
    assert np.array_equal(first.features, alone[0])
    shorter = rank.encode_rows([ROWS[1], {**ROWS[0], "candidates": ["m2", "m3"]}, ROWS[0]], model, "rows")
    assert shorter[1].features.shape == (2, len(first.features[0]))
    assert np.array_equal(shorter[2].features, alone[0])  # whatever the lists beside it
    prompt = replace(model.prompter, tokenizer=model.load_tokenizer()).prompt(first)
    assert CATALOGUE.semantic_ids[5] + " Title 5 | drama next:" in prompt


def test_ids_that_are_numbers_are_found_and_written_back_as_numbers(model):
    model.prompter.catalogue.item_ids[:] = [str(item) for item in range(NUM_ITEMS)]
    record = {"history": [3], "candidates": [4, 5]}
    assert rank.encode_rows([record], model, "rows")[0].candidates == (4, 5)
    assert rank.add_answer(record, Answer([1, 0], None, "why", "", 3, False))["ranking"] == [5, 4]


def test_a_ranking_is_written_in_the_original_ids_and_a_failure_as_null(tmp_path):
    answers = [Answer([3, 2, 1, 0], None, "because", "", 9, False), Answer(None, "empty", None, "", 1, False)]
    records = [rank.add_answer(record, answer) for record, answer in zip(ROWS, answers, strict=True)]
    assert records[0]["ranking"] == ["m5", "m4", "m3", "m2"] and records[0]["trace"] == "because"
    assert records[1]["ranking"] is None and records[1]["failure"] == "empty" and records[1]["row_id"] == 9
    rank.write_records(records, tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == records
    rank.write_records(records, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == records
    rank.write_records(records, tmp_path / "out.csv")
    assert pyarrow.csv.read_csv(tmp_path / "out.csv").to_pylist()[0]["ranking"] == "m5 m4 m3 m2"
    rank.write_records(records[1:], tmp_path / "out.parquet")  # columns that are null throughout keep their type
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("ranking").type == pa.list_(pa.string()) and schema.field("trace").type == pa.string()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": ["m0", "zz"]}, r"rows, row 2: history holds 'zz', which is not in the model's catalogue"),
        ({"candidates": ["m1", "m2", "m1", "m3"]}, r"rows, row 2: candidates holds 'm1' twice"),
        ({"candidates": ["m1"]}, r"rows, row 2: candidates has 1 item; there is nothing to rank"),
        ({"candidates": []}, r"rows, row 2: candidates has no item; there is nothing to rank"),
        ({"candidates": "m1 m2"}, r"row 2: candidates is 'm1 m2' but must be a list"),
        ({"history": None}, r"row 2: history is None but must be a list"),
    ],
)
def test_a_bad_row_is_named_by_its_number(model, change, message):
    with pytest.raises(ValueError, match=message):
        rank.encode_rows([ROWS[0], {**ROWS[1], **change}], model, "rows")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"history": ["m0"]}', r"row 1: column 'candidates' is missing; it has history"),
        ("rows.csv", "user,candidates\n1,m1 m2\n", r"row 1: column 'history' is missing; it has user, candidates"),
        ("rows.jsonl", '{"history": [], "candidates": [], "trace": 1}', r"has a column 'trace' already"),
        ("rows.jsonl", "", r"rows.jsonl has no rows"),
        ("rows.jsonl", '{"history": ["m0"]}\n{"a"', r"rows.jsonl, line 2 is not JSON"),
        ("rows.jsonl", "[1]", r"rows.jsonl, line 1 is not an object"),
        ("rows.csv", "history,candidates\nm1\n", r"rows.csv is not CSV: .*Row #2"),
        ("rows.parquet", "text", r"rows.parquet is not Parquet"),
        ("rows.txt", "text", r"rows.txt must end in .parquet, .jsonl, .csv"),
    ],
)
def test_a_file_that_cannot_be_ranked_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        rank.read_records(tmp_path / name)


def test_what_is_not_there_is_refused_before_a_model_runs(model_dir, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "evidence.npz").unlink()
    write_rows(tmp_path, ".csv")
    for rows, out, message in (
        ("none.csv", "out.csv", "none.csv does not exist; give a file of rows to rank"),
        ("rows.csv", "nowhere/out.csv", "nowhere is not a folder; make it"),
        ("rows.csv", "out.xlsx", "out.xlsx must end in"),
        ("rows.csv", "out.csv", "evidence.npz is missing, but the model's prompts show evidence"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            rank.rank_rows(model, tmp_path / rows, tmp_path / out)


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
    (row,) = rank.encode_rows([LOGGED], log_model, "rows")
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


def test_lists_of_csv_hold_numbers_parted_by_spaces(log_model, tmp_path):
    names = [*LOGGED]
    cells = {"history": "m0 m1", "candidates": "m2 m3 m4", "history_times": "0 1", "history_events": "click buy"}
    cells |= {"scores": "3.5 2 1", "price": "1 2 3"}
    line = ",".join(cells.get(name, str(LOGGED[name])) for name in names)
    new = ",".join("" if name.startswith("history") else cells.get(name, str(LOGGED[name])) for name in names)
    (tmp_path / "rows.csv").write_text("\n".join([",".join(names), line, new]) + "\n")
    row, of_new_user = rank.encode_rows(rank.read_records(tmp_path / "rows.csv"), log_model, "rows")
    assert row.history_times == (0.0, 1.0) and row.history_events == ("click", "buy")
    assert of_new_user.history == () == of_new_user.history_times
    assert row.features[:, 0].tolist() == [1, 2, 3] and row.features[:, 4].tolist() == [3.5, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"age": ...},
            r"row 1: column 'age' is missing, which the model's prompts show \(user_fields\); add",
        ),
        ({"device": ...}, r"column 'device' is missing, which the model's prompts show \(request_fields\)"),
        ({"time": ...}, r"column 'time' is missing, which the model's prompts show \(history_fields: time\)"),
        ({"history_events": ...}, r"column 'history_events' is missing, .* \(history_fields: event\)"),
        ({"price": ...}, r"column 'price' is missing, which .* \(evidence_names: candidate_price\)"),
        ({"scores": ...}, r"column 'scores' is missing, which .* \(evidence_names: first_stage_score\)"),
        ({"scores": [1, 2]}, r"row 1: scores has 2 entries but there are 3 items; give one for each"),
        ({"history_times": [1]}, r"row 1: history_times has 1 entries but there are 2 items"),
        ({"price": ["a", 1, 2]}, r"row 1: price holds 'a' but must hold numbers"),
        ({"time": "noon"}, r"row 1: time holds 'noon' but must hold numbers"),
    ],
)
def test_what_prompts_show_and_a_row_lacks_is_refused_by_name(log_model, change, message):
    changed = {name: value for name, value in {**LOGGED, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        rank.encode_rows([changed], log_model, "rows")


def test_the_last_closing_tag_of_a_constrained_answer_ends_its_trace():
    text = "<think>so </think> it is</think> 2 1"  # the first one is written in other tokens
    assert parse_completion(text, ["1", "2"]).failure == "junk"
    parsed = parse_completion(last_tag_alone(text), ["1", "2"])
    assert (parsed.order, parsed.trace) == ([1, 0], "so  it is")


def test_a_list_may_have_any_length_that_letters_and_the_token_limit_allow(model_dir, model, tmp_path):
    long = {"history": [], "candidates": [f"m{item}" for item in range(NUM_ITEMS)]}
    rows = rank.encode_rows([ROWS[0], long], model, "rows")  # trained on lists of four
    assert [len(row.candidates) for row in rows] == [4, 12] and rows[1].history == ()
    needed = 2 + 2 * NUM_ITEMS + 1  # two tags, ids of two tokens, and the end
    rank.check_limit(rows, replace(model, max_completion_tokens=needed), "rows")
    message = rf"rows, row 2: a ranking of 12 of 12 candidates takes up to {needed} tokens but a completion has 16"
    with pytest.raises(ValueError, match=message):
        rank.check_limit(rows, model, "rows")
    model.prompter.catalogue.item_ids.extend(f"n{item}" for item in range(20))
    letters = replace(model, prompter=replace(model.prompter, settings=replace(SETTINGS, ranking="letter")))
    many = {"history": [], "candidates": letters.prompter.catalogue.item_ids[:27]}
    with pytest.raises(ValueError, match="row 1: candidates has 27 items but the model names them by 26 letters"):
        rank.encode_rows([many], letters, "rows")
