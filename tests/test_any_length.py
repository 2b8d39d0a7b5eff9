"""Lists of 2, 7, 24 and 300 candidates in one log, through every stage and command, with a tiny model."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from request_logs import request, write_csv, write_table
from toy_recipe import environment, run_command

from rerank.prompts import EMPTY_TRACE

LENGTHS = (2, 7, 24, 300)
TOP_K = 5
SPLITS = ["train"] * 40 + ["valid"] * 8 + ["test"] * 8
CHANGES = {
    "data": {"split": "given", "interactions": None, "num_test": None, "num_valid": None, "num_rerank": None},
    "midtrain": {
        "longest_list": 300,
        "list_facts": ["popularity", "place"],
        "list_labels": "number",
        "vocab_size": 1100,
        "context_length": 8192,
        "max_length": 8192,
    },
    "candidates": {"source": "requests", "num_candidates": None},
    "traces": {"ranking": "number", "evidence_names": ["popularity", "place"], "top_k": TOP_K, "accept": "ndcg"},
    "sft": {"max_steps": 2, "max_length": 8192, "no_trace_control": False},
    "dapo": {
        "rewards": [{"name": "ndcg", "kwargs": {"k": TOP_K}}, {"name": "REWARD:digits", "weight": 0.5}],
        "outcome": "digits",
        "max_steps": 3,
        "per_device_train_batch_size": 16,  # four prompts of four completions: a prompt of each length is among twelve
        "bypass_reasoning": True,
    },
    "evaluate": {"one_token": True, "bypassed": True},
}
# Differs between completions of an untrained model too.
REWARD = '''
def digits(completions, **columns):
    """The share of a completion's characters that are digits, in [0, 1]."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]
'''


def log() -> list[dict]:
    """Requests of ten users, of the four lengths in turn; of a list's items some are clicked, one is bought."""
    rng = random.Random(0)
    rows = []
    for number, split in enumerate(SPLITS):
        items = rng.sample(range(300), LENGTHS[number % 4])
        grades = [rng.choice([0, 0, 1, None]) for _ in items]
        grades[:2] = rng.sample([0, 2], 2)
        row = request(f"q{number}", f"u{number % 10}", 60 * number, "", grades, split=split)
        rows.append({**row, "candidates": [f"i{item}" for item in items]})
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    items = [(f"i{item}", f"film {item}", "") for item in range(300)]
    files = {
        "requests": write_table(folder / "log.jsonl", log()),
        "items": write_csv(folder / "items.csv", "item,title,category", items),
    }
    (folder / "rewards.py").write_text(REWARD)
    steps = folder / "recipe"
    steps.mkdir()
    for path in Path("tests/toy/without_ids").iterdir():
        stage = path.stem.split("_", 1)[1]
        keys = {**yaml.safe_load(path.read_text()), **CHANGES[stage], **(files if stage == "data" else {})}
        keys = {name: value for name, value in keys.items() if value is not None}
        (steps / path.name).write_text(yaml.safe_dump(keys).replace("REWARD", str(folder / "rewards.py")))
    line = [sys.executable, "-m", "rerank.cli", "run", str(steps), "--out", str(folder / "run")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder / "run"


def read(path):
    return pq.read_table(path).to_pylist()


def lengths(rows, column="candidates"):
    return Counter(len(row[column]) for row in rows)


def test_every_stage_ranks_lists_of_all_lengths(run):
    for split, each in (("train", 10), ("valid", 2), ("test", 2)):
        assert lengths(read(run / f"candidates/{split}.parquet")) == dict.fromkeys(LENGTHS, each)
    read_before = {row["row_id"]: row for row in read(run / "candidates/train.parquet")}
    accepted = read(run / "traces/accepted.parquet")
    assert lengths(accepted, "order").keys() == set(LENGTHS)
    for row in accepted:
        assert sorted(row["order"]) == list(range(len(read_before[row["row_id"]]["candidates"])))
    rollouts = [row for part in (run / "dapo/rollouts").iterdir() for row in read(part)]
    assert lengths(rollouts, "relevance").keys() == set(LENGTHS)
    assert {row["top_k"] for row in rollouts} == {TOP_K}
    assert all(row["completion"].count(EMPTY_TRACE) == 1 for row in rollouts if row["order"])
    assert all(row["completion"].startswith(EMPTY_TRACE) for row in rollouts)
    assert any(EMPTY_TRACE not in row["completion"] for row in read(run / "traces/attempts.parquet"))
    rankings = read(run / "evaluate/rankings.parquet")
    assert lengths([row for row in rankings if row["ranker"] == "lambdamart"], "order") == dict.fromkeys(LENGTHS, 2)
    assert sum(row["ranker"] == "dapo" for row in rankings) == 8  # so little trained, it may write no ranking
    shown = {row["row_id"]: len(row["candidates"]) for row in read(run / "candidates/test.parquet")}
    for row in rankings:
        assert row["order"] is None or sorted(row["order"]) == list(range(shown[row["row_id"]]))
    results = json.loads((run / "evaluate/results.json").read_text())
    assert {"no_op", "lambdamart", "sft", "dapo"} <= results["rows"].keys() and "midtrained" not in results["rows"]
    assert (
        results["rows"]["dapo_one_token"]["parse_failures"] == 0 and "dapo_one_token_vs_dapo" in results["comparisons"]
    )
    assert lengths([row for row in rankings if row["ranker"] == "sft_one_token"], "order") == dict.fromkeys(LENGTHS, 2)
    assert "sft_bypassed" in results["rows"] and "dapo_bypassed" not in results["rows"]  # it is bypassed as it is
    assert "sft_bypassed_vs_sft" in results["comparisons"] and "shared_ids" not in results
    assert "There are no semantic ids yet" in (run / "evaluate/report.html").read_text()


def test_commands_take_lists_of_all_lengths(run, tmp_path):
    lists = [row["candidates"] for row in log() if row["split"] == "test"]
    rows = [{"history": items[:1], "candidates": items} for items in lists]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "new.parquet")
    run_command("rank", run / "sft/model", "--rows", tmp_path / "new.parquet", "--out", tmp_path / "ranked.parquet")
    ranked = read(tmp_path / "ranked.parquet")  # by constrained decoding, so that every row is
    assert [row["failure"] for row in ranked] == [None] * 8 and lengths(ranked, "ranking") == dict.fromkeys(LENGTHS, 2)
    for row, of_row in zip(rows, ranked, strict=True):
        assert sorted(of_row["ranking"]) == sorted(row["candidates"])
    recipe = run.parent / "recipe"
    replayed = tmp_path / "replayed.parquet"
    run_command("replay", run, "--rewards", recipe / "7_dapo.yaml", "--out", replayed)
    found = read(replayed)
    assert found and all(row["new/ndcg"] == row["stored/ndcg"] for row in found)
    assert "ndcg" in run_command("inspect", run)
    assert "oracle" in run_command("probe", recipe / "7_dapo.yaml", "--run-dir", run)
    run_command("report", run)
