"""`rerank compare` on next items: the table from hand-made lists, and the stages that runs share."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compare_runs import SHA256, cells, finish_step
from toy_run import write_recipes

from rerank import compare
from rerank.compare.tables import next_item_lines, set_lines
from rerank.launch.files import write_json
from rerank.next_item.held_out_sets import LISTS as SETS
from rerank.next_item.pruning import FILE as PRUNING_FILE
from rerank.next_item.pruning import Pruning
from rerank.next_item.recall import LISTS

BASELINES = {"popularity": [0, 0, 0, 0], "transitions": [1, 0, 0, 0]}
SET_BASELINES = {"popularity": [0, 0], "transitions": [30, 0]}
NONE = [False, False]
VIOLATES = np.array([[True, False], NONE, NONE, NONE])
PRUNING = Pruning(np.array([True, True, False, False]), np.array([True, False, True, False]), VIOLATES)
WORSE = Pruning(PRUNING.is_top, np.zeros(4, dtype=bool), VIOLATES)
RECIPES = {
    "1_data": {"interactions": "toy.csv"},
    "2_semantic_ids": {"embeddings": "toy.npy"},
    "3_midtrain": {"max_items": 5},
    "6_sft": {"task": "next_item", "losses": [{"name": "nll"}]},
    "8_evaluate": {"task": "next_item"},
}
WORDS = [["nll"], ["bear", "sft.losses=[{name: bear}]"]]


def write_lists(run: Path, lines: list[dict], schema: pa.Schema, **results) -> Path:
    """The data and evaluate folders of a run with these lists; row r has r + 1 items of history and target 99."""
    for stage in ("data", "evaluate"):
        (run / stage).mkdir(parents=True)
    pq.write_table(pa.table({"item": range(100)}), run / "data/items.parquet")
    taken = [{"user": user, "item": 99, "position": 0, "split": "train"} for user in range(7)]
    pq.write_table(pa.Table.from_pylist(taken), run / "data/interactions.parquet")
    if rows := {line["row_id"]: line["user"] for line in lines if "row_id" in line}:
        records = [{"row_id": row_id, "user": user, "split": "valid", "target": 99, "history": [1] * (user + 1)}
                   for row_id, user in rows.items()]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(records), run / "data/rows.parquet")
    write_json(run / "data/metrics.json", {"sources": {"toy.csv": SHA256}})
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), run / "evaluate/lists.parquet")
    write_json(run / "evaluate/results.json", {"split": "valid", **results})
    return run


def write_evaluation(run, places, pruning=None, first_row=0) -> Path:
    """An evaluate folder in which a ranker finds the target of row r at 1-based place places[ranker][r]; 0: never."""
    lines = [
        {"row_id": first_row + row, "user": row, "target": 99, "one_hop": row < 1, "ranker": ranker,
         "items": [99 if place == at + 1 else at for at in range(10)]}
        for ranker, of_rows in (BASELINES | places).items() for row, place in enumerate(of_rows)
    ]  # fmt: skip
    write_lists(run, lines, LISTS, task="next_item", n={"all": 4}, num_beams=10)
    if pruning is not None:
        pruning.write(run / "evaluate" / PRUNING_FILE, first_row + np.arange(4))
    return run


@pytest.fixture
def runs_of(tmp_path):
    """Two seeds of `nll`: hits at places 1, 6 and 0, 6; `bear` finds the first two rows at once with both."""
    first = write_evaluation(tmp_path / "nll0", {"sft": [1, 6, 0, 0]}, PRUNING)
    second = write_evaluation(tmp_path / "nll1", {"sft": [0, 6, 0, 0]}, WORSE)
    bear = [write_evaluation(tmp_path / f"bear{seed}", {"sft": [1, 1, 0, 0]}, PRUNING) for seed in (0, 1)]
    return {"nll": [first, second], "bear": bear}


def text_of(runs_of):
    return "\n".join(next_item_lines(runs_of))


def test_the_tables_hold_means_over_seeds_and_differences_to_the_first_variant(runs_of):
    text = text_of(runs_of)
    table = cells(text)
    # R@5: (1 + 0 + 0 + 0) / 4 and 0; R@10: 2/4 and 1/4, mean 3/8, spread 0.25 / sqrt 2
    assert table["nll", "sft"][:3] == ["2", "0.1250", "0.3750"]
    assert table["nll", "sft"][5] == "0.1768" and table["nll", "sft"][8:] == ["–", "–"]
    assert table["bear", "sft"][:3] == ["2", "0.5000", "0.5000"]
    # 1/2 - 3/8, and 1/2 - 1/4 over transitions
    assert table["bear", "sft"][8].startswith("+0.1250 [") and table["bear", "sft"][6].startswith("+0.2500 [")
    assert table["–", "transitions"][1:3] == ["0.2500", "0.2500"]
    assert "one hop, 1 rows:" in text
    rest = cells(text, heading="the rest, 3 rows:")
    assert rest["nll", "sft"][2] == "0.3333" and rest["bear", "sft"][1] == "0.3333"
    # pruning of all seeds, nll: 1 of 2 and 2 of 2 pruned, standard deviation 50 / sqrt 2; bear: 1 of 2 twice
    assert "| nll | 4 | 2.0 | 75.0% | 35.4% | 25.0% | 25.0% | 0.0% |" in text
    assert "| bear | 4 | 2.0 | 50.0% | 0.0% | 25.0% | 25.0% | 0.0% |" in text


def test_a_table_of_slices_holds_all_variants(runs_of):
    text = text_of(runs_of)
    # item 99 has seven interactions and no other item any; histories of 1, 2, 3, 4 items: the 25th percentile is 1
    assert "| cold targets: at most 5 training interactions | 0 |" in text
    assert "| popular targets: at least 6 training interactions (90th percentile of the items) | 4 |" in text
    assert "| short histories: at most 1 items (25th percentile of the rows) | 1 |" in text
    table = cells(text, heading="R@10 on slices.")
    assert table["nll", "sft"][:3] == ["–", "0.3750", "0.5000"]  # the first row is found with one seed of two
    assert table["bear", "sft"][:3] == ["–", "0.5000", "1.0000"] and table["–", "transitions"][2] == "1.0000"
    assert table["bear", "sft"][4].startswith("+0.2500 [") and table["–", "transitions"][3:] == ["–"] * 3


def test_each_variant_is_compared_with_every_one_before_it(runs_of, tmp_path):
    msl = [write_evaluation(tmp_path / f"msl{seed}", {"sft": [1, 1, 1, 0]}, PRUNING) for seed in (0, 1)]
    plain = [write_evaluation(tmp_path / f"plain{seed}", {"sft": [0, 0, 0, 0]}) for seed in (0, 1)]
    text = text_of({**runs_of, "msl": msl, "plain": plain})
    table = cells(text, heading="Differences between variants, sft, all rows:")
    assert [*table] == [("bear", "nll"), ("msl", "nll"), ("plain", "nll"), ("msl", "bear"), ("plain", "bear"),
                        ("plain", "msl")]  # fmt: skip
    assert table["msl", "bear"][0] == "2"  # seeds
    assert table["msl", "bear"][1].startswith("+0.2500 [") and table["msl", "bear"][3:] == ["+0.0 [+0.0, +0.0]"] * 2
    # One of two targets in the top is pruned, with nll's second seed both are: 0 and -50 points by seed and by user.
    # The variance is 25 squared by seeds, by users and by both, so that 25 * 12.706 (one degree of freedom) remain.
    assert table["bear", "nll"][3:] == ["-25.0 [-342.7, +292.7]", "+0.0 [+0.0, +0.0]"]
    assert table["plain", "msl"][1].startswith("-0.7500 [") and table["plain", "msl"][3:] == ["–", "–"]
    rates = text[text.index("Pruning") : text.index("Differences between")]  # where it was measured
    assert "| bear |" in rates and "| plain |" not in rates


def test_heads_are_compared_with_heads(tmp_path):
    places = {"one": {"sft": [1, 0, 0, 0]}, "two": {"sft": [1, 0, 0, 0], "sft_head": [1, 1, 0, 0]}}
    places["three"] = {"sft": [0, 0, 0, 0], "sft_head": [1, 1, 1, 0]}
    runs = {name: [write_evaluation(tmp_path / name, of)] for name, of in places.items()}
    text = text_of(runs)
    table = cells(text, heading="Differences between variants, sft_head, all rows:")
    assert [*table] == [("three", "two")] and table["three", "two"][1].startswith("+0.2500 [")
    assert len(cells(text, heading="Differences between variants, sft, all rows:")) == 3
    assert "Pruning" not in text  # nobody measured it
    assert cells(text_of({"two": runs["two"]}))["two", "sft_head"][8].startswith("+0.2500")  # than its own beams


def test_runs_on_other_rows_are_refused(runs_of, tmp_path):
    other = write_evaluation(tmp_path / "other", {"sft": [1, 1, 1, 1]}, PRUNING, first_row=7)
    with pytest.raises(ValueError, match="variant bear, seed 1, was evaluated on other rows than nll; use one split"):
        next_item_lines({**runs_of, "bear": [runs_of["bear"][0], other]})


def test_variants_of_one_recipe_share_the_stages_before_they_differ(tmp_path):
    folder = write_recipes(tmp_path / "toy", RECIPES)
    first, second = compare.read_variants([str(folder)], WORDS)
    assert (first.name, second.overrides) == ("nll", ("sft.losses=[{name: bear}]",))
    steps = {name: compare.variant_steps(variant, tmp_path / name, seed, None) for name, variant, seed in
             (("nll-0", first, 0), ("nll-1", first, 1), ("bear-0", second, 0))}  # fmt: skip
    for step in steps["nll-0"]:
        finish_step(step)
    earlier = {tmp_path / "nll-0": steps["nll-0"]}
    for name in ("nll-1", "bear-0"):
        compare.share_stages(tmp_path / name, steps[name], earlier)
    # another seed trains its own model on the same ids; another loss begins where the first one's model began
    assert sorted(path.name for path in (tmp_path / "nll-1").iterdir()) == ["data", "semantic_ids"]
    assert sorted(path.name for path in (tmp_path / "bear-0").iterdir()) == ["data", "midtrain", "semantic_ids"]
    assert all(path.is_symlink() for path in (tmp_path / "bear-0").iterdir())
    assert json.loads((tmp_path / "bear-0/midtrain/stage.json").read_text())["given"]["seed"] == 0


def write_sets(run, places, first_user=0, second=998) -> Path:
    """An evaluate folder in which a ranker finds user u's first target at 1-based place places[ranker][u]; 0: never.

    The first user has one target, the second has two, of which none finds the other.
    """
    lines = [
        {"user": first_user + user, "targets": [999, second][: user + 1], "ranker": ranker,
         "items": [999 if place == at + 1 else at for at in range(100)]}
        for ranker, of_users in (SET_BASELINES | places).items() for user, place in enumerate(of_users)
    ]  # fmt: skip
    return write_lists(run, lines[::-1], SETS, task="held_out_sets", n=2)


@pytest.fixture
def sets_of(tmp_path):
    """`plain` with two seeds, `head` finds more."""
    plain = [write_sets(tmp_path / f"p{n}", {"sft": [place, 1]}) for n, place in enumerate((1, 30))]
    return {"plain": plain, "head": [write_sets(tmp_path / f"h{n}", {"sft_head": [1, 1]}) for n in (0, 1)]}


def test_sets_have_a_table_of_means_over_seeds(sets_of):
    table = cells("\n".join(set_lines(sets_of)))
    # one of one or of two targets within twenty: (1 + 1/2) / 2 with the first seed, (0 + 1/2) / 2 with the second
    assert table["plain", "sft"][:3] == ["2", "0.5000", "0.7500"] and table["plain", "sft"][-3:] == ["–"] * 3
    # the spread of R@20: .75 and .25, 0.5 / sqrt 2
    assert table["plain", "sft"][4] == "0.3536"
    assert table["head", "sft_head"][:3] == ["2", "0.7500", "0.7500"]
    assert table["head", "sft_head"][5].startswith("+0.7500 [")  # transitions finds nothing within twenty
    assert table["head", "sft_head"][8].startswith("+0.2500 [")
    assert table["–", "transitions"][1:3] == ["0.0000", "0.5000"]
    # 1/log2(31) of an ideal of 1; of the second user's ideal of two nothing
    assert table["–", "transitions"][3] == f"{1 / np.log2(31) / 2:.4f}"


def test_rankers_of_sets_are_compared_where_two_variants_have_them(sets_of, tmp_path):
    assert not any("Differences" in line for line in set_lines(sets_of))
    other = [write_sets(tmp_path / f"other{seed}", {"sft_head": [1, 0]}) for seed in (0, 1)]
    text = "\n".join(set_lines({**sets_of, "other": other}))
    table = cells(text, heading="Differences between variants, sft_head, all rows:")
    assert table["other", "head"][1].startswith("-0.2500 [")  # half a target of one of two users


@pytest.mark.parametrize("change", [{"first_user": 1}, {"second": 997}])
def test_sets_of_other_users_or_of_another_split_are_refused(sets_of, tmp_path, change):
    wrong = [write_sets(tmp_path / f"wrong{seed}", {"sft": [1, 1]}, **change) for seed in (0, 1)]
    with pytest.raises(ValueError, match="variant wrong, seed 0, was evaluated on other users or items than plain"):
        set_lines({**sets_of, "wrong": wrong})


def test_sets_of_a_split_drawn_anew_with_each_seed_are_compared_seed_by_seed(sets_of, tmp_path):
    redrawn = {"second": 997}  # the second user's targets are others with the second seed
    for name, runs in sets_of.items():
        other = {"sft": [1, 1]} if name == "plain" else {"sft_head": [1, 1]}
        runs[1] = write_sets(tmp_path / f"{name}-redrawn", other, **redrawn)
    table = cells("\n".join(set_lines(sets_of)))
    # plain: as with the same targets, (1 + 1/2) / 2 with the first seed; with the second too
    assert table["plain", "sft"][:3] == ["2", "0.7500", "0.7500"] and table["head", "sft_head"][:2] == ["2", "0.7500"]
    assert table["–", "transitions"][0] == "2"  # splits


def test_a_variant_whose_model_was_not_evaluated_is_refused(runs_of, tmp_path):
    runs_of["bear"] = [write_evaluation(tmp_path / f"bare{n}", {"midtrained": [1, 0, 0, 0]}) for n in (0, 1)]
    with pytest.raises(ValueError, match="variant bear was evaluated without its sft model; let evaluate.models hold"):
        next_item_lines(runs_of)


def test_the_report_names_rows_and_data_and_has_the_table_of_the_task(runs_of, sets_of, tmp_path):
    for runs, words, lines in (
        (runs_of, "2 variants, 2 seeds. 4 valid rows, all items ranked, 10 beams.", next_item_lines),
        (sets_of, "2 variants, 2 seeds. 2 users, valid: all that is held out of a user", set_lines),
    ):
        variants = [compare.Variant(name, "recipes/toy", (f"sft.losses=[{{name: {name}}}]",)) for name in runs]
        text = compare.report(variants, runs, None, tmp_path / "RESULTS.md")
        assert words in text and "\n".join(lines(runs)) in text and f"- data: toy.csv, sha256 {SHA256}" in text
        assert f"- {variants[1].name}: `toy` `sft.losses=[{{name: {variants[1].name}}}]`" in text
