"""Rows, lists, counts and facts of MovieLens-100K are, to the last bit, those of commit aacb4c7.

That commit made each table at once, and its rows held their histories. Embeddings, which a network makes, are left out
here; the weights of the regression come from an inverse, whose last digits differ between machines, so that the means
of fit_history and fit_recent are held to nine digits.
"""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_run import finish

from rerank import candidates, data
from rerank.launch import recipe

ROWS, LISTS = ("row_id", "list_number", "user", "target"), ("candidates", "relevance", "first_stage_ranks")
MATRICES, PARTS = ("transitions", "successors", "near"), ("data", "indices", "indptr")
# Of each table: rows, lists, scores and facts; then the two means.
TABLES = {
    "train": "57be8484d3d02f63 b887098a2e3e29ca 560ca538044222d1 a46d3dc1512bddac",
    "valid": "086c604efdea9292 0adef60fad7f96c2 0ef020a48d603534 b9e4734814b697d3",
    "test": "eb05b34b8b4b2848 fcde71139f5a2952 7872fb29fa028c31 c071eb084cbd67ce",
}
MEANS = {
    "train": {"fit_history": 0.2307732807737565, "fit_recent": 0.06838627812637464},
    "valid": {"fit_history": 0.2385972548063843, "fit_recent": 0.06975761214592435},
    "test": {"fit_history": 0.2469916218385738, "fit_recent": 0.06903418947950593},
}
COUNTS, POPULARITY = "27e8445a0c056928", "e9bf7e100e3ea99a"


def digest(*arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def flat(table, name):
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the stage candidates, by the keys of the recipe, without semantic ids."""
    run = tmp_path_factory.mktemp("movielens")
    for file, stage, arguments in (
        ("1_data", data, data.DataArguments),
        ("4_candidates", candidates, candidates.CandidatesArguments),
    ):
        keys = recipe.load(f"recipes/ml100k/{file}.yaml") | {"run_dir": str(run)}
        folder = run / file.split("_")[1]
        folder.mkdir()
        finish(folder, stage.main(arguments(**keys), folder))
    return run / "candidates"


@pytest.mark.parametrize("name", TABLES)
def test_rows_lists_and_facts(made, name):
    table, names = pq.read_table(made / f"{name}.parquet"), json.loads((made / "features.json").read_text())["names"]
    facts = np.array([values for row in table["features"].to_pylist() for values in row], dtype=np.float32)
    exact = [place for place, fact in enumerate(names) if not fact.startswith("fit_")]
    found = [
        digest(*(table[column].to_numpy() for column in ROWS)),
        digest(*(flat(table, column).astype(np.int64) for column in LISTS)),
        digest(flat(table, "first_stage_scores")),
        digest(facts[:, exact]),
    ]
    assert " ".join(found) == TABLES[name]
    means = {fact: facts[:, names.index(fact)].mean(dtype=float) for fact in MEANS[name]}
    assert means == pytest.approx(MEANS[name], rel=1e-9)


def test_counts(made):
    with np.load(made / "evidence.npz") as arrays:
        parts = [arrays[f"{name}_{part}"].astype(np.int64) for name in MATRICES for part in PARTS]
        assert digest(*parts) == COUNTS and digest(arrays["popularity"]) == POPULARITY
