"""Items of similar texts: exact in blocks, by a graph beyond, stored once."""

import logging

import numpy as np
import pytest

from rerank.losses import _similar
from rerank.losses._similar import semantic_neighbours, similar_items, stored_neighbours


@pytest.mark.parametrize("at_once", [1, 500, 2**22])
@pytest.mark.parametrize("seed", range(3))
def test_semantic_neighbours_are_those_of_the_full_matrix(seed, at_once, monkeypatch):
    monkeypatch.setattr(_similar, "SIMILARITIES_AT_ONCE", at_once)
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((70, 19)).astype(np.float32)
    embeddings[rng.integers(0, 70, 30)] = embeddings[rng.integers(0, 5, 30)]  # up to seven or so of one kind
    rows = [(row / np.linalg.norm(row)).tolist() for row in embeddings.astype(np.float64)]
    cosines = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    wanted = [sorted(set(range(70)) - {i}, key=lambda j, own=own: (-own[j], j)) for i, own in enumerate(cosines)]
    for number in (1, 9, 69):
        assert semantic_neighbours(embeddings, number).tolist() == [row[:number] for row in wanted]


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_an_embedding_without_a_direction_is_refused(value):
    embeddings = np.ones((4, 3), dtype=np.float32)
    embeddings[2] = value
    with pytest.raises(ValueError, match="the embedding in row 2 is zero or not finite; embed that item again"):
        semantic_neighbours(embeddings, 2)


def test_a_graph_finds_nearly_all_with_copies_in_order_and_states_its_recall(monkeypatch):
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((1500, 24)).astype(np.float32)
    embeddings[1000:] = 2 * embeddings[rng.integers(0, 40, 500)]  # about twelve copies of forty, of another length
    exact = semantic_neighbours(embeddings, 10)
    assert similar_items(embeddings, 10)[1] == 1.0 and (similar_items(embeddings, 10)[0] == exact).all()
    monkeypatch.setattr(_similar, "MOST_EXACT", 1000)
    found, recall = similar_items(embeddings, 10)
    assert not (found == np.arange(1500)[:, None]).any()
    assert (found[1000:] == exact[1000:]).mean() > 0.999  # copies come first, the lower item before
    assert recall > 0.99 and (found == exact).mean() == pytest.approx(recall, abs=0.01)
    monkeypatch.setattr(_similar, "EF_SEARCH", 1)  # the share that is stated falls with what is found
    monkeypatch.setattr(_similar, "EF_CONSTRUCTION", 4)
    found, recall = similar_items(embeddings, 10)
    assert 0.1 < recall < 0.98 and (found[:1000] == exact[:1000]).mean() < 0.98


def test_fewer_different_embeddings_than_neighbours_are_enough(monkeypatch):
    embeddings = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    monkeypatch.setattr(_similar, "MOST_EXACT", 4)
    found, recall = similar_items(embeddings, 10)
    assert recall == 1.0 and (found == semantic_neighbours(embeddings, 10)).all()


def test_similar_items_are_mined_once_for_the_embeddings_of_a_folder(tmp_path, monkeypatch, caplog):
    rng, calls = np.random.default_rng(0), []

    def mine(*arguments):
        calls.append(arguments)
        return similar_items(*arguments)

    monkeypatch.setattr(_similar, "similar_items", mine)
    caplog.set_level(logging.INFO)
    np.save(tmp_path / "embeddings.npy", rng.standard_normal((30, 4)))
    first, second = stored_neighbours(tmp_path, 6), stored_neighbours(tmp_path, 6)
    assert len(calls) == 1 and (first == second).all() and first.dtype == np.int64
    assert "similar items: 6 of each of 30, exact, in" in caplog.text
    np.save(tmp_path / "embeddings.npy", rng.standard_normal((30, 4)))
    assert (stored_neighbours(tmp_path, 6) != first).any() and len(calls) == 2
    assert stored_neighbours(tmp_path, 3).shape == (30, 3) and len(calls) == 3
    monkeypatch.setattr(_similar, "MOST_EXACT", 10)
    stored_neighbours(tmp_path, 4)
    assert "similar items: 4 of each of 30, by HNSW, with a recall of" in caplog.text
