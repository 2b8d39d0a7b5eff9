"""Shards of a stage: made by commands of their own, killed and made again, merged to what one command makes."""

import json
import math
import multiprocessing
import os
import re
import shutil
import threading
from http.server import ThreadingHTTPServer

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from json_server import JsonHandler
from toy_recipe import refusal, run_command
from toy_run import NUM_CANDIDATES, NUM_ITEMS, finish, write_candidates, write_items, write_semantic_ids

from rerank import traces
from rerank.launch import recipe, run_dir
from rerank.launch.shards import Shard

NUM_ROWS = 20
SHARDS = [Shard(1, 2), Shard(2, 2)]


@pytest.mark.parametrize("num_rows", [4, 7, 100])
def test_shards_part_the_rows_evenly_and_in_order(num_rows):
    parts = [Shard(number, 4).of(range(num_rows)) for number in range(1, 5)]
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_shards_than_rows_are_refused():
    with pytest.raises(ValueError, match="--shard is 1/8 but there are 7 rows; make at most 7 shards, and delete"):
        Shard(1, 8).of(range(7))


@pytest.mark.parametrize("text", ["3/2", "0/2", "2", "a/b", "1/2/3", "merge/2"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=f"--shard is {text} but must be I/N with I from 1 to N, such as 2/8"):
        Shard.parse(text)


# --- a stage in processes


class Server(JsonHandler):
    """A teacher whose ranking follows from the seed of a request alone, so that a draft repeats only with its seed."""

    requests: list[str] = []  # that were answered
    num_answers: float = math.inf  # then the next request waits until the test lets it fail
    waiting, failing = threading.Event(), threading.Event()

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(Server.requests) >= Server.num_answers:
            Server.waiting.set()
            Server.failing.wait(60)
            self.close_connection = True
            return
        ids = re.findall(r"^<s_a_\d+><s_b_\d+>", body["messages"][0]["content"].partition("Candidates:")[2], re.M)
        Server.requests.append("".join(ids))  # no two rows have one list
        order = np.random.default_rng(body["seed"]).permutation(len(ids))
        text = f"<think>By seed {body['seed']}.</think>{''.join(ids[place] for place in order)}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        self.answer(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice]})


@pytest.fixture
def base_url():
    Server.requests, Server.num_answers = [], math.inf
    Server.waiting.clear()
    Server.failing.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    Server.failing.set()
    server.shutdown()
    server.server_close()


def write_run(run):
    """A run whose stages before traces are finished."""
    rng = np.random.default_rng(0)
    write_items(run / "data", title=[f"Film {item}" for item in range(NUM_ITEMS)])
    write_semantic_ids(run / "semantic_ids")
    rows = [
        {"row_id": 7 * number, "user": number // 2, "history": items[NUM_CANDIDATES:][:3], "hit": True}
        | {"candidates": items[:NUM_CANDIDATES], "relevance": np.eye(NUM_CANDIDATES)[number % 4].tolist()}
        for number, items in enumerate(rng.permutation(NUM_ITEMS).tolist() for _ in range(NUM_ROWS))
    ]
    write_candidates(run / "candidates", {}, train=rows)
    finish(run / "data")
    finish(run / "semantic_ids", inputs=["data"])
    finish(run / "candidates", inputs=["data"])
    return run


@pytest.fixture
def recipe_dir(tmp_path, base_url):
    """A folder with a recipe of the traces stage."""
    keys = {"run_dir": str(write_run(tmp_path / "run")), "teacher": "openai", "teacher_model": "toy"}
    keys |= {"base_url": base_url, "max_attempts": 6, "batch_size": 3, "max_concurrency": 1}
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/5_traces.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe"


def start(recipe_dir, *words):
    """A process that runs the stage."""
    argv = ["--config", str(recipe_dir / "5_traces.yaml"), *words]
    process = multiprocessing.get_context("fork").Process(target=recipe._run, args=("traces", argv))
    process.start()
    return process


def end(process):
    process.join(60)
    assert process.exitcode == 0


def test_a_shard_that_was_killed_makes_only_its_rest_and_the_merge_is_that_of_one_command(recipe_dir):
    run, config = recipe_dir.parent / "run", recipe_dir / "5_traces.yaml"
    whole = recipe_dir.parent / "whole"
    whole.mkdir()
    metrics = traces.main(*recipe.resolve("traces", recipe.load(config), str(config)), whole)
    asked = sorted(Server.requests)

    Server.requests = []
    end(start(recipe_dir, "--shard", "1/2"))
    Server.num_answers = len(Server.requests) + 20
    killed = start(recipe_dir, "--shard", "2/2")
    assert Server.waiting.wait(60)
    os.kill(killed.pid, 9)
    killed.join(60)
    assert killed.exitcode == -9 and not run_dir.is_finished(run, "traces.shard-2-of-2")
    stored = sum(len(pq.read_table(path)) for path in (run / "traces.shard-2-of-2.partial/attempts").glob("*.parquet"))
    assert 15 <= stored <= 20
    Server.num_answers = math.inf
    Server.failing.set()
    end(start(recipe_dir, "--shard", "2/2"))
    assert len(Server.requests) == len(asked) + 20 - stored  # of what was stored nothing is asked again
    end(start(recipe_dir))

    assert len(Server.requests) == len(asked) + 20 - stored  # nor by the merge
    for name in ("attempts", "accepted", "row_split"):
        assert pq.read_table(run / f"traces/{name}.parquet") == pq.read_table(whole / f"{name}.parquet")
    assert run_dir.read_metrics(run, "traces") == metrics and metrics["mean_attempts"] > 1
    assert sorted(path.name for path in run.glob("traces*")) == ["traces"]
    files = {path.name for path in (run / "traces").iterdir()}
    assert files == {path.name for path in whole.iterdir()} | {
        "metrics.json", "recipe.yaml", "stage.json", "versions.json"
    }  # fmt: skip


def test_a_dry_run_of_a_shard_shows_its_launch_line(recipe_dir):
    words = ("run", recipe_dir, "--only", "traces", "--shard", "1/2", "--dry-run", "traces.max_rows=9")
    line = (
        f"accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.traces --config {recipe_dir}/5_traces"
    )
    assert run_command(*words) == f"{line}.yaml --max_rows=9 --shard=1/2\n"
    make_by_hand(recipe_dir, SHARDS[0], max_rows=9)
    assert run_command(*words).startswith("# finished: accelerate launch ")


# --- shards that do not go together


def make_by_hand(recipe_dir, shard, **changes):
    """A finished folder of a shard, as if another recipe had made it where there are changes."""
    given = {**recipe.load(recipe_dir / "5_traces.yaml"), **changes}
    folder = recipe_dir.parent / "run" / shard.name("traces")
    finish(folder, given=given, inputs=["data", "candidates", "semantic_ids"])
    return folder


def run_traces(capsys, recipe_dir, *words):
    return refusal(capsys, "run", recipe_dir, "--only", "traces", *words)


def test_a_missing_shard_is_named_with_the_command_that_makes_it(recipe_dir, capsys):
    for number in (1, 3):
        make_by_hand(recipe_dir, Shard(number, 4), max_rows=10)
    line = run_traces(capsys, recipe_dir, "traces.max_rows=10")
    assert "run/traces.shard-2-of-4 is missing, so that the shards of traces cannot be merged; make 2/4, 4/4: " in line
    command = line.split("`")[1]
    assert command == f"python -m rerank.traces --config {recipe_dir}/5_traces.yaml --max_rows=10 --shard 2/4"
    recipe._run("traces", command.split()[3:])
    assert run_dir.is_finished(recipe_dir.parent / "run", "traces.shard-2-of-4")
    with pytest.raises(SystemExit):
        recipe._run("traces", command.split()[3:-2])
    assert (
        f"traces.shard-4-of-4 is missing, {line.split(' is missing, ')[1].split('; ')[0]}" in capsys.readouterr().err
    )


def test_shards_of_different_recipes_or_inputs_are_refused_by_name(recipe_dir, capsys):
    run = recipe_dir.parent / "run"
    for shard, changes in zip(SHARDS, ({}, {"seed": 5}), strict=True):
        make_by_hand(recipe_dir, shard, **changes)
    line = run_traces(capsys, recipe_dir)
    cure = f"; delete {run}/traces.shard-2-of-2 and make this shard again, or choose another --out"
    told = "traces.shard-2-of-2 was made by another recipe: seed is 5 there and its default here"
    assert line == f"rerank: {run}/{told}{cure}\n"
    shutil.rmtree(run / "traces.shard-2-of-2")
    make_by_hand(recipe_dir, SHARDS[1])
    (run / "candidates/stage.json").unlink()
    finish(run / "candidates", inputs=["data"])
    told = "traces.shard-1-of-2 was made from another candidates folder than the run's; delete"
    assert told in run_traces(capsys, recipe_dir)


def test_shards_of_two_numbers_are_refused(recipe_dir, capsys):
    make_by_hand(recipe_dir, Shard(1, 2))
    told = "traces.shard-1-of-2 is one of 2 shards but {}/run/traces.shard-2-of-3 one of 3; give one number for all"
    assert told.format(recipe_dir.parent) in run_traces(capsys, recipe_dir, "--shard", "2/3")
    make_by_hand(recipe_dir, Shard(2, 3))
    assert told.format(recipe_dir.parent) in run_traces(capsys, recipe_dir)


def test_a_shard_is_of_one_stage_and_forced_with_all_others(recipe_dir, capsys):
    assert "--shard 1/2 is a part of one stage; name it by --only" in refusal(capsys, "run", recipe_dir, "--shard=1/2")
    told = "--force traces deletes all shards of a stage; run it without --shard, or leave it out"
    assert told in run_traces(capsys, recipe_dir, "--shard=1/2", "--force=traces")
    (recipe_dir / "1_data.yaml").write_text(f"run_dir: {recipe_dir.parent}/run\ninteractions: x.csv\n")
    told = "--shard 1/2: the stage data has no shards, only semantic_ids, candidates, traces, evaluate; leave it out"
    assert told in refusal(capsys, "run", recipe_dir, "--only", "data", "--shard=1/2")
    run = recipe_dir.parent / "run"
    make_by_hand(recipe_dir, SHARDS[0])
    run_dir.set_aside(run, "traces")
    assert not list(run.glob("traces*"))
