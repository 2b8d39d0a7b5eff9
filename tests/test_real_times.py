"""Times as people have them: text of dates, with an offset from UTC or without."""

import datetime
import json

import pyarrow as pa
import pytest
from real_files import read_interactions, write
from request_logs import LOG, interaction, ranking, run, write_lines

from rerank.rank.tables import read_interactions as read_counted
from rerank.rank.tables import read_times

NOON = 1709294400.0  # 2024-03-01 12:00 UTC
TIMES = {  # text -> seconds after noon
    "2024-03-01T12:00:00": 0,
    "2024-03-01 12:00:00": 0,
    "2024-03-01": -12 * 3600,
    "2024-03-01T12:00:00Z": 0,
    "2024-03-01 12:00:00 Z": 0,
    "2024-03-01 12:00:00 UTC": 0,
    "2024-03-01T12:00:00+02:00": -2 * 3600,
    "2024-03-01T12:00:00.250+0200": -2 * 3600 + 0.25,
    "2024-03-01 12:00:00 +02:00": -2 * 3600,
    "2024-03-01 12:00:00 -0500": 5 * 3600,
    "2024-03-01 12:00:00-05": 5 * 3600,
    "1709294400": 0,
}
SECONDS = [NOON + after for after in TIMES.values()]
ROWS = [{"user": "u", "item": f"i{place}", "time": text} for place, text in enumerate(TIMES)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_offsets_from_utc_are_read_and_dates_without_one_are_utc(name):
    lines = "".join(f"u,{row['item']},{row['time']}\n" for row in ROWS)
    content = {"t.csv": f"user,item,time\n{lines}", "t.jsonl": ROWS, "t.parquet": pa.Table.from_pylist(ROWS)}[name]
    assert [time for _, _, time in read_interactions(name, content)[0]] == SECONDS
    kept, _ = read_interactions(name, where="time > '2024-03-01 12:00:00 +01:00'")
    assert [time for _, _, time in kept] == [time for time in SECONDS if time > NOON - 3600]


def test_refresh_and_rows_to_rank_read_offsets(tmp_path):
    write(tmp_path / "t.jsonl", ROWS)
    assert sorted(read_counted("t.jsonl", {})["time"].to_pylist()) == sorted(SECONDS)
    assert read_times(list(TIMES)).tolist() == SECONDS


def test_requests_and_metaranks_events_read_offsets(tmp_path):
    zones = [datetime.timezone(datetime.timedelta(hours=hours)) for hours in (2, -5)]
    moments = [datetime.datetime.fromtimestamp(row["time"], zones[k % 2]) for k, row in enumerate(LOG)]
    log = [{**row, "time": moment.isoformat()} for row, moment in zip(LOG, moments, strict=True)]
    events = [{**event, "timestamp": log[k]["time"]} for k, event in enumerate(map(ranking, LOG, LOG))]
    wanted = [row["time"] for row in run(tmp_path, LOG)["rows"]]
    assert [row["time"] for row in run(tmp_path, log)["rows"]] == wanted
    path = write_lines(tmp_path / "events.jsonl", map(json.dumps, [*events, interaction(LOG[0], "a", log[0]["time"])]))
    assert [row["time"] for row in run(tmp_path, path)["rows"]] == wanted


def test_a_time_of_day_is_no_time():
    table = pa.table({"user": ["u"], "item": ["a"], "time": [datetime.time(12, 30)]})
    with pytest.raises(ValueError, match="t.parquet row 1: time is '12:30:00', not a number of seconds or a date"):
        read_interactions("t.parquet", table)
