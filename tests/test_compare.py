"""`rerank compare`: the table from finished runs, whose numbers are worked out by hand."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from compare_runs import GIVEN, RIGHT, SHA256, cells, finish_run, finish_step
from toy_recipe import TOY
from toy_run import RECIPES, finish, write_recipes

from rerank import compare
from rerank.compare import seeds
from rerank.compare.tables import list_lines
from rerank.launch.files import write_json
from rerank.launch.stages import STAGES, load_stage
from rerank.metrics import METRICS

SEEDED = {"3_midtrain": {}, "6_sft": {}}
INPUTS = {
    **{"data": (), "semantic_ids": ("data",), "candidates": ("data", "semantic_ids")},
    **{"midtrain": ("data", "semantic_ids"), "sft": ("midtrain", "candidates"), "evaluate": ("sft",)},
}


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    """Variant `a` is right with seed 0 and copies with seed 1; variant `b` is right with both."""
    folders = {name: write_recipes(tmp_path / name) for name in "ab"}
    out = tmp_path / "out"
    first = out / "a-seed0"
    finish_run(folders["a"], first, first, {"sft": RIGHT})
    finish_run(folders["a"], out / "a-seed1", first, {"sft": GIVEN})
    for seed in range(2):
        finish_run(folders["b"], out / f"b-seed{seed}", first, {"sft": RIGHT, "dapo": None})
    return {**folders, "out": out}


def start(variants, out: Path, seeds=1, minutes=None, results=None, say=print, seed_from="midtrain") -> int:
    return compare.compare(variants, seeds, seed_from, minutes, str(out), results, "recipes/accelerate/cpu.yaml", say)


def run_compare(runs: dict[str, Path], results: Path | None = None) -> list[str]:
    said: list[str] = []
    variants = compare.read_variants([str(runs["a"]), str(runs["b"])], None)
    assert start(variants, runs["out"], 2, results=results and str(results), say=said.append) == 0
    return said


def test_the_table_holds_means_spread_and_paired_intervals(runs, tmp_path):
    said = run_compare(runs, tmp_path / "RESULTS-toy.md")
    text = (tmp_path / "RESULTS-toy.md").read_text()
    table, differences = cells(text), cells(text, 1)
    assert text in said[-1]
    assert table["–", "no_op"] == ["1", "0.0000", "1.0000", "0.6309", "–", "–"]
    # every row gains 1 - 0.6309 with either seed, so neither users nor seeds vary
    assert table["–", "oracle"] == ["1", "1.0000", "1.0000", "1.0000", "–", "–"]
    gain = "+0.3691 [+0.3691, +0.3691]"
    assert differences["–", "oracle"][:4] == ["1", gain, "–", "–"]
    assert ("–", "no_op") not in differences
    # (1 + 0.6309) / 2; the standard deviation of 1 and 0.6309 is 0.3691 / sqrt(2) = 0.2610
    assert table["a", "sft"] == ["2", "0.5000", "1.0000", "0.8155", "0.0%", "0.2610"]
    # of the seeds 0.3691 and 0: 0.1845 by a t test with one degree of freedom, 12.706 * 0.1845; and half of 1
    half, half_of_one = "+0.1845 [-2.1602, +2.5293]", "+0.5000 [-5.8531, +6.8531]"
    assert differences["a", "sft"] == ["2", half, "–", "–", half_of_one, "–", "–"]
    assert table["b", "sft"] == ["2", "1.0000", "1.0000", "1.0000", "0.0%", "0.0000"]
    assert differences["b", "sft"][:4] == ["2", gain, "–", half]
    # no ranking scores zero; variant a has no dapo to compare with
    assert table["b", "dapo"] == ["2", "0.0000", "0.0000", "0.0000", "100.0%", "0.0000"]
    assert differences["b", "dapo"][1:4] == ["-0.6309 [-0.6309, -0.6309]", "-1.0000 [-1.0000, -1.0000]", "–"]
    assert ("b", "no_op") not in table and ("–", "random") in table


def test_the_table_has_the_difference_to_the_trees_where_they_were_evaluated(tmp_path):
    recipe, out = str(write_recipes(tmp_path / "a")), tmp_path / "out"
    for seed in range(2):
        finish_run(Path(recipe), out / f"a-seed{seed}", out / "a-seed0", {"lambdamart": GIVEN, "sft": RIGHT})
    assert start(compare.read_variants([recipe], None), out, 2) == 0
    text = (out / "RESULTS.md").read_text()
    assert "| N@5 − no-op | N@5 − lambdamart | N@5 − sft | N@5 − a | R@1 − no-op |" in text
    gain, none = "+0.3691 [+0.3691, +0.3691]", "+0.0000 [+0.0000, +0.0000]"
    assert cells(text, 1)["–", "lambdamart"][1:3] == [none, "–"]
    assert cells(text, 1)["a", "sft"][1:5] == [gain, gain, "–", "–"]


def test_the_tables_of_lists_and_slices_are_those_of_the_rows(runs, tmp_path):
    run_compare(runs, tmp_path / "RESULTS-toy.md")
    text = (tmp_path / "RESULTS-toy.md").read_text()
    # seven rows: four with their target second, three without
    assert "| share | 0.0 % | 57.1 % | 0.0 % | 0.0 % | 0.0 % | 0.0 % | 42.9 % |" in text
    # items have 0, 9, 0, 2, 0, 0, 0, 1, 0 interactions: the 90th percentile is 9 (of nine values the last but none)
    for line in (
        "| cold targets: at most 5 training interactions | 5 | 40.0 % | 2 |",
        "| popular targets: at least 9 training interactions (90th percentile of the items) | 2 | 100.0 % | 2 |",
        "| short histories: at most 2 items (25th percentile of the rows) | 2 | 100.0 % | 2 |",
    ):
        assert line in text
    table = cells(text, heading="N@5 on slices.")
    assert text.index("cold (n=2)") < text.index("popular (n=2)") < text.index("short (n=2)")
    assert table["–", "no_op"] == ["0.6309"] * 3 + ["–"] * 3
    assert table["a", "sft"][:3] == ["0.8155"] * 3  # right with one seed of two
    # one user in each slice: no interval
    assert table["b", "sft"] == ["1.0000"] * 3 + ["–"] * 3


def test_a_model_that_variants_share_stands_once_and_is_what_they_started_from(tmp_path):
    first, out = write_recipes(tmp_path / "a"), tmp_path / "out"
    finish_run(first, out / "a-seed0", out / "a-seed0", {"sft": GIVEN, "dapo": RIGHT})
    finish_run(first, out / "b-seed0", out / "a-seed0", {"dapo": RIGHT})
    for run in ("a-seed0", "b-seed0"):
        (out / run / "sft").symlink_to(out / "the_sft_model")

    def table(number: int) -> dict:
        return cells("\n".join(list_lines({"a": [out / "a-seed0"], "b": [out / "b-seed0"]})), number)

    gain, none = "+0.3691 [+0.3691, +0.3691]", "+0.0000 [+0.0000, +0.0000]"
    assert [key for key in table(0) if key[1] == "sft"] == [("a", "sft")]
    assert table(1)["a", "dapo"][1:4] == [gain, gain, "–"] and table(1)["b", "dapo"][1:4] == [gain, gain, none]
    dapo_recipe = out / "b-seed0/dapo/recipe.yaml"
    dapo_recipe.parent.mkdir()
    dapo_recipe.write_text("without_trace: true")  # it started from a control, which nobody evaluated
    assert table(1)["b", "dapo"][2] == "–"
    dapo_recipe.unlink()
    (out / "b-seed0/sft").unlink()  # a model of its own, which nobody evaluated
    assert table(1)["b", "dapo"][1:4] == [gain, "–", none]


def test_runs_whose_trained_models_were_not_evaluated_are_compared_all_the_same(tmp_path):
    first, run = write_recipes(tmp_path / "a"), tmp_path / "out/a-seed0"
    finish_run(first, run, run, {"sft": GIVEN})
    add_dapo(run, [0.1, 0.2])
    log = run / "dapo/log_history.json"
    log.write_text(log.read_text().replace("rollouts/kendall_tau", "something_else"))  # there was no ranking at all
    text = compare.report([compare.Variant("a", str(first))], {"a": [run]}, None, tmp_path / "RESULTS.md")
    assert "| 0.100 → 0.200 | – |" in text and (tmp_path / "RESULTS.png").is_file()


LOG = {"rollouts/kendall_tau": 0.5, "rollouts/no_ranking": 0.0, "rollouts/length_tokens": 30.0, "step_time": 6.0}
LOG |= {"rollouts/rank_gain": 1.0, "groups/share_useful": 0.5}


def add_dapo(run: Path, copy_rates: list[float]) -> None:
    """A dapo stage that logged these; a step in which nothing was sampled logs no rollouts."""
    log = [{**LOG, "step": number, "rollouts/copy_rate": rate} for number, rate in enumerate(copy_rates, start=1)]
    log.append({"step": len(log) + 1, "step_time": 6.0})
    (run / "dapo").mkdir()
    write_json(run / "dapo/log_history.json", [*log, {"train_loss": 0.1, "step": len(log)}])
    finish(run / "dapo", {"steps": len(log), "prompts_drawn": 64})


def test_copies_over_the_steps_of_reinforcement_learning(tmp_path):
    first, out = write_recipes(tmp_path / "a"), tmp_path / "out"
    for seed, rates in enumerate(([0.1, 0.2, 0.3, 0.9], [0.3, 0.2, 0.3, 0.5])):
        run = out / f"a-seed{seed}"
        finish_run(first, run, out / "a-seed0", {"sft": GIVEN, "dapo": RIGHT})
        add_dapo(run, rates)
    runs_of = {"a": [out / "a-seed0", out / "a-seed1"]}
    text = compare.report([compare.Variant("a", str(first), ("dapo.seed=1",))], runs_of, None, tmp_path / "RESULTS.md")
    # five steps of six seconds; the last logged no rollouts, so it repeats the fourth: (0.9 + 0.5) / 2
    row = "| a | 5 | 0.5 | 64 | 0.200 → 0.700 | 0.500 → 0.500 | 0.000 → 0.000 | 1.000 → 1.000 |"
    assert row in text and "- a: `a` `dapo.seed=1`" in text
    assert text.endswith("![curves](RESULTS.png)\n")
    assert (tmp_path / "RESULTS.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_finished_runs_are_skipped_share_their_data_and_are_named_without_a_path(runs):
    said = run_compare(runs)
    assert [line for line in said if line.startswith("==")] == ["== a-seed0", "== a-seed1", "== b-seed0", "== b-seed1"]
    assert sum("finished already" in line for line in said) == 16  # four stages of four runs
    assert (runs["out"] / "b-seed1/data").resolve() == (runs["out"] / "a-seed0/data").resolve()
    text = (runs["out"] / "RESULTS.md").read_text()
    assert f"- data: toy.csv, sha256 {SHA256}" in text
    assert "2 variants, 2 seeds. 4 test rows whose list holds a relevant item, of 7 (list recall 57.1 %)." in text
    assert "\nIntervals: 95 %, over users and 2 training seeds." in text
    assert str(runs["out"].parent) not in text


def test_a_link_to_a_data_folder_that_was_deleted_is_laid_anew(tmp_path):
    run = tmp_path / "b-seed0"
    compare.share_stage(tmp_path / "old-seed0", run, "data")
    compare.share_stage(tmp_path / "a-seed0", run, "data")
    assert (run / "data").readlink() == tmp_path / "a-seed0/data"


def test_runs_on_other_rows_are_refused(runs):
    other = runs["out"] / "b-seed2"
    finish_run(runs["b"], other, runs["out"] / "a-seed0", {"sft": RIGHT}, first_row_id=10)
    with pytest.raises(ValueError, match="variant b, seed 0, was evaluated on other rows than a; use one split"):
        list_lines({"a": [runs["out"] / "a-seed0"], "b": [other]})


def test_seeds_with_lists_of_their_own_are_compared_seed_by_seed(tmp_path):
    first, out = write_recipes(tmp_path / "a"), tmp_path / "out"
    for seed, (order, row_id) in enumerate(((RIGHT, 0), (GIVEN, 2))):  # rows 2 and 3 are those of both
        finish_run(first, out / f"a-seed{seed}", out / "a-seed0", {"sft": order}, first_row_id=row_id)
        finish_run(first, out / f"b-seed{seed}", out / "a-seed0", {"sft": RIGHT}, first_row_id=row_id)
    runs_of = {name: [out / f"{name}-seed{seed}" for seed in range(2)] for name in "ab"}
    table, differences = (cells("\n".join(list_lines(runs_of)), number) for number in range(2))
    assert table["–", "no_op"][0] == "2"  # its lists are not the same with both seeds
    assert table["a", "sft"] == ["2", "0.5000", "1.0000", "0.8155", "0.0%", "0.2610"]
    assert differences["b", "sft"][3].startswith("+0.1845 [")  # 0 with the first seed, 1 - 0.6309 with the second


def test_the_report_says_which_stages_each_seed_made_anew_and_which_intervals_leave_out(tmp_path):
    first, out = write_recipes(tmp_path / "a", RECIPES | SEEDED), tmp_path / "out"
    variant, said = compare.Variant("a", str(first)), []
    for seed_from in ("midtrain", "semantic_ids"):
        runs = [out / f"{seed_from}{seed}" for seed in range(2)]
        for seed, run in enumerate(runs):
            steps = compare.variant_steps(variant, run, seed, None, seed_from)
            compare.share_stages(run, steps, {runs[0]: compare.variant_steps(variant, runs[0], 0, None, seed_from)})
            for step in steps:
                if not (run / step.stage).exists():
                    finish_step(step, tuple(INPUTS[step.stage]))
        said.append(seeds.sentence({"a": runs}))
    same = "the same for all seeds, so that the intervals leave them out"
    assert said == [
        f"With a seed of their own in each run: midtrain, sft; {same}: data, semantic_ids, candidates.",
        "With a seed of their own in each run: semantic_ids, midtrain, sft; made from these: candidates; "
        f"{same}: data.",
    ]


def test_seeded_stages_are_those_with_the_option_seed():
    with_seed = [s for s in STAGES if any("seed" in {f.name for f in fields(c)} for c in load_stage(s).arguments)]
    assert list(seeds.SEEDED) == with_seed


def test_variants_of_one_name_or_of_other_data_are_refused(tmp_path):
    (tmp_path / "more").mkdir()
    first, twin = write_recipes(tmp_path / "a"), write_recipes(tmp_path / "more/a")
    with pytest.raises(ValueError, match="two variants share a name: a, a; rename one"):
        compare.read_variants([str(first), str(twin)], None)
    with pytest.raises(ValueError, match="--variant overrides one recipe folder, but 2 are given; give one"):
        compare.read_variants([str(first), str(twin)], [["x", "data.num_test=2"]])
    other = write_recipes(tmp_path / "b", RECIPES | {"1_data": {"interactions": "toy.csv", "num_test": 5}})
    with pytest.raises(ValueError, match="b/1_data.yaml asks for other data than .*a/1_data.yaml: num_test is its de"):
        start(compare.read_variants([str(first), str(other)], None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_last_variant_shows_before_the_first_one_runs(tmp_path):
    keys = {"interactions": str(TOY / "interactions.csv"), "items": str(TOY / "items.csv")}
    ids = {"levels": 2, "codebook_size": 4, "embeddings": str(TOY / "embeddings.npy")}
    folder = write_recipes(tmp_path / "a", {"1_data": keys, "2_semantic_ids": ids})
    variants = compare.read_variants([str(folder)], [["one"], ["two", "semantic_ids.codebooksize=3"]])
    with pytest.raises(ValueError, match="unknown key 'codebooksize'; did you mean codebook_size"):
        start(variants, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_and_minutes_must_be_above_zero(tmp_path):
    variants = [compare.Variant("a", str(write_recipes(tmp_path / "a")))]
    with pytest.raises(ValueError, match="--seeds is 0 but must be at least 1"):
        start(variants, tmp_path / "out", seeds=0)
    with pytest.raises(ValueError, match="--minutes_per_run is 0.0 but must be above 0"):
        start(variants, tmp_path / "out", minutes=0.0)


def test_only_data_that_are_split_at_random_can_be_reseeded(tmp_path):
    variants = [compare.Variant("a", str(write_recipes(tmp_path / "a")))]
    with pytest.raises(ValueError, match="--seed-from is 'dapo' but must be one of data, semantic_ids, midtrain"):
        start(variants, tmp_path / "out", seed_from="dapo")
    with pytest.raises(
        ValueError, match="--seed-from is data but .*1_data.yaml has split: per_user, which draws noth"
    ):
        start(variants, tmp_path / "out", seed_from="data")
    drawn = compare.Variant("a", str(tmp_path / "a"), ("data.split=random",))
    first = compare.variant_steps(drawn, tmp_path / "run", 1, None, "data")[0]
    assert first.keys["seed"] == 1


def test_seeds_and_minutes_become_overrides(tmp_path):
    recipes = {**RECIPES, "3_midtrain": {}, "5_traces": {"teacher": "evidence"}, "6_sft": {}, "7_dapo": {}}
    variant = compare.Variant("a", str(write_recipes(tmp_path / "a", recipes)), ("data.num_test=2",))
    steps = compare.variant_steps(variant, tmp_path / "run", 2, 9.0)
    own, trained = {"run_dir": str(tmp_path / "run")}, {"seed": "2", "max_minutes": "3.000"}  # nine in three parts
    assert {step.stage: step.overrides for step in steps if step.overrides != own} == {
        "data": own | {"num_test": "2"},
        "traces": own | {"seed": "2"},
        **{stage: own | trained for stage in ("midtrain", "sft", "dapo")},
    }
    more = compare.variant_steps(variant, tmp_path / "run", 2, None, "semantic_ids")
    reseeded = [step.stage for step in more if step.overrides.get("seed") == "2"]
    assert reseeded == ["semantic_ids", "midtrain", "traces", "sft", "dapo"]
    keys = {step.stage: step.keys for step in steps}
    assert keys["sft"]["seed"] == 2 and keys["sft"]["max_minutes"] == 3.0
    assert keys["candidates"] == own | {"num_candidates": 6}


def test_candidates_are_reseeded_where_they_draw_further_lists(tmp_path):
    variant = compare.Variant("a", str(write_recipes(tmp_path / "a")), ("candidates.lists_per_row=2",))
    steps = {step.stage: step for step in compare.variant_steps(variant, tmp_path / "run", 3, None)}
    assert steps["candidates"].keys["seed"] == 3


def test_the_bar_beside_the_results_holds_every_difference_over_users_and_seeds(runs, tmp_path):
    run_compare(runs, tmp_path / "RESULTS-toy.md")
    bar = json.loads((tmp_path / "RESULTS-toy.bar.json").read_text())
    assert (bar["seeds"], bar["n"], bar["users"]) == (2, 4, 2) and bar["intervals"].endswith("2 training seeds")
    lines = [(None, "no_op"), (None, "random"), (None, "oracle"), ("a", "sft"), ("b", "sft"), ("b", "dapo")]
    found = {}
    for one in bar["differences"]:
        names = (one.get("variant"), one["ranker"]), (one.get("minus_variant"), one["minus"])
        found[(*names, one["metric"])] = one
    pairs = [(later, earlier) for place, later in enumerate(lines) for earlier in lines[:place]]
    text = (tmp_path / "RESULTS-toy.bar.json").read_text().splitlines()
    assert len([line for line in text if '"difference": ' in line]) == len(bar["differences"]), "a line each"
    assert list(found) == [(*pair, metric) for metric in METRICS for pair in pairs]
    one = found[("b", "sft"), ("a", "sft"), "N@5"]  # as the table has it: right with both seeds, right with one
    assert one["value"] == 1 and one["minus_value"] == pytest.approx(0.8155, abs=1e-4) and one["n"] == 4
    assert [one["difference"], one["low"], one["high"]] == pytest.approx([0.1845, -2.1602, 2.5293], abs=1e-4)


def test_runs_are_compared_by_the_metrics_of_the_first(runs):
    for run in runs["out"].iterdir():
        results = json.loads((run / "evaluate/results.json").read_text())
        write_json(run / "evaluate/results.json", results | {"metrics": ["R@2", "N@1", "AUC", "N@5"]})
    run_compare(runs)
    text = (runs["out"] / "RESULTS.md").read_text()
    assert "| variant | ranker | seeds | R@2 | N@1 | parse failures | spread of N@1 |" in text
    assert "N@1 − no-op | N@1 − sft | N@1 − a | R@2 − no-op" in text and "N@1 on slices." in text
    # the relevant item stands second of six: not in the first place; (6 - 2) / 5 pairs are right
    assert cells(text)["–", "no_op"][:3] == ["1", "1.0000", "0.0000"]
    bar = json.loads((runs["out"] / "RESULTS.bar.json").read_text())
    auc = [one for one in bar["differences"] if one["metric"] == "AUC" and one["ranker"] == "oracle"]
    assert bar["metrics"] == ["R@2", "N@1", "AUC", "N@5"]
    assert [(one["minus"], one["difference"]) for one in auc] == [("no_op", pytest.approx(0.2)), ("random", 0.5)]
