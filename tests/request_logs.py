"""One log of requests, written in every form that the data stage reads."""

import csv
import datetime
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rerank import data

Request = dict[str, object]
START = 1_600_000_000  # seconds


def request(name, user, time, candidates, relevance, **more) -> Request:
    """A request; candidates are the letters of a word, a time counts from START."""
    seconds = None if time is None else START + time
    columns = {"request": name, "user": user, "time": seconds, "candidates": [*candidates], "relevance": relevance}
    return {**columns, **more}


# Two users take turns; of u's lists the second has no click, and w comes once.
LOG = [
    request("q1", "u", 0, "abc", [0, 1, 0]),
    request("q2", "v", 10, "cadb", [1, 0, 1, 0]),
    request("q3", "u", 20, "dc", [0, 0]),
    request("q4", "v", 30, "bd", [1, 0]),
    request("q5", "u", 40, "edcba", [0, 0, 0, 1, 1]),
    request("q6", "w", 50, "ea", [1, 0]),
    request("q7", "v", 60, "aec", [0, 1, 0]),
    request("q8", "u", 70, "bac", [1, 0, 0]),
]
# The positives of the user's earlier requests, as a slow reader of LOG finds them.
HISTORIES = ["", "", "b", "cd", "b", "", "cdb", "bba"]


def write_lines(path: Path, lines) -> str:
    """A text file of lines, gzipped if named so."""
    content = "\n".join([*lines, ""]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_table(path: Path, records: list[Request]) -> str:
    """CSV, with the elements of a list parted by spaces, JSONL or Parquet, by the suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return str(path)
    if ".csv" not in path.suffixes:
        return write_lines(path, map(json.dumps, records))
    text = io.StringIO()
    csv.writer(text).writerows([[*records[0]], *([_cell(value) for value in record.values()] for record in records)])
    return write_lines(path, text.getvalue().splitlines())


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " ".join("null" if element is None else str(element) for element in value)
    return "" if value is None else str(value)


def long_records(log: list[Request]) -> list[Request]:
    """One record a candidate: lists become single values, of `scores` under `score`."""
    records = []
    for row in log:
        lists = {name: value for name, value in row.items() if isinstance(value, list) and name != "history"}
        for place in range(len(row["candidates"])):
            one = {name: values[place] for name, values in lists.items()}
            names = {"candidates": "item", "scores": "score"}
            records.append({names.get(name, name): one.get(name, value) for name, value in row.items()})
    return records


def write_mind(path: Path, log: list[Request], histories) -> str:
    """`behaviors.tsv`."""
    rows = []
    for row, history in zip(log, histories, strict=True):
        moment = datetime.datetime.fromtimestamp(row["time"], datetime.UTC)
        time = f"{moment:%m/%d/%Y} {int(moment.strftime('%I'))}:{moment:%M:%S %p}"
        words = [f"{item}-{grade}" for item, grade in zip(row["candidates"], row["relevance"], strict=True)]
        rows.append("\t".join([row["request"], row["user"], time, " ".join(history), " ".join(words)]))
    return write_lines(path, rows)


def ranking(row: Request, timestamp: object, **more) -> dict:
    """Metarank's event of a request."""
    items = [{"id": item} for item in row["candidates"]]
    event = {"event": "ranking", "id": row["request"], "timestamp": timestamp, "items": items, **more}
    return {**event, "user": row["user"]} if row["user"] else event


def interaction(row: Request, item: str, timestamp: object, kind: str = "click") -> dict:
    """Metarank's event of a positive."""
    names = {"id": f"{row['request']} {item}", "ranking": row["request"], "item": item}
    return {"event": "interaction", **names, "timestamp": timestamp, "type": kind}


def item_event(item: str, **fields) -> dict:
    """Metarank's event of an item's columns."""
    values = [{"name": name, "value": value} for name, value in fields.items()]
    return {"event": "item", "id": item, "item": item, "timestamp": "1599391467000", "fields": values}


def metarank_events(log: list[Request]) -> list[dict]:
    """Rankings and clicks, whose time is that of the request."""
    events = []
    for row in log:
        timestamp = str(1000 * row["time"])
        events.append(ranking(row, timestamp))
        graded = zip(row["candidates"], row["relevance"], strict=True)
        events += [interaction(row, item, timestamp) for item, grade in graded if grade]
    return events


def write_log(folder: Path, form: str, log: list[Request] = LOG, histories=HISTORIES) -> str:
    """The log in a form: `wide.SUFFIX`, `long.SUFFIX`, `behaviors.tsv` or `events.jsonl`, or with `.gz`."""
    path = folder / form
    if form.startswith("wide"):
        return write_table(path, log)
    if form.startswith("long"):
        return write_table(path, long_records(log))
    if form.startswith("behaviors"):
        return write_mind(path, log, histories)
    return write_lines(path, map(json.dumps, metarank_events(log)))


def arguments(requests, **options) -> data.DataArguments:
    """Arguments of the stage; by default the latest quarter tests and the eighth before it validates."""
    split = {"split": "by_time", "valid_fraction": 0.125, "test_fraction": 0.25}
    return data.DataArguments(run_dir="run", requests=str(requests), **{**split, **options})


def run(folder: Path, requests, **options) -> dict:
    """The stage's tables and metrics; rows with original ids, lists of items as words of letters."""
    requests = write_log(folder, "wide.jsonl", requests) if isinstance(requests, list) else requests
    metrics = data.main(arguments(requests, **options), folder)
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("items", "users", "interactions", "rows")}
    items, users = tables["items"]["item_id"].to_pylist(), tables["users"]["user_id"].to_pylist()
    rows = tables["rows"].to_pylist()
    for row in rows:
        row["user_id"] = users[row["user"]]
        for name in ("history", "candidates"):
            row[name] = "".join(items[item] for item in row[name])
    taken = [
        (users[row["user"]], items[row["item"]], row["position"], row["time"], row["split"])
        for row in tables["interactions"].to_pylist()
    ]
    return {"tables": tables, "metrics": metrics, "rows": rows, "interactions": taken}


def write_csv(path: Path, header: str, rows) -> str:
    """A CSV file from its header and rows."""
    return write_lines(path, [header, *(",".join(map(str, row)) for row in rows)])
