"""Data sets that `datasets` finds, whose JSON is read as other JSON is: no type is guessed."""

import gzip
import json

import pytest
from real_files import read_interactions, write

LONG = 12345678901234567890
IDS = ["3F2504E0-4F89-41D3-9A0C-0305E82C3301", "007", "2024-03-01", "12:30", str(LONG), LONG + 1, 7]
ROWS = [{"user": LONG + place, "item": item, "time": place} for place, item in enumerate(IDS)]
WANTED = [(str(LONG + place), str(item), float(place)) for place, item in enumerate(IDS)]
FORMS = {  # files of a data set -> their text
    "set/data.jsonl": "".join(f"{json.dumps(row)}\n" for row in ROWS),
    "set/data.json": json.dumps(ROWS),
    "set/data.jsonl.gz": gzip.compress("".join(f"{json.dumps(row)}\n" for row in ROWS).encode()),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(message, name):
    with pytest.raises(ValueError, match=message) as caught:
        read_interactions(name, format="datasets")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", FORMS)
def test_json_in_a_data_set_is_not_typed_anew(tmp_path, file):
    (tmp_path / "set").mkdir()
    text = FORMS[file]
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_interactions("set", format="datasets")[0] == WANTED


def test_a_folder_of_json_parts_is_read_by_its_splits(tmp_path):
    write(tmp_path / "set/train-0.json", ROWS[:4])
    write(tmp_path / "set/train-1.json", ROWS[4:])
    write(tmp_path / "set/test.json", ROWS[:2])
    refused("set, which has the splits train, test; name one, as set@SPLIT", "set")
    assert read_interactions("set@train", format="datasets")[0] == WANTED
    assert read_interactions("set@test", format="datasets")[0] == WANTED[:2]
    assert read_interactions("set/train*.json")[0] == WANTED
    write(tmp_path / "set/train-1.json", json.dumps(ROWS[4:]))
    refused(
        "set@train, of several .json files of which .*set/train-1.json is one array or object; write each as JSONL",
        "set@train",
    )


def test_separators_are_not_for_data_sets(tmp_path):
    write(tmp_path / "set/data.jsonl", ROWS)
    with pytest.raises(ValueError, match="csv is .* but set is read as datasets; remove it"):
        read_interactions("set", format="datasets", csv={"separator": ";"})
