"""A finished run of twelve items and thirty users, made by hand up to the models, whose weights are random."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rerank import base_model, run_dir
from rerank.baselines import FEATURES, Counts, fit_edges
from rerank.catalogue import Catalogue
from rerank.prompts import THINK, THINK_END, PromptSettings
from rerank.semantic_ids import SemanticIds, Tokenizer

NUM_ITEMS, NUM_CANDIDATES = 12, 4
SEMANTIC_IDS = [f"<s_a_{item // 4}><s_b_{item % 4}>" for item in range(NUM_ITEMS)]
ID_TOKENS = [*(f"<s_a_{code}>" for code in range(3)), *(f"<s_b_{code}>" for code in range(4))]
SETTINGS = PromptSettings(evidence="codes", task="short")
CATALOGUE = Catalogue(
    [f"m{item}" for item in range(NUM_ITEMS)],
    SEMANTIC_IDS,
    ["<script>alert(1)</script>", *(f"Title {item}" for item in range(1, NUM_ITEMS))],
    ["drama"] * NUM_ITEMS,
)


def finish(folder: Path, metrics: dict) -> None:
    """Make a folder that of a finished stage."""
    run_dir.write_json(folder / "metrics.json", metrics)
    run_dir.write_json(folder / "stage.json", {"id": folder.name, "given": {}, "inputs": {}})


def toy_sequences() -> dict[int, np.ndarray]:
    """Thirty users who mostly walk the items in a circle."""
    rng = np.random.default_rng(0)
    return {user: (np.cumsum(rng.choice([1, 1, 1, 2, 5], 8)) + user) % NUM_ITEMS for user in range(30)}


def toy_rows(counts: Counts, split_seed: int) -> list[dict]:
    """A row a user: the last of the sequence is the target, the list is that of `transitions`."""
    rng = np.random.default_rng(split_seed)
    rows = []
    for user, sequence in toy_sequences().items():
        history = sequence[: rng.integers(3, 7)].tolist()
        target = int((history[-1] + rng.choice([1, 1, 2, 5])) % NUM_ITEMS)
        candidates, scores = counts.top(history, NUM_CANDIDATES)
        relevance = (candidates == target).astype(float)
        row = {"row_id": 100 * split_seed + user, "user": user, "history": history, "candidates": candidates.tolist()}
        row |= {"relevance": relevance.tolist(), "first_stage_scores": scores.tolist(), "target": target}
        features = counts.features(history, candidates, scores).tolist()
        rows.append({**row, "hit": bool(relevance.any()), "features": features})
    return rows


def write_model(folder: Path, with_ranking_files: bool = True, seed: int = 0) -> None:
    """A one-layer model with random weights and the catalogue's id tokens."""
    folder.mkdir(parents=True)
    tokenizer = base_model.train_tokenizer(["Rank: History: Candidates: Title drama"], 300)
    shape = base_model.SmallModelArguments(
        hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, context_length=1024
    )
    model = base_model.make_small_model(shape, tokenizer, seed)
    base_model.add_tokens(model, tokenizer, [*ID_TOKENS, THINK, THINK_END], seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if with_ranking_files:
        SETTINGS.save(folder)
        CATALOGUE.save(folder)
        run_dir.write_json(folder / "generation.json", {"max_completion_tokens": 16, "trace": True})


def write_interactions(folder: Path) -> None:
    """The users' sequences, all of them for training."""
    rows = [
        {"user": user, "item": int(item), "position": position, "split": "train"}
        for user, sequence in toy_sequences().items()
        for position, item in enumerate(sequence)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "interactions.parquet")
    finish(folder, {"midtrain_has_seen_rerank_targets": False})


def write_semantic_ids(folder: Path) -> None:
    """Ids, and the tokenizer and the embeddings from which they follow: item 6, at 12, is 10 + 2, so (1, 2)."""
    codes = np.stack([np.arange(NUM_ITEMS) // 4, np.arange(NUM_ITEMS) % 4], axis=1)
    SemanticIds(codes, codebook_size=4).save(folder)
    np.save(folder / "embeddings.npy", (10.0 * codes[:, :1] + codes[:, 1:]).astype(np.float32))
    lines = np.array([[[0.0], [10.0], [20.0], [30.0]], [[0.0], [1.0], [2.0], [3.0]]], dtype=np.float32)
    Tokenizer(lines, mean=np.zeros(1, dtype=np.float32)).save(folder / "tokenizer.npz")


def write_run(folder: Path) -> Path:
    """All folders that the evaluate stage reads."""
    for stage in ("data", "semantic_ids", "candidates", "midtrain", "sft", "dapo"):
        (folder / stage).mkdir(parents=True)
    items = {"item": list(range(NUM_ITEMS)), "item_id": CATALOGUE.item_ids}
    items |= {"title": CATALOGUE.titles, "category": CATALOGUE.categories}
    pq.write_table(pa.table(items), folder / "data/items.parquet")
    write_interactions(folder / "data")
    write_semantic_ids(folder / "semantic_ids")
    counts = Counts.fit(toy_sequences(), NUM_ITEMS)
    splits = {name: toy_rows(counts, seed) for seed, name in enumerate(("train", "valid", "test"))}
    for name, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"candidates/{name}.parquet")
    values = np.concatenate([row["features"] for row in splits["train"]])
    edges = {name: fit_edges(values[:, column]) for column, name in enumerate(FEATURES)}
    features = {"names": list(FEATURES), "edges": edges}
    for place in ("sft/model", "dapo/model"):
        write_model(folder / place)
        counts.save(folder / place / "evidence.npz")
        run_dir.write_json(folder / place / "features.json", features)
    run_dir.write_json(folder / "candidates/features.json", features)
    write_model(folder / "midtrain/model", with_ranking_files=False)
    (folder / "midtrain/recipe.yaml").write_text(yaml.safe_dump({"max_items": 5}))
    (folder / "dapo/log_history.json").write_text(
        json.dumps([{"step": step, "reward": step / 10, "loss": 0.0} for step in range(1, 31)])
    )
    steps = [{"step": step, "loss": 4 - step, "loss_sequence": 6 - step, "loss_text": 2 - step} for step in (1, 2)]
    run_dir.write_json(folder / "midtrain/log_history.json", [*steps, {"step": 2, "eval_R@10": 0.25}])
    dapo = {"rollout_engine": "vllm", "max_logp_gap": 0.001, "reward_first_fifth": 0.1, "reward_last_fifth": 0.2}
    dapo |= {"reward_gain_interval": [0.05, 0.15], "steps": 12345, "share": 0.123456, "no_trace": {"rows": 7}}
    for stage in ("semantic_ids", "candidates", "midtrain", "sft"):
        finish(folder / stage, {})
    finish(folder / "dapo", dapo)
    return folder
