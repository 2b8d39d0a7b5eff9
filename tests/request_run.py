"""A finished data stage of requests, drawn at random: what the candidates stage and later ones read."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from toy_run import finish

LENGTHS = (2, 3, 7, 12)
DAY = 86400.0


def draw_requests(num=80, num_users=16, num_items=40, seed=0, days=20):
    """Requests in order of time, each a dict as rows.parquet has it, the last sixth held out."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, days * DAY, num))
    likes = rng.random(num_items)
    rows = []
    for number, time in enumerate(times.tolist()):
        items = rng.choice(num_items, int(rng.choice(LENGTHS)), replace=False)
        grades = [float(rng.random() < 0.2 + 0.6 * likes[item]) for item in items]
        grades[0], grades[-1] = 0.0, 1.0 + number % 2
        if len(grades) > 3:
            grades[1] = None
        user = int(rng.integers(num_users))
        past = [(row, item, grade) for row in rows if row["user"] == user for item, grade in liked(row)]
        rows.append(
            {
                "row_id": number,
                "request_id": f"r{number}",
                "user": user,
                "split": "rerank" if number < num * 2 // 3 else "valid" if number < num * 5 // 6 else "test",
                "position": None,
                "time": time,
                "history": [item for _, item, _ in past],
                "history_times": [row["time"] for row, _, _ in past],
                "history_events": None,
                "target": None,
                "candidates": items.tolist(),
                "relevance": grades,
                "scores": None if number % 2 else rng.random(len(items)).tolist(),
                "fields": json.dumps({"device": "ab"[number % 2]}),
                "candidate_price": [None if item % 5 == 0 else float(item) for item in items],
            }
        )
    return rows


def liked(row):
    """(item, grade) of the relevant candidates."""
    return [(item, grade) for item, grade in zip(row["candidates"], row["relevance"], strict=True) if grade]


SCHEMA = pa.schema(
    [("row_id", pa.int64()), ("request_id", pa.string()), ("user", pa.int64()), ("split", pa.string())]
    + [("position", pa.int64()), ("time", pa.float64()), ("history", pa.list_(pa.int64()))]
    + [("history_times", pa.list_(pa.float64())), ("history_events", pa.list_(pa.string())), ("target", pa.int64())]
    + [("candidates", pa.list_(pa.int64())), ("relevance", pa.list_(pa.float64()))]
    + [("scores", pa.list_(pa.float64())), ("fields", pa.string()), ("candidate_price", pa.list_(pa.float64()))]
)


def write_requests(run: Path, rows, num_items=40, split="by_user", events=None):
    """RUN/data of these rows; `events` are the rows whose likes are interactions, by default all."""
    records = [
        {"user": row["user"], "item": item, "time": row["time"], "split": row["split"]}
        for row in (rows if events is None else events)
        for item, _ in liked(row)
    ]
    records.sort(key=lambda record: (record["user"], record["time"]))
    for number, record in enumerate(records):
        record["position"] = number
    columns = [("user", pa.int64()), ("item", pa.int64()), ("position", pa.int64()), ("time", pa.float64())]
    interactions = pa.Table.from_pylist(records, schema=pa.schema([*columns, ("split", pa.string())]))
    items = {"item": list(range(num_items)), "item_id": [f"i{item}" for item in range(num_items)]}
    items |= {"title": [f"Film {item}" for item in range(num_items)], "text": [""] * num_items}
    items |= {
        "category": [f"c{item % 3}" for item in range(num_items)],
        "year": [str(1990 + i) for i in range(39)] + [""],
    }
    users = sorted({row["user"] for row in rows})
    tables = {
        "rows": pa.Table.from_pylist(rows, schema=SCHEMA),
        "interactions": interactions,
        "items": pa.table(items),
    }
    tables["users"] = pa.table({"user": users, "user_id": [f"u{user}" for user in users]})
    finish(run / "data", {"midtrain_has_seen_rerank_targets": True, "terms": ""}, {"split": split}, **tables)
