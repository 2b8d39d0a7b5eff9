"""Text tables with a header and without one: no row is lost, and no header becomes a row."""

import pytest
from real_files import read_interactions, read_items, write
from request_logs import arguments, run, write_lines

from rerank import data

WORDS = "alice,matrix,web\nbob,up,app\ncarol,heat,tv\n"
THREE = [("alice", "matrix", None), ("bob", "up", None), ("carol", "heat", None)]
NAMES = ["user", "item", "device"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(message, *args, of=read_interactions, **options):
    """Refused in one line."""
    with pytest.raises(ValueError, match=message) as caught:
        of(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mapped", [{}, {"user": "customer", "item": "film"}], ids=["ours", "mapped"])
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "[t].tsv", "t.dat"])
def test_a_first_line_without_the_columns_wanted_is_no_header(tmp_path, name, mapped):
    text = WORDS.replace(",", "\t") if name.endswith("tsv") else WORDS
    write(tmp_path / name.replace("[t]", "t"), text)
    options = {"columns": mapped, "csv": {"separator": ","} if name == "t.dat" else {}}
    wanted = mapped.get("user", "user")
    cure = r"name its columns in csv: {header: \[user, item, ...\]} if it has no header"
    refused(
        f"has no column '{wanted}' for user; it has alice, matrix, web; correct columns, or {cure}", name, **options
    )
    header = [mapped.get(column, column) for column in NAMES]
    assert read_interactions(name, **{**options, "csv": {**options["csv"], "header": header}})[0] == THREE


def test_items_and_requests_without_a_header_are_refused_and_read_as_advised(tmp_path):
    cure = r"name its columns in items_csv: {header: \[item, title, ...\]} if it has no header"
    refused(
        f"has no column 'item' for item; it has matrix, The Matrix; .*{cure}",
        "i.csv",
        "matrix,The Matrix\nup,Up\n",
        of=read_items,
    )
    found, _ = read_items("i.csv", "matrix,The Matrix\nup,Up\n", items_csv={"header": ["item", "title"]})
    assert found == [("matrix", "The Matrix", ""), ("up", "Up", "")]
    lines = [f"{name},{user},a b c,0 1 0" for name, user in zip("qrstvw", "uvuvuv", strict=True)]
    path = write_lines(tmp_path / "r.csv", lines)
    with pytest.raises(ValueError, match=r"name its columns in requests_csv: {header: \[request, candidates, ...\]}"):
        data.check(arguments(path))
    header = {"header": ["request", "user", "candidates", "relevance"]}
    assert len(run(tmp_path, path, requests_csv=header, split="per_user")["rows"]) == len(lines)


HEADERS = {  # first line -> names that the recipe gives
    "user,item,device": NAMES,
    "User ID,Movie,Device": NAMES,
    "customer,film,device": ["customer", "film", "device"],
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_words_is_no_row_of_a_file_whose_columns_are_named(header):
    names = HEADERS[header]
    columns = {"user": names[0], "item": names[1]}
    first = header.split(",")[0]
    message = f"^t.csv line 1 has '{first}' in the column '{names[0]}': a header; leave header out of csv, .*or remove"
    refused(message, "t.csv", f"{header}\n{WORDS}", columns=columns, csv={"header": names})
    found = dict(zip(("user", "item"), header.split(","), strict=False))
    assert read_interactions("t.csv", columns=found)[0] == THREE


def test_ids_that_begin_as_names_of_columns_are_rows():
    rows = "user_1,item_1,x\nuser_2,item_1,y\n"
    found = read_interactions("t.csv", rows, csv={"header": NAMES})[0]
    assert found == [("user_1", "item_1", None), ("user_2", "item_1", None)]
    found = read_items("i.csv", "東京,Tokyo\n", item_columns={"item": "id"}, items_csv={"header": ["id", "title"]})[0]
    assert found == [("東京", "Tokyo", "")]


def test_a_blank_first_line_is_no_header():
    refused("^t.csv line 1 is blank; remove it", "t.csv", f"\n\nuser,item\n{WORDS}")
    refused("^t.csv line 1 is blank; remove it", "t.csv", f"\n{WORDS}", csv={"header": NAMES})
