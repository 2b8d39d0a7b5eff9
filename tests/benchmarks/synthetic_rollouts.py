"""A rollout store of any size, for timing what reads it: the shape of a real one, its contents drawn at random.

Rows of ten candidates shown as numbers, 16 completions a row, about 40 tokens a completion. Every completion says what
its columns say, so that rewards can be computed again from the text.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.catalogue import Catalogue, semantic_id_text
from rerank.prompts import completion
from rerank.rollouts.schema import SCHEMA

NUM_ITEMS, NUM_CANDIDATES, GROUP_SIZE = 12_000, 10, 16
GROUPS_A_PART = 160  # 2,560 completions: 1M rollouts are 391 parts
DISTINCT_PARTS = 8  # drawn anew; further parts repeat them under other steps and rows
LABELS = [str(number) for number in range(1, NUM_CANDIDATES + 1)]
WORDS = ("poor", "weak", "fair", "strong", "top")


def catalogue() -> Catalogue:
    """Items with titles and ids of three levels."""
    names = [f"The {WORDS[item % 5]} item number {item}" for item in range(NUM_ITEMS)]
    ids = [semantic_id_text((item // 600, item // 25 % 24, item % 25)) for item in range(NUM_ITEMS)]
    return Catalogue([f"m{item}" for item in range(NUM_ITEMS)], ids, names, ["drama"] * NUM_ITEMS)


def write_synthetic_store(run_dir: str | Path, num_rollouts: int) -> None:
    """Write `dapo/rollouts` of a run, one part a step, and the catalogue of its model."""
    folder, items = Path(run_dir) / "dapo/rollouts", catalogue()
    folder.mkdir(parents=True)
    (Path(run_dir) / "dapo/model").mkdir()
    items.save(Path(run_dir) / "dapo/model")
    size, pool = GROUPS_A_PART * GROUP_SIZE, []
    for step in range(-(-num_rollouts // size)):
        if len(pool) < DISTINCT_PARTS:
            pool.append(pa.Table.from_pylist(_records(np.random.default_rng(step), items), schema=SCHEMA))
        part = _at_step(pool[step % DISTINCT_PARTS], step).slice(0, num_rollouts - step * size)
        pq.write_table(part, folder / f"part-{step:08d}-0.parquet", compression="zstd")


def _at_step(part: pa.Table, step: int) -> pa.Table:
    rows = pa.array(np.asarray(part["row_id"]) + step // DISTINCT_PARTS * DISTINCT_PARTS * GROUPS_A_PART)
    steps = pa.array(np.full(part.num_rows, step))
    for name, values in (("step", steps), ("row_id", rows)):
        part = part.set_column(part.schema.get_field_index(name), SCHEMA.field(name), values)
    return part.replace_schema_metadata(SCHEMA.metadata)


def _records(rng: np.random.Generator, items: Catalogue) -> list[dict]:
    """The rollouts of one part: groups of one row each, in every tenth of which all completions are alike."""
    records = []
    for group in range(GROUPS_A_PART):
        shown = rng.choice(NUM_ITEMS, NUM_CANDIDATES + 5, replace=False).tolist()
        candidates, history = shown[:NUM_CANDIDATES], shown[NUM_CANDIDATES:]
        target = int(rng.integers(NUM_CANDIDATES))
        lines = [f" {label}.{items.semantic_ids[item]}" for label, item in zip(LABELS, candidates, strict=True)]
        row = {
            "run": "synthetic", "round": 0, "group": group, "row_id": int(rng.integers(GROUPS_A_PART)), "user": group,
            "prompt": "\n".join(["Rank:", f"History:{''.join(items.semantic_ids[i] for i in history)}", *lines]),
            "target": candidates[target], "history": history, "candidates": candidates, "candidate_labels": LABELS,
            "target_rank": target + 1, "positive_rank": target + 1, "fields": "{}", "max_completion_tokens": 64,
            "top_k": 0,
            "relevance": [float(place == target) for place in range(NUM_CANDIDATES)],
            "first_stage_ranks": list(range(1, NUM_CANDIDATES + 1)),
        }  # fmt: skip
        records += _group(rng, row, group % 10 == 9)
    return records


def _group(rng: np.random.Generator, row: dict, all_alike: bool) -> list[dict]:
    """Completions of one row, their advantages centred within it."""
    answers = [_answer(rng, row) for _ in range(1 if all_alike else GROUP_SIZE)]
    answers = answers * (GROUP_SIZE // len(answers))
    rewards = np.array([answer["reward"] for answer in answers])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    verdict = {"kept": not all_alike, "discard_reason": "all_equal" if all_alike else None}
    return [row | a | verdict | {"advantage": float(v)} for a, v in zip(answers, advantages, strict=True)]


def _answer(rng: np.random.Generator, row: dict) -> dict:
    """One completion: mostly a ranking near the incoming order, in one of twenty cases one item short."""
    order = np.argsort(np.arange(NUM_CANDIDATES) + rng.normal(0, 2.0, NUM_CANDIDATES)).tolist()
    is_short = bool(rng.random() < 0.05)
    trace = " ".join(f" {label} {WORDS[rng.integers(5)]}" for label in LABELS)
    before = row["target_rank"]
    after = None if is_short else order.index(before - 1) + 1
    promotion = -1.0 if after is None else (before - after) / NUM_CANDIDATES
    is_met = after is not None and (after < before or after == 1)
    logps = -rng.exponential(0.5, 37).astype(np.float32)
    return {
        "completion": completion(trace, order[:-1] if is_short else order, LABELS),
        "completion_ids": rng.integers(0, 500, len(logps)).tolist(),
        "policy_logps": logps.tolist(),
        "sampling_logps": (logps + rng.normal(0, 0.01, len(logps)).astype(np.float32)).tolist(),
        "reward_components": [("rank_promotion", promotion), ("well_formed", float(is_met))],
        "conditions": [("rank_promotion", True), ("well_formed", is_met)],
        "reward": promotion + 0.2 * is_met,
        "truncated": False,
        "failure": "too_few" if is_short else None,
        "order": None if is_short else order,
        "target_rank_after": after,
        "positive_rank_after": after,
    }  # fmt: skip
