"""The README's way to data of one's own: a recipe folder copied, its data recipe replaced, the first stages run."""

import json
import random
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from request_logs import request, write_table
from toy_recipe import refusal

from rerank import cli
from rerank.launch import pipeline, recipe, run_dir
from rerank.launch.across import check_across
from rerank.launch.stages import load_stage

README = Path("README.md").read_text(encoding="utf-8").partition("\n## Your own data\n")[2]


@pytest.fixture
def mine(tmp_path):
    """The folder of the recipe, with the README's data recipe on a log of sixty requests."""
    rng, rows = random.Random(0), []
    for number in range(60):
        items = [f"i{item}" for item in rng.sample(range(30), rng.choice([3, 8, 30]))]
        grades = [int(place % 3 == 1) for place in range(len(items))]
        rows.append(request(f"r{number}", f"u{number % 7}", 3600 * number, items, grades))
    items = [
        {"item_id": f"i{item}", "name": f"Film {item}", "category": "ab"[item % 2], "price": item}
        for item in range(30)
    ]
    write_table(tmp_path / "my_log.jsonl", rows)
    write_table(tmp_path / "my_items.jsonl", items)
    shutil.copytree("recipes/ranklens", tmp_path / "mine")
    text = re.search(r"```yaml\n(requests: .*?)```", README, re.DOTALL)[1]
    for name in ("my_log.jsonl", "my_items.jsonl"):
        text = text.replace(f": {name}", f": {tmp_path / name}")
    (tmp_path / "mine/1_data.yaml").write_text(text)
    return tmp_path / "mine"


def words(mine, *further):
    return ["run", str(mine), "--out", str(mine.parent / "run"), "--dry-run", *further]


def change(mine, file, **keys):
    """A recipe file with other keys; None takes one out."""
    given = {**yaml.safe_load((mine / file).read_text()), **keys}
    (mine / file).write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))


def make(mine, *stages):
    """Run stages as a launch does."""
    for step in pipeline.read_steps(mine, str(mine.parent / "run"), []):
        if step.stage in stages:
            arguments, declared = recipe.resolve(step.stage, step.keys, str(step.path)), load_stage(step.stage)
            recipe.check_inputs(step.stage, arguments)
            declared.check(*arguments)
            folder = run_dir.partial_dir(step.run_dir, step.stage)
            folder.mkdir(parents=True)
            metrics = declared.make(arguments, folder)
            run_dir.finish(step.run_dir, step.stage, step.keys, step.keys, [], metrics)


@pytest.mark.parametrize("cure", ["left out", "named"])
def test_the_dry_run_says_what_else_to_change_and_the_stages_then_run(mine, capfd, cure):
    line = refusal(capfd, *words(mine))
    named = f"{mine}/4_candidates.yaml"
    assert line == (
        f"rerank: {named}: item_numbers holds 'votes', 'rating', 'fame', 'released' but {mine}/1_data.yaml names the "
        "item columns title, category, text, brand; name the columns of numbers there in item_columns, or leave them "
        f"out of {named}\n"
    )
    columns = yaml.safe_load((mine / "1_data.yaml").read_text())["item_columns"]
    if cure == "left out":
        change(mine, "4_candidates.yaml", item_numbers=None)
    else:
        change(mine, "4_candidates.yaml", item_numbers=["cost"])
        change(mine, "1_data.yaml", item_columns={**columns, "cost": "price"})
    assert cli.main(words(mine)) == 0
    make(mine, "data", "candidates")
    features = json.loads((mine.parent / "run/candidates/features.json").read_text())["names"]
    assert ("item_cost" in features) == (cure == "named")
    lists = pq.read_table(mine.parent / "run/candidates/train.parquet")["candidates"].to_pylist()
    assert {len(items) for items in lists} == {3, 8, 30}


