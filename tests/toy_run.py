"""Runs and rollout stores made by hand: twelve items, thirty users, and models of random weights.

Each `write_*` fills a folder of one stage, which `finish` then finishes; `write_run` does so for all that evaluation
reads. `rollout` is a stored rollout as a dictionary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rerank.baselines import FEATURES, Counts, feature_rows, fit_edges
from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.prompts import THINK, THINK_END, PromptSettings
from rerank.rollouts.store import RolloutWriter
from rerank.rows import FEATURES_FILE, PromptedRow, RankingRow, reward_columns
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
RECIPES = {
    "1_data": {"interactions": "toy.csv"},
    "2_semantic_ids": {"embeddings": "toy.npy"},
    "4_candidates": {"num_candidates": 6},
    "8_evaluate": {},
}
# LINE has two levels of four codes on a line: 0 10 20 30, then 0 1 2 3.
LINE = np.array([[[0.0], [10.0], [20.0], [30.0]], [[0.0], [1.0], [2.0], [3.0]]], dtype=np.float32)
LINE_TOKENIZER = Tokenizer(LINE, mean=np.zeros(1, dtype=np.float32))


def finish(
    folder: Path,
    metrics: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    **tables: pa.Table,
) -> None:
    """Make RUN/<stage> that of a finished stage, with what is in it already and these tables."""
    half_made = run_dir.partial_dir(folder.parent, folder.name)
    if folder.exists():
        folder.rename(half_made)
    half_made.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, half_made / f"{name}.parquet")
    given = dict(given or {})
    run_dir.finish(folder.parent, folder.name, given, given, inputs, dict(metrics or {}))


def write_recipes(folder: Path, recipes: Mapping[str, dict] = RECIPES) -> Path:
    """Recipe files by name, each with a `run_dir`."""
    folder.mkdir(parents=True)
    for name, keys in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run_dir": "runs/toy", **keys}))
    return folder


# --- data


def first_items(num: int) -> Catalogue:
    """The first items of CATALOGUE."""
    columns = CATALOGUE.item_ids, CATALOGUE.semantic_ids, CATALOGUE.titles, CATALOGUE.categories
    return Catalogue(*(column[:num] for column in columns))


def write_items(folder: Path, num_items: int = NUM_ITEMS, **columns: Sequence) -> None:
    """`items.parquet`, with the titles and categories of CATALOGUE unless given."""
    items = {"item": list(range(num_items)), "item_id": [f"m{item}" for item in range(num_items)]}
    items |= {"title": (CATALOGUE.titles * num_items)[:num_items], "category": ["drama"] * num_items}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**items, **columns}), folder / "items.parquet")


def toy_sequences() -> dict[int, np.ndarray]:
    """Thirty users who mostly walk the items in a circle."""
    rng = np.random.default_rng(0)
    return {user: (np.cumsum(rng.choice([1, 1, 1, 2, 5], 8)) + user) % NUM_ITEMS for user in range(30)}


def write_interactions(
    folder: Path,
    sequences: Mapping[int, Sequence[int]] | None = None,
    splits: Sequence[str] = (),
    seen: bool = False,
    **metrics: Any,
) -> None:
    """Sequences by user and a row for each interaction that is not for training; finishes the data stage.

    Args:
        splits: The split of each interaction, users one after the other; all for training unless given.
        seen: Whether mid-training may see what the re-ranker trains on.
        metrics: More of them.
    """
    sequences = {user: list(map(int, items)) for user, items in (sequences or toy_sequences()).items()}
    taken = [(user, place) for user, items in sequences.items() for place in range(len(items))]
    table = [
        {"user": user, "item": sequences[user][place], "position": place, "split": split}
        for (user, place), split in zip(taken, splits or ["train"] * len(taken), strict=True)
    ]
    rows = [
        {**row, "row_id": number, "history": sequences[row["user"]][: row["position"]], "target": row["item"]}
        for number, row in enumerate(row for row in table if row["split"] != "train")
    ]
    tables = {"interactions": pa.Table.from_pylist(table)} | ({"rows": pa.Table.from_pylist(rows)} if rows else {})
    finish(folder, {"midtrain_has_seen_rerank_targets": seen, **metrics}, **tables)


# --- semantic ids


def toy_codes() -> np.ndarray:
    """The codes of the twelve items, (12, 2), as SEMANTIC_IDS write them."""
    return np.stack([np.arange(NUM_ITEMS) // 4, np.arange(NUM_ITEMS) % 4], axis=1)


def write_semantic_ids(folder: Path, codes: np.ndarray | None = None) -> None:
    """Ids, and the tokenizer and the embeddings from which they follow: item 6, at 12, is 10 + 2, so (1, 2)."""
    codes = toy_codes() if codes is None else codes
    folder.mkdir(parents=True, exist_ok=True)
    SemanticIds(codes, codebook_size=int(codes.max()) + 1).save(folder)
    np.save(folder / "embeddings.npy", (10.0 * codes[:, :1] + codes[:, 1:]).astype(np.float32))
    LINE_TOKENIZER.save(folder / "tokenizer.npz")


# --- candidates and traces


def features_of(counts: Counts, history, candidates, scores, own_sequence=None) -> np.ndarray:
    """(N, F) features of one row; `own_sequence` is its user's part of the counts, to be subtracted."""
    own = None if own_sequence is None else counts.own([0], {0: np.asarray(own_sequence)})
    return feature_rows(counts, [np.asarray(history)], np.array([candidates]), np.array([scores]), own)[0]


