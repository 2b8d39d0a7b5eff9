"""The data stage: every reader, and every split by hand."""

import gzip
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_files import prepare
from toy_run import features_of

from rerank import data
from rerank.baselines import FEATURES, Counts
from rerank.candidates.counting import check_numbers, item_facts
from rerank.launch import recipe
from rerank.rows.sequences import read_histories

# One user with eight interactions, one with six, each in order of time.
TOY = [("u", item, time) for time, item in enumerate("abcdefgh")]
TOY += [("v", item, time) for time, item in enumerate("hgfedc")]


def write_csv(path, rows, header="user,item,time"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def arguments(interactions, **options):
    return data.DataArguments(run_dir="run", interactions=str(interactions), **options)


def run(folder, interactions=TOY, header="user,item,time", **options):
    """The stage's tables with original ids: rows as (user, split, history, target), splits as user -> words.

    `interactions` are the rows of a CSV file with that header, or a path.
    """
    if isinstance(interactions, list):
        interactions = write_csv(folder / "t.csv", interactions, header)
    metrics = data.main(arguments(interactions, **options), folder)
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("items", "users", "interactions", "rows")}
    items, users = tables["items"]["item_id"].to_pylist(), tables["users"]["user_id"].to_pylist()
    found = {"metrics": metrics, "tables": tables, "sequences": {}, "splits": {}}
    for row in tables["interactions"].to_pylist():
        found["sequences"].setdefault(users[row["user"]], []).append(items[row["item"]])
        found["splits"].setdefault(users[row["user"]], []).append(row["split"])
    histories = read_histories(tables["rows"], folder, folder / "rows.parquet")
    found["rows"] = [
        (users[row["user"]], row["split"], [items[i] for i in history], items[row["target"]])
        for row, history in zip(tables["rows"].to_pylist(), histories, strict=True)
    ]
    return found


def test_a_user_is_split_from_the_end_and_each_history_is_all_before_its_target(tmp_path):
    found = run(tmp_path, num_test=2, num_valid=1, num_rerank=2)
    # u: a b c | d e | f | g h; the history of the second test target holds the first one
    assert found["splits"]["u"] == ["train"] * 3 + ["rerank"] * 2 + ["valid"] + ["test"] * 2
    assert [row for row in found["rows"] if row[0] == "u"] == [
        ("u", "rerank", list("abc"), "d"),
        ("u", "rerank", list("abcd"), "e"),
        ("u", "valid", list("abcde"), "f"),
        ("u", "test", list("abcdef"), "g"),
        ("u", "test", list("abcdefg"), "h"),
    ]
    # v: h g f | e | d c; of its last two training interactions, g and f, g has one item of history, below two
    assert found["splits"]["v"] == ["train", "train", "rerank", "valid", "test", "test"]


def test_tables_have_the_documented_columns(tmp_path):
    tables = run(tmp_path)["tables"]
    assert tables["items"].column_names == ["item", "item_id", "title", "category", "text", "source_row"]
    assert tables["users"].column_names == ["user", "user_id"]
    assert tables["interactions"].column_names == ["user", "item", "position", "time", "split"]
    assert tables["rows"].column_names == ["row_id", "user", "split", "position", "history_length", "target"]
    assert tables["rows"]["row_id"].to_pylist() == list(range(6))
    assert tables["items"]["item"].to_pylist() == list(range(8))


