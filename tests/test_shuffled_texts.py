"""The control whose items bear other items' texts: on item lines, and in every fact computed from texts."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_run import NUM_CANDIDATES, NUM_ITEMS, toy_sequences, write_candidates

from rerank.baselines import FEATURES, TEXT_FEATURES, Counts, ItemFacts, feature_rows, text_features
from rerank.catalogue import Catalogue
from rerank.launch.files import write_json
from rerank.prompts import PromptSettings
from rerank.results.shuffled_texts import ShuffledTexts, other_items, shows_texts
from rerank.rows import RankingRow

TITLES = [f"{'red' if item % 2 else 'blue'} thing {item}" for item in range(NUM_ITEMS)]
CATEGORIES = [f"kind {item % 3}, of {item % 5}" for item in range(NUM_ITEMS)]
BRANDS = [("", "acme", "bolt")[item % 3] for item in range(NUM_ITEMS)]
EMBEDDINGS = np.random.default_rng(0).normal(size=(NUM_ITEMS, 5)).astype(np.float32)


def counts_with_texts_of(items) -> Counts:
    """Counts of the toy's sequences in a catalogue whose item k has the text of items[k]."""
    texts = [[of[item] for item in items] for of in (CATEGORIES, TITLES, BRANDS)]
    return Counts.fit(toy_sequences(), NUM_ITEMS, ItemFacts.of(NUM_ITEMS, EMBEDDINGS[list(items)], *texts))


def rows_by(counts: Counts) -> list[RankingRow]:
    histories = [sequence[:5] for sequence in toy_sequences().values()]
    candidates, scores = counts.top_rows(histories, NUM_CANDIDATES)
    features = feature_rows(counts, histories, candidates, scores, None)
    return [
        RankingRow(number, tuple(history.tolist()), tuple(of.tolist()), features=of_row)
        for number, (history, of, of_row) in enumerate(zip(histories, candidates, features, strict=True))
    ]


@pytest.fixture(scope="module")
def candidates_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "candidates"
    write_candidates(folder, edges={})
    counts_with_texts_of(range(NUM_ITEMS)).save(folder / "evidence.npz")
    return folder


def test_each_item_bears_the_text_of_another_one_and_each_text_has_one_item():
    for num_items in (2, 3, NUM_ITEMS, 100):
        others = other_items(num_items)
        assert sorted(others) == list(range(num_items)) and all(others != np.arange(num_items))


def test_text_facts_are_those_of_a_catalogue_with_shuffled_texts_and_all_others_stay(candidates_dir):
    rows = rows_by(counts_with_texts_of(range(NUM_ITEMS)))
    found = ShuffledTexts.of(candidates_dir, rows)
    expected = rows_by(counts_with_texts_of(found.sources.tolist()))
    is_text = np.array([name in TEXT_FEATURES for name in FEATURES])
    for row, shuffled, other in zip(rows, found.rows, expected, strict=True):
        assert shuffled == row  # but for the features, which equality leaves out
        np.testing.assert_array_equal(shuffled.features, other.features)
        np.testing.assert_array_equal(shuffled.features[:, ~is_text], row.features[:, ~is_text])
    changed = np.stack([row.features != of.features for row, of in zip(rows, found.rows, strict=True)])
    assert changed[:, :, is_text].any(axis=(0, 1)).all()  # each of the facts for some candidate


def test_text_features_are_the_part_of_feature_rows(candidates_dir):
    counts = counts_with_texts_of(range(NUM_ITEMS))
    rows = rows_by(counts)
    histories, candidates = [np.array(row.history) for row in rows], np.array([row.candidates for row in rows])
    columns = [FEATURES.index(name) for name in TEXT_FEATURES]
    whole = np.stack([row.features for row in rows])
    np.testing.assert_array_equal(text_features(counts.facts, histories, candidates), whole[:, :, columns])


def test_text_facts_that_a_run_does_not_have_are_left_out(candidates_dir, tmp_path):
    folder = Path(shutil.copytree(candidates_dir, tmp_path / "candidates"))
    kept = [number for number, name in enumerate(FEATURES) if not name.startswith("cosine")]
    write_json(folder / "features.json", {"names": [FEATURES[number] for number in kept], "edges": {}})
    rows = rows_by(counts_with_texts_of(range(NUM_ITEMS)))
    fewer = [replace(row, features=row.features[:, kept]) for row in rows]
    found, whole = ShuffledTexts.of(folder, fewer).rows, ShuffledTexts.of(candidates_dir, rows).rows
    for row, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(row.features, other.features[:, kept])


def test_rows_without_features_are_left_as_they_are(candidates_dir):
    rows = [RankingRow(0, (1, 2), (3, 4))]
    assert ShuffledTexts.of(candidates_dir, rows).rows == rows


def test_a_catalogue_keeps_its_ids_and_has_other_texts(candidates_dir):
    catalogue = Catalogue([f"m{k}" for k in range(NUM_ITEMS)], [f"<s_a_{k}>" for k in range(NUM_ITEMS)],
                          TITLES, CATEGORIES)  # fmt: skip
    found = ShuffledTexts.of(candidates_dir, [])
    other = found.catalogue(catalogue)
    assert (other.item_ids, other.semantic_ids) == (catalogue.item_ids, catalogue.semantic_ids)
    for item, source in enumerate(found.sources):
        assert other.titles[item] == TITLES[source] != TITLES[item]
        assert other.categories[item] == CATEGORIES[source]


def test_prompts_show_texts_by_a_field_or_a_fact():
    assert shows_texts(PromptSettings())
    bare = {"item_fields": ["semantic_id"]}
    assert shows_texts(PromptSettings(item_fields=["semantic_id", "category"]))
    assert not shows_texts(PromptSettings(**bare)) and not shows_texts(
        PromptSettings(**bare, evidence="codes", evidence_names=["popularity"])
    )
    assert shows_texts(PromptSettings(**bare, evidence="codes", evidence_names=["popularity", "cosine_last"]))
    assert not shows_texts(PromptSettings(**bare, evidence_names=["cosine_last"]))  # facts are not shown at all