def toy_rows(counts: Counts, split_seed: int) -> list[dict]:
    """Records of a candidates table, one a user: the list is that of the counts, the target one that may follow."""
    rng = np.random.default_rng(split_seed)
    rows = []
    for user, sequence in toy_sequences().items():
        history = sequence[split_seed : rng.integers(3, 7)]  # no row of a split is one of another
        target = int((history[-1] + rng.choice([1, 1, 2, 5])) % NUM_ITEMS)
        candidates, scores = (one[0] for one in counts.top_rows([history], NUM_CANDIDATES))
        relevance = (candidates == target).astype(float)
        features = features_of(counts, history, candidates, scores)
        row = {"row_id": 100 * split_seed + user, "user": user, "history": history.tolist()}
        row |= {"candidates": candidates.tolist(), "relevance": relevance.tolist(), "hit": bool(relevance.any())}
        rows.append({**row, "first_stage_scores": scores.tolist(), "target": target, "features": features.tolist()})
    return rows


def write_candidates(folder: Path, edges: Mapping[str, Sequence[float]] | None = None, **splits: list[dict]) -> None:
    """The records of each split, and `features.json` where edges are given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    if edges is not None:
        write_json(folder / FEATURES_FILE, {"names": list(FEATURES), "edges": edges})


def write_traces(folder: Path, uses: Mapping[int, str], settings: PromptSettings = SETTINGS) -> None:
    """What each row is used for, by row_id, and how a prompt looks."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"row_id": list(uses), "used_for": list(uses.values())}), folder / "row_split.parquet")
    settings.save(folder)


# --- models and whole runs