OTHERS = [
    (
        "traces.item_fields=[title,director]",
        "5_traces.yaml: item_fields holds 'director' but MINE/1_data.yaml has title, category, text, brand; name the "
        "column in item_columns or text_columns of the data stage, or leave it out",
        "data.item_columns={item: item_id, director: name}",
    ),
    (
        "traces.user_fields=[age]",
        "5_traces.yaml: user_fields holds 'age' but the rows of the data stage have none; name it in request_fields",
        "data.request_fields=[age]",
    ),
    (
        "traces.request_fields=[query]",
        "5_traces.yaml: request_fields holds 'query' but the rows of the data stage have none; name it in request_fi",
        "data.request_fields=[query]",
    ),
    (
        "traces.evidence_names=[popularity,candidate_price]",
        "5_traces.yaml: evidence_names holds 'candidate_price' but the facts are place, first_stage_score, from_last",
        "data.candidate_fields=[price]",
    ),
    (
        "traces.evidence_names=[item_brand]",
        "click_rate; name columns of items in item_numbers of the candidates stage, those of candidates in candidate",
        "candidates.item_numbers=[brand]",
    ),
    (
        "evaluate.slices=[device]",
        "8_evaluate.yaml: slices holds 'device' but MINE/1_data.yaml names the columns title, category, text, brand;",
        "data.request_fields=[device]",
    ),
    (
        "candidates.source=transitions",
        "4_candidates.yaml: source is transitions but the rows of the data stage are requests, which bring their lis",
        "candidates.source=lambdamart",
    ),
]


def check(mine, *overrides):
    """The check of the recipes with each other."""
    steps = pipeline.read_steps(mine, str(mine.parent / "run"), ["candidates.item_numbers=[]", *overrides])
    chosen = [step for step in steps if step.stage in ("data", "candidates", "traces", "evaluate")]
    resolved = {step.stage: recipe.resolve(step.stage, step.keys, str(step.path)) for step in chosen}
    check_across(resolved, {step.stage: step.path for step in steps})


@pytest.mark.parametrize(("change", "message", "cure"), OTHERS)
def test_what_the_data_recipe_does_not_name_is_refused(mine, change, message, cure):
    with pytest.raises(ValueError, match=re.escape(message.replace("MINE", str(mine)))):
        check(mine, change)
    check(mine, change, cure)


def test_interactions_have_no_lists_and_no_times_of_their_histories(mine):
    (mine / "1_data.yaml").write_text("interactions: clicks.csv\n")
    with pytest.raises(
        ValueError, match="4_candidates.yaml: source is requests but the rows of the data stage are no"
    ):
        check(mine)
    words = ["candidates.source=transitions", "traces.item_fields=[title]"]
    with pytest.raises(ValueError, match="5_traces.yaml: evidence_names holds 'click_rate' but the facts are place, "):
        check(mine, *words)
    words.append("traces.evidence_names=[popularity]")
    with pytest.raises(ValueError, match="5_traces.yaml: history_fields holds 'time', but the rows of the data stage"):
        check(mine, *words, "traces.history_fields=[time]")
    check(mine, *words)


def test_what_the_lists_of_the_log_do_not_allow_is_refused_before_a_model_is_trained(mine, capfd, caplog):
    change(mine, "4_candidates.yaml", item_numbers=None)
    run = mine.parent / "run"
    assert cli.main([word for word in words(mine, "traces.top_k=31") if word != "--dry-run"]) == 2
    out, error = capfd.readouterr()
    line = (
        f"top_k is 31 but the longest list of {run}/data/rows.parquet has 30 candidates; lower it, or set it to 0, so"
    )
    assert f"rerank: {line}" in error.splitlines()[-1] and [path.name for path in run.iterdir()] == ["data"]
    assert out.splitlines()[0] == "[1/7] data ..." and len(out.splitlines()) == 2
    line = refusal(capfd, *words(mine, "traces.ranking=letter"))
    assert "rows.parquet: row_id" in line and "has 30 candidates but ranking: letter names at most 26" in line
    caplog.clear()
    assert cli.main(words(mine)) == 0
    assert f"longest_list is 24 but the longest list of {run}/data/rows.parquet has 30 candidates" in caplog.text
    caplog.clear()
    assert cli.main(words(mine, "midtrain.longest_list=30")) == 0 and "longest_list" not in caplog.text
