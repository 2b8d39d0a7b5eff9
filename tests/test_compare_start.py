"""Variants of `rerank compare` that continue the model of another variant."""

from compare_runs import cells, finish_run
from toy_run import write_recipes

from rerank import compare
from rerank.compare.evaluations import MERGED, ListEvaluation
from rerank.compare.tables import list_lines
from rerank.launch.files import write_json

BEFORE, AFTER = [0, 1, 2, 3, 4, 5], [3, 1, 2, 0, 4, 5]  # the relevant item stands second in both


def test_rankings_are_merged_with_those_of_the_run_that_a_variant_continues(tmp_path):
    first, out = write_recipes(tmp_path / "a"), tmp_path / "out"
    for name, order in (("a", BEFORE), ("b", AFTER)):
        run = out / f"{name}-seed0"
        finish_run(first, run, out / "a-seed0", {"dapo": order})
        (run / "dapo").mkdir()
        start = {"start_model": str(out / "a-seed0/dapo/model")} if name == "b" else {}
        write_json(run / "dapo/recipe.yaml", start)
    table = cells("\n".join(list_lines({"a": [out / "a-seed0"], "b": [out / "b-seed0"]})))
    # reciprocal rank fusion: 1 / 62 + 1 / 62 is above 1 / 61 + 1 / 64
    assert table["b", MERGED][1] == "1.0000" and table["a", "dapo"][1] == table["b", "dapo"][1] == "0.0000"
    assert ("a", MERGED) not in table
    for other in ("a-seed0/sft/model", "model"):  # no dapo model of a run
        write_json(out / "b-seed0/dapo/recipe.yaml", {"start_model": str(out / other)})
        assert MERGED not in ListEvaluation.load(out / "b-seed0").values
    write_json(out / "b-seed0/dapo/recipe.yaml", {"start_model": str(out / "a-seed0/dapo/model")})
    (out / "a-seed0/evaluate/rankings.parquet").unlink()  # the other run is not there any more
    assert MERGED not in ListEvaluation.load(out / "b-seed0").values


def test_the_number_of_the_seed_stands_where_an_override_asks_for_it(tmp_path):
    variant = compare.Variant("a", str(write_recipes(tmp_path / "a")), ("data.terms=seed {seed}",))
    steps = compare.variant_steps(variant, tmp_path / "out", 3, None)
    assert steps[0].keys["terms"] == "seed 3"
