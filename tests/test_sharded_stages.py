"""The stages that take shards: what is merged of them is what one command makes."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from next_item_run import write_next_item_run
from toy_ids import ids_arguments, write_encoder
from toy_run import NUM_ITEMS, toy_sequences, write_run

from rerank import candidates, evaluate, semantic_ids
from rerank.baselines import Counts, ItemFacts
from rerank.candidates import CandidatesArguments
from rerank.evaluate import EvaluateArguments, ranking
from rerank.launch import run_dir
from rerank.launch.shards import Shard
from rerank.models.ranker import Answer
from rerank.next_item.model import NextItemModel


def make_shard(stage, args, shard):
    folder = run_dir.partial_dir(args.run_dir, shard.name(stage.name))
    folder.mkdir(exist_ok=True)
    stage.main_of_shard(args, shard, folder)
    run_dir.finish(args.run_dir, shard.name(stage.name), {}, {}, (), {})


def make_both(stage, args, tmp_path, count, monkeypatch, asked):
    """The folders that one command makes and that `count` shards are merged to, which asks no model; their metrics."""
    folders, metrics = [tmp_path / name for name in ("whole", "merged")], []
    for folder in folders:
        folder.mkdir()
        metrics.append(stage.main(args, folder))
        if folder.name == "whole":
            for number in range(1, count + 1):
                make_shard(stage, args, Shard(number, count))
            monkeypatch.delattr(*asked)
    return folders, metrics


def test_texts_are_encoded_in_shards(tmp_path, monkeypatch):
    write_encoder(tmp_path / "encoder")
    (tmp_path / "run").mkdir()
    args = ids_arguments(tmp_path / "run", encoder=str(tmp_path / "encoder"))
    asked = (semantic_ids.sources, "encode")
    (whole, merged), _ = make_both(semantic_ids.STAGE, args, tmp_path, 7, monkeypatch, asked)
    for name in ("embeddings.npy", "assigned_codes.npy"):
        np.testing.assert_array_equal(np.load(whole / name), np.load(merged / name))
    assert pq.read_table(whole / "semantic_ids.parquet") == pq.read_table(merged / "semantic_ids.parquet")


@pytest.fixture(scope="module")
def next_item_run(tmp_path_factory):
    return write_next_item_run(tmp_path_factory.mktemp("next") / "run")


def test_candidates_of_a_model_are_found_in_shards(next_item_run, tmp_path, monkeypatch):
    args = CandidatesArguments(run_dir=str(next_item_run), source="model", num_candidates=4, num_beams=8, batch_size=7)
    asked = (NextItemModel, "by_beams")
    (whole, merged), metrics = make_both(candidates.STAGE, args, tmp_path, 3, monkeypatch, asked)
    for split in ("train", "valid", "test"):
        one, other = (pq.read_table(folder / f"{split}.parquet").to_pydict() for folder in (whole, merged))
        for name in ("row_id", "user", "history", "candidates", "relevance", "hit"):
            assert one[name] == other[name]
        for name in ("first_stage_scores", "features"):  # a batch pads its rows, which shows in the last digits
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert metrics[0]["splits"] == metrics[1]["splits"]


def answer(row, batch):
    """An answer that follows from the row as it is shown, one in five no ranking."""
    of_batch = batch.constrained, batch.one_token, batch.bypass_reasoning, batch.catalogue is None
    rng = np.random.default_rng([row.row_id, *row.candidates, *of_batch])
    order = rng.permutation(len(row.candidates)).tolist() if rng.random() > 0.2 else None
    return Answer(order, None if order else "junk", f"trace {row.row_id}", f"text {order}", 5, order is None)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Arguments of a run whose engine answers by `answer`, and the models that were asked."""
    run, asked = write_run(tmp_path / "run"), []
    counts = Counts.fit(toy_sequences(), NUM_ITEMS, ItemFacts.of(NUM_ITEMS, categories=list("abcabcabcabc")))
    counts.save(run / "candidates/evidence.npz")

    def generate(model, batches, tensor_parallel_size):
        asked.append(model.folder.parent.name)
        assert tensor_parallel_size == 2
        return [([answer(row, batch) for row in batch.rows], float(len(batch.rows))) for batch in batches]

    monkeypatch.setattr(ranking, "generate_batches", generate)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    also = dict.fromkeys(("shuffle_texts", "constrained", "one_token", "bypassed"), True) | {"tensor_parallel_size": 2}
    return EvaluateArguments(run_dir=str(run), num_bootstrap=20, orders=2, **also), asked


def test_rankings_are_made_in_shards(evaluated, tmp_path, monkeypatch):
    args, asked = evaluated
    asked_of = (NextItemModel, "token_logps")  # of the mid-trained model
    (whole, merged), metrics = make_both(evaluate.STAGE, args, tmp_path, 3, monkeypatch, asked_of)
    assert asked == ["sft", "dapo"] * 4  # once by the one command, once a shard, not by the merge
    for name in ("rankings", "orders"):
        assert pq.read_table(whole / f"{name}.parquet") == pq.read_table(merged / f"{name}.parquet")
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (whole, merged))
    for results in (one, other):
        assert results["rows"]["midtrained"].pop("seconds_per_row") > 0
        assert results["rows"]["sft"]["seconds_per_row"] == 1  # the seconds of all shards
    assert one == other and metrics[0] == metrics[1]
    assert {"sft_constrained", "dapo_one_token", "sft_bypassed", "dapo_shuffled_texts"} <= {*one["rows"]}
    assert (whole / "bar.json").read_bytes() == (merged / "bar.json").read_bytes()


def test_a_shard_of_rankings_that_was_stopped_asks_only_the_models_that_are_left(evaluated, monkeypatch):
    args, asked = evaluated
    generate = ranking.generate_batches

    def stop(model, batches, tensor_parallel_size):
        if model.folder.parent.name == "dapo":
            raise RuntimeError("killed")
        return generate(model, batches, tensor_parallel_size)

    monkeypatch.setattr(ranking, "generate_batches", stop)
    with pytest.raises(RuntimeError, match="killed"):
        make_shard(evaluate.STAGE, args, Shard(1, 2))
    monkeypatch.setattr(ranking, "generate_batches", generate)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    make_shard(evaluate.STAGE, args, Shard(1, 2))
    assert asked == ["sft", "dapo"]


@pytest.mark.parametrize(
    ("stage", "args", "message"),
    [
        (semantic_ids, {"embeddings": "a.npy"}, "--shard parts the texts for an encoder, but a.npy gives embeddings"),
        (candidates, {"source": "transitions"}, "--shard parts the rows for a model, but source is transitions"),
        (evaluate, {"task": "next_item"}, "--shard goes with task rerank, but task is next_item; leave it out"),
    ],
)
def test_shards_are_refused_where_no_model_runs_over_the_rows(stage, args, message):
    with pytest.raises(ValueError, match=message):
        stage.STAGE.check_shard(stage.STAGE.arguments[0](run_dir="run", **args))