def test_item_columns_that_the_recipe_names_are_kept_so_that_a_shared_brand_is_a_fact(tmp_path):
    items = [{"item": i, "maker": "BA"[i in "abc"], "size": n, "id": 1} for n, i in enumerate("abcdefgh")]
    columns = {"item_columns": {"brand": "maker"}, "text_columns": ["brand", "size"]}
    table = run(tmp_path, items=write_jsonl(tmp_path / "items.jsonl", items), **columns)["tables"]["items"]
    names = {"item", "item_id", "title", "category", "text", "source_row", "brand", "size"}
    assert set(table.column_names) == names  # not `id`, which nobody named
    third = table.select(["item_id", "brand", "size"]).to_pylist()[2]
    assert third == {"item_id": "c", "brand": "A", "size": "2"}
    (tmp_path / "run/data").mkdir(parents=True)
    shutil.copy(tmp_path / "items.parquet", tmp_path / "run/data")
    facts = item_facts(tmp_path / "run", ["size"], None)
    assert facts.numbers["item_size"].tolist() == list(range(8)) and not facts.has_embeddings
    with pytest.raises(ValueError, match="brand of item 'a' is 'A', no number"):
        check_numbers(tmp_path / "run", ["brand"])
    with pytest.raises(ValueError, match="item_numbers holds 'weight' but .*items.parquet has item, .*size"):
        check_numbers(tmp_path / "run", ["weight"])
    counts = Counts.fit({0: np.array([0, 1, 2])}, 8, facts)
    same_brand = features_of(counts, [0], [1, 3], [1.0, 0.5])[:, FEATURES.index("same_brand")]
    assert same_brand.tolist() == [1.0, 0.0]  # a and b are both of A, d is of B


def test_num_rerank_all_makes_every_training_target_a_row_and_says_that_midtraining_has_seen_it(tmp_path):
    found = run(tmp_path, num_rerank="all")
    assert found["splits"]["u"] == ["train"] * 2 + ["rerank"] * 4 + ["valid", "test"]
    assert found["metrics"]["rows"] == {"rerank": 6, "valid": 2, "test": 2}  # u: c d e f, v: f e
    assert found["metrics"]["midtrain_has_seen_rerank_targets"] is True


def test_a_user_with_too_few_interactions_gives_fewer_rows(tmp_path):
    found = run(tmp_path, [*TOY, ("w", "a", 0), ("w", "b", 1), ("w", "c", 2)])
    assert found["splits"]["w"] == ["train", "valid", "test"]
    assert [row for row in found["rows"] if row[0] == "w"] == [("w", "test", ["a", "b"], "c")]


def test_split_by_time_takes_the_latest_and_never_divides_one_moment(tmp_path):
    # Ten interactions; the latest tenth is one, at time 4, where v has one too: both are test. From 3 on: validation.
    rows = [(user, item, time) for user, items in (("u", "abcde"), ("v", "edcba")) for time, item in enumerate(items)]
    found = run(tmp_path, rows, split="by_time", valid_fraction=0.2, test_fraction=0.1, min_history=1)
    assert found["splits"] == {user: ["train", "train", "rerank", "valid", "test"] for user in "uv"}
    assert ("v", "test", list("edcb"), "a") in found["rows"]


def test_the_k_core_is_taken_until_nothing_falls_below(tmp_path):
    # z is bought once, so it goes; then w has two interactions left, below three, so w goes; then y, bought by w and
    # u alone, falls below two and goes too. u keeps five, v four.
    bought = (("u", "abcydx"), ("v", "xabcd"), ("w", "ayz"))
    rows = [(user, item, time) for user, items in bought for time, item in enumerate(items)]
    found = run(tmp_path, rows, min_user_interactions=3, min_item_interactions=2, min_history=1)
    assert found["sequences"] == {"u": list("abcdx"), "v": list("xabcd")}
    assert sorted(found["tables"]["items"]["item_id"].to_pylist()) == list("abcdx")


def test_ties_in_time_keep_the_order_of_the_input_and_only_equal_times_make_a_duplicate(tmp_path):
    found = run(tmp_path, [("u", item, 5) for item in "qbzaymq"] + [("u", "first", 1), ("u", "q", 1)])
    assert found["sequences"]["u"] == ["first", *"qqbzaym"]  # the later visit to q is no duplicate
    assert found["metrics"]["duplicates_removed"] == 1
    assert found["metrics"]["share_of_time_ties"] == pytest.approx(6 / 7)


def test_a_position_orders_before_time_and_allows_missing_times(tmp_path):
    rows = [("u", item, place, time) for item, place, time in zip("dcba", (3, 2, 1, 0), ("", 9, 9, ""), strict=True)]
    found = run(tmp_path, rows, "user,item,pos,time", columns={"position": "pos"}, min_history=1)
    assert found["sequences"]["u"] == list("abcd")
    assert found["tables"]["interactions"]["time"].to_pylist() == [None, 9.0, 9.0, None]


