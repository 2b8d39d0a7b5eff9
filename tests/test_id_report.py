import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import toy_codes, write_run

from rerank import cli
from rerank.launch import run_dir
from rerank.report import semantic_ids as id_report
from rerank.semantic_ids import SemanticIds, Tokenizer, quality
from rerank.semantic_ids.assignment import ASSIGNED_CODES, assign_codes
from rerank.semantic_ids.co_engagement import co_engaged_pairs
from rerank.semantic_ids.embeddings import load_id_embeddings


@pytest.fixture
def run(tmp_path):
    """A run up to its semantic ids, twelve items on a line: 0 to 3, 10 to 13 and 20 to 23."""
    return write_run(tmp_path, "semantic_ids")


def move(run, item: int, place: float) -> None:
    """Give an item another embedding."""
    embeddings = np.load(run / "semantic_ids/embeddings.npy")
    embeddings[item] = place
    np.save(run / "semantic_ids/embeddings.npy", embeddings)


def test_codes_are_shown_as_the_stage_stored_them(run):
    before = id_report.read_quality(run)
    folder = run / "semantic_ids"
    codes = assign_codes(Tokenizer.load(folder), load_id_embeddings(folder))
    np.save(folder / ASSIGNED_CODES, codes)
    assert id_report.facts(id_report.read_quality(run)) == id_report.facts(before)
    np.save(folder / ASSIGNED_CODES, np.zeros_like(codes))
    assert id_report.read_quality(run).metrics["uniqueness_before"] == 0


def test_items_per_prefix_and_collisions_by_hand():
    codes = np.array([[1, 0], [0, 5], [1, 2], [1, 0], [0, 5], [1, 0]])
    assert [counts.tolist() for counts in quality.items_per_prefix(codes)] == [[4, 2], [3, 2, 1]]
    assert [group.tolist() for group in quality.collisions(codes)] == [[1, 4], [0, 3, 5]]  # in the order of ids


def test_co_engagement_against_chance_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    pairs = np.array([[0, 1], [2, 3], [0, 3]])
    # first items: 0 twice, 2 once; second: 1 once, 3 twice. Shuffled, prefix 0 with 0: 2/3 * 1/3; 1 with 1: 1/3 * 2/3,
    # together 4/9; no item meets itself. Two of three pairs share: (2/3) / (4/9) = 1.5. No two items share both codes.
    assert quality.prefix_lift(codes, pairs) == pytest.approx([1.5, None])


def test_pairs_are_neighbours_of_one_user_in_training(run):
    users, items = [0, 0, 0, 0, 1, 1], [3, 4, 4, 5, 6, 7]
    rows = {"user": users, "item": items, "position": [0, 1, 2, 3, 0, 1], "split": [*["train"] * 5, "test"]}
    pq.write_table(pa.table(rows).take([5, 3, 1, 0, 2, 4]), run / "data/interactions.parquet")
    assert co_engaged_pairs(run / "data").tolist() == [[3, 4], [4, 5]]  # 4 after 4 is no pair, 7 is held out


def test_a_good_run_passes_the_bar_and_gets_a_page(run, capsys):
    assert cli.main(["ids", str(run), "--min-uniqueness", "1.0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"items with an id of their own, as assigned +1\.0000", out)
    assert re.search(r"reconstruction error, as stored +0\b", out)
    # level 1 uses 3 of 4 codes equally, four items each; users walk in a circle, so neighbours share it
    assert re.search(r"1 +75\.0% +3\.0 +3 +4\.00 +4 +[1-9]\.\d ×", out)
    page = (run / "ids.html").read_text()
    charts = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)[1])
    assert page.count('class="chart"') == len(charts) == 3
    assert charts[0]["data"][0]["y"] == [4, 4, 4, 0]


def test_colliding_items_are_named_and_fail_the_bar(run, capsys):
    # to where item 5 is, to where item 9 is, to the code of item 9, to the code of item 11
    for item, place in ((0, 11.0), (3, 21.0), (8, 21.2), (10, 22.8)):
        move(run, item, place)
    assert cli.main(["ids", str(run), "--min-uniqueness", "0.99"]) == 1
    out, error = capsys.readouterr()
    # seven of twelve items share; of the eight whose embedding nobody shares, three do
    assert re.search(r"as assigned +0\.4167", out) and re.search(r"embedding of their own +0\.6250", out)
    assert "<s_b_1> (one embedding: no rule can part them): <script>alert(1)</script> | Title 5" in out
    assert "<s_a_2><s_b_1> (2 of one embedding: no rule can part them): Title 3 | Title 8 | Title 9" in out
    assert "<s_a_2><s_b_3>: Title 10 | Title 11" in out
    assert error == "rerank: uniqueness 0.4167 is below 0.99\n"
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | Title 5" in (run / "ids.html").read_text()
    assert cli.main(["ids", str(run)]) == 0  # without a bar it only reports


def test_ids_that_collide_in_the_stored_table_fail_the_bar_too(run, capsys):
    codes = toy_codes()
    codes[1] = codes[0]
    SemanticIds(codes, codebook_size=4).save(run / "semantic_ids")
    assert cli.main(["ids", str(run), "--min-uniqueness", "0.99"]) == 1
    assert "1 ids are shared in the stored table; run the semantic_ids stage again" in capsys.readouterr().out


def test_new_items_get_ids_as_the_readme_shows(run):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = [block for block in blocks if "import Tokenizer, assign" in block]
    names = {"embeddings": np.array([[1.0]])}
    exec(code.replace("runs/ml100k", str(run)), names)
    # 1.0 is nearest (0, 1), but prefixes 0 to 2 are full: it goes to prefix 3, at 30, and there nearest to 0
    assert names["codes"].tolist() == [[3, 0]]


def test_an_unfinished_stage_and_parts_of_another_one_are_refused(run, capsys):
    np.save(run / "semantic_ids/embeddings.npy", np.zeros((3, 1), dtype=np.float32))
    with pytest.raises(ValueError, match="ids of 12 items and 2 levels, but embeddings of 3 items and a tokenizer of"):
        id_report.read_quality(run)
    (run_dir.stage_dir(run, "semantic_ids") / "stage.json").unlink()
    assert cli.main(["ids", str(run)]) == 2
    assert "not finished; run the semantic_ids stage first" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_leaves_no_traceback(run):
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "rerank.cli", "ids", str(run)]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