def write_model(folder: Path, with_ranking_files: bool = True) -> None:
    """A one-layer model with random weights and the catalogue's id tokens."""
    from rerank.models import base as base_model

    folder.mkdir(parents=True)
    tokenizer = base_model.train_tokenizer(["Rank: History: Candidates: Title drama"], 300)
    shape = base_model.SmallModelArguments(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1)
    model = base_model.make_small_model(shape, tokenizer, seed=0)
    base_model.add_tokens(model, tokenizer, [*ID_TOKENS, THINK, THINK_END], seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if with_ranking_files:
        SETTINGS.save(folder)
        CATALOGUE.save(folder)
        write_json(folder / "generation.json", {"max_completion_tokens": 16, "trace": True})


def write_run(folder: Path, upto: str = "dapo") -> Path:
    """The folders of the stages up to `semantic_ids`, `candidates`, or `dapo`: all that the evaluate stage reads."""
    write_items(folder / "data")
    write_interactions(folder / "data")
    write_semantic_ids(folder / "semantic_ids")
    finish(folder / "semantic_ids")
    if upto == "semantic_ids":
        return folder
    counts = Counts.fit(toy_sequences(), NUM_ITEMS)
    splits = {name: toy_rows(counts, seed) for seed, name in enumerate(("train", "valid", "test"))}
    values = np.concatenate([row["features"] for row in splits["train"]])
    edges = {name: fit_edges(values[:, column]) for column, name in enumerate(FEATURES)}
    write_candidates(folder / "candidates", edges, **splits)
    finish(folder / "candidates")
    if upto == "dapo":
        _write_models(folder, counts)
    return folder


def _write_models(folder: Path, counts: Counts) -> None:
    """The stages midtrain, sft and dapo: models, log histories and metrics."""
    for place in ("sft/model", "dapo/model"):
        write_model(folder / place)
        counts.save(folder / place / "evidence.npz")
        (folder / place / FEATURES_FILE).write_bytes((folder / "candidates" / FEATURES_FILE).read_bytes())
    write_model(folder / "midtrain/model", with_ranking_files=False)
    log = [{"step": step, "reward": step / 10, "loss": 0.0} for step in range(1, 31)]
    write_json(folder / "dapo/log_history.json", log)
    steps = [{"step": step, "loss": 4 - step, "loss_sequence": 6 - step, "loss_text": 2 - step} for step in (1, 2)]
    write_json(folder / "midtrain/log_history.json", [*steps, {"step": 2, "eval_R@10": 0.25}])
    dapo = {"rollout_engine": "vllm", "max_logp_gap": 0.001, "reward_first_fifth": 0.1, "reward_last_fifth": 0.2}
    dapo |= {"reward_gain_interval": [0.05, 0.15], "steps": 12345, "share": 0.123456, "no_trace": {"rows": 7}}
    finish(folder / "midtrain", given={"max_items": 5})
    finish(folder / "sft")
    finish(folder / "dapo", dapo)


# --- rollouts


def rollout(step: int = 0, group: int = 0, **changes: Any) -> dict[str, Any]:
    """A stored rollout that wins the target one place, but for the changes."""
    row = RankingRow(40 + group, (3, 4), (0, 1, 2), (0.0, 1.0, 0.0), user=7)
    columns = reward_columns([PromptedRow(row, "Rank:\nHistory", ["1", "2", "3"], 16)])
    made = {name: values[0] for name, values in columns.items() if name != "prompts"}
    made |= {"step": step, "run": "toy", "round": 0, "group": group, "target": 1, "prompt": "Rank:\nHistory"}
    made |= {"completion": "<think>it fits</think>2,1,3", "completion_ids": [5, 6], "truncated": False}
    made |= {"policy_logps": [-0.5, -0.25], "sampling_logps": [-0.5, -0.125]}
    made |= {"reward_components": {"rank_promotion": 1 / 3, "well_formed": None}, "reward": 0.5, "advantage": 1.25}
    made |= {"conditions": {"rank_promotion": True, "well_formed": False}, "kept": True, "discard_reason": None}
    made |= {"epoch": 0, "seed": 11, "outcome": 1.0}
    made |= {"failure": None, "order": [1, 0, 2], "target_rank_after": 1, **changes}
    places = {"positive_rank": made["target_rank"], "positive_rank_after": made["target_rank_after"]}
    return {**places, **made}  # the target is the one positive


def write_rollouts(folder: Path, *records: dict[str, Any], rank: int = 0) -> None:
    """The parts that a process writes."""
    writer = RolloutWriter(folder, rank)
    writer.add(records)
    writer.close()


def cut_off(path: Path) -> None:
    """Take the end of a Parquet file away."""
    path.write_bytes(path.read_bytes()[:-200])


def damage_inside(path: Path) -> None:
    """Turn bytes within a Parquet file to zeros."""
    data = bytearray(path.read_bytes())
    data[4:600] = bytes(596)
    path.write_bytes(data)