def test_dates_are_read_as_unix_seconds(tmp_path):
    times = ("1970-01-02", "1970-01-02 00:00:01.5", "1970-01-03T00:00:00Z", 3e5)
    found = run(tmp_path, [("u", item, time) for item, time in zip("abcd", times, strict=True)], min_history=1)
    assert found["tables"]["interactions"]["time"].to_pylist() == [86400.0, 86401.5, 172800.0, 300000.0]


def write_form(folder, form):
    """The toy interactions in one of the formats."""
    path, kind = folder / f"toy.{form}", form.removesuffix(".gz")
    columns = dict(zip(("user", "item", "time"), map(list, zip(*TOY, strict=True)), strict=True))
    if kind == "folder":
        datasets.Dataset.from_dict(columns).save_to_disk(path)
    elif kind == "parquet":
        pq.write_table(pa.table(columns), path)
    elif kind == "jsonl":
        write_jsonl(path, pa.table(columns).to_pylist())
    else:
        write_csv(path, TOY, "user:token,item:token,time:float" if kind == "inter" else "user,item,time")
    if kind in ("tsv", "inter"):
        path.write_text(path.read_text().replace(",", "\t"))
    if form.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("form", "csv csv.gz tsv tsv.gz jsonl jsonl.gz parquet parquet.gz inter folder".split())
def test_every_format_gives_the_same_tables(tmp_path, form):
    found = run(tmp_path, write_form(tmp_path, form))
    assert found["sequences"] == {"u": list("abcdefgh"), "v": list("hgfedc")}
    assert found["metrics"]["rows"] == {"rerank": 2, "valid": 2, "test": 2}


def test_a_dataset_name_takes_a_split(tmp_path):
    (tmp_path / "set").mkdir()
    write_csv(tmp_path / "set/train.csv", [*TOY, ("v", "007", 99)])
    write_csv(tmp_path / "set/test.csv", TOY[:3])
    with pytest.raises(ValueError, match="has the splits train, test; name one, as .*@SPLIT"):
        data.check(arguments(tmp_path / "set", format="datasets"))
    found = run(tmp_path, f"{tmp_path}/set@train", format="datasets")
    assert found["metrics"]["interactions"] == len(TOY) + 1 and found["sequences"]["v"][-1] == "007"


def test_s3rec_text_and_attributes(tmp_path):
    (tmp_path / "Toy.txt").write_text("1 5 3 4 3 2\n2 1 2 3 4\n")
    (tmp_path / "Toy_item2attributes.json").write_text(json.dumps({str(i): [i, 10 * i] for i in (5, 4, 3, 2, 1)}))
    found = run(tmp_path, tmp_path / "Toy.txt", items=str(tmp_path / "Toy_item2attributes.json"))
    assert found["sequences"] == {"1": list("53432"), "2": list("1234")}  # a second visit to 3 stays
    assert found["tables"]["items"]["category"].to_pylist()[0] == "5, 50"
    assert found["tables"]["items"]["item_id"].to_pylist() == list("54321")  # the order of the items file


def test_items_have_title_category_and_the_text_of_the_recipe(tmp_path):
    rows = [{"id": item, "name": f"The  {item}", "tags": ["x", "y"], "maker": None} for item in "abcdefgh"]
    rows[0]["maker"] = 'A "quoted", name'
    columns = {"item": "id", "title": "name", "category": "tags"}
    options = {"item_columns": columns, "text_columns": ["title", "maker", "category"]}
    found = run(tmp_path, items=write_jsonl(tmp_path / "items.jsonl", rows), **options)
    first, second = found["tables"]["items"].to_pylist()[:2]
    assert first["text"] == 'The a. maker: A "quoted", name. category: x, y'
    assert (second["title"], second["category"]) == ("The b", "x, y")
    assert second["text"] == "The b. category: x, y"


def test_interactions_with_a_split_column_keep_it(tmp_path):
    splits = ["history", "train", "train", "train", "validation", "test"]
    rows = [("u", item, split) for item, split in zip("abcdef", splits, strict=True)]
    found = run(tmp_path, rows, "user,item,split", split="given")
    assert found["splits"]["u"] == ["train"] * 3 + ["rerank", "valid", "test"]


def test_a_given_split_shows_no_held_out_item_in_a_training_history(tmp_path):
    words = ["train", "train", "test", "train", "valid", "train"]
    rows = [("u", item, time, split) for time, (item, split) in enumerate(zip("abxcyd", words, strict=True))]
    found = run(tmp_path, rows, "user,item,time,split", split="given", num_rerank="all")
    assert found["rows"] == [
        ("u", "rerank", list("ab"), "c"),
        ("u", "rerank", list("abc"), "d"),
        ("u", "valid", list("abcd"), "y"),
        ("u", "test", list("abcdy"), "x"),
    ]


def test_the_movielens_recipe_gives_the_published_row_counts(tmp_path):
    path = Path(__file__).parent.parent / "recipes" / "ml100k" / "1_data.yaml"
    (args,) = recipe.resolve("data", recipe.load(path), str(path))
    metrics = data.main(args, tmp_path)
    assert metrics["rows"] == {"rerank": 16957, "valid": 4715, "test": 4715}
    assert (metrics["users"], metrics["items"], metrics["interactions"]) == (943, 1682, 100_000)
    assert set(metrics["sources"]) == {"ml-100k.inter", "ml-100k.item"}  # names, never paths
    items = pq.read_table(tmp_path / "items.parquet").to_pylist()
    assert items[0]["text"] == "Toy Story. category: Animation, Children's, Comedy. release_year: 1995"


def test_random_interactions_agree_with_a_slow_loop(tmp_path):
    rows = np.random.default_rng(0).integers((12, 30, 20), size=(600, 3)).tolist()
    found = run(tmp_path, rows, num_test=2, num_valid=3, num_rerank=4, min_history=3)
    expected = []
    for user in dict.fromkeys(str(u) for u, _, _ in rows):
        mine = list(dict.fromkeys((t, str(i)) for u, i, t in rows if str(u) == user))
        sequence = [item for _, item in sorted(mine, key=lambda pair: pair[0])]
        for place in range(max(3, len(sequence) - 9), len(sequence)):
            left = len(sequence) - place
            split = "test" if left <= 2 else "valid" if left <= 5 else "rerank"
            expected.append((user, split, sequence[:place], sequence[place]))
    assert found["rows"] == expected


def test_rows_are_numbered_as_the_file_has_them_however_many_threads_read_it(tmp_path):
    # Fifty row groups, read in parallel; all times tie, so each user's sequence is the file's order.
    number = np.arange(50_000)
    table = pa.table({"user": number % 1000, "item": number * 7919 % 5003, "time": np.zeros(len(number))})
    pq.write_table(table, tmp_path / "long.parquet", row_group_size=1000)
    prepared = prepare(arguments(tmp_path / "long.parquet"))
    # k-th interaction of user u is row u + 1000 k, and users are numbered by first appearance
    items = np.array(prepared.items["item_id"].to_pylist(), dtype=int)[prepared.interactions["item"].to_numpy()]
    assert np.array_equal(items.reshape(1000, 50).T.ravel(), number * 7919 % 5003)


def test_a_random_split_holds_out_shares_of_each_user_and_at_least_one(tmp_path):
    found = run(tmp_path, split="random", valid_fraction=0.1, test_fraction=0.25)
    # u has 8: 2 test, 1 valid (0.8); v has 6: 2 test (1.5), 1 valid (0.6); what is held out comes last
    for user, size in (("u", 8), ("v", 6)):
        splits = found["splits"][user]
        assert [splits.count(name) for name in ("valid", "test")] == [1, 2] and len(splits) == size
        assert [name for name in splits if name in ("valid", "test")] == splits[-3:] == ["valid", "test", "test"]
        taken, training = [item for who, item, _ in TOY if who == user], found["sequences"][user][: size - 3]
        assert sorted(found["sequences"][user]) == sorted(taken)
        assert training == [item for item in taken if item in training]  # still in order of time


def test_a_random_split_is_the_same_for_the_same_seed_only(tmp_path):
    first, again, other = (run(tmp_path, split="random", seed=seed)["sequences"] for seed in (0, 0, 1))
    assert first == again != other
