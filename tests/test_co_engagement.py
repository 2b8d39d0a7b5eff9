"""Co-engagement of items as vectors, and ids that follow it."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_ids import NUM_ITEMS, ids_arguments, run_ids
from toy_run import write_interactions

from rerank.semantic_ids import Tokenizer, assign, check
from rerank.semantic_ids.co_engagement import co_engaged_pairs, co_engagement_vectors
from rerank.semantic_ids.embeddings import load_id_embeddings


def test_vectors_are_close_where_company_is_alike(tmp_path):
    # 0 to 3 are taken together, and 4 to 7; 8 alone
    sequences = [[0, 1, 2, 3], [3, 1, 0, 2], [4, 5, 6, 7], [7, 5, 4, 6], [8]]
    write_interactions(tmp_path / "data", dict(enumerate(sequences)))
    found = co_engagement_vectors(tmp_path / "data", 9, seed=0)
    alike = found @ found.T
    assert np.linalg.norm(found[:8], axis=1) == pytest.approx(np.ones(8))
    assert (found[8] == 0).all()
    assert alike[:4, :4].min() > 0.2 > 0.05 > np.abs(alike[:4, 4:8]).max()
    assert (co_engagement_vectors(tmp_path / "data", 9, seed=0) == found).all()


@pytest.mark.parametrize(("seen", "wanted"), [(False, [[0, 1]]), (True, [[0, 1], [1, 2]])])
def test_interactions_that_train_the_re_ranker_count_only_where_the_data_stage_says_so(tmp_path, seen, wanted):
    write_interactions(tmp_path / "data", {0: [0, 1, 2, 3]}, ["train", "train", "rerank", "test"], seen)
    assert co_engaged_pairs(tmp_path / "data").tolist() == wanted


def test_items_that_are_never_taken_together_are_refused(tmp_path):
    write_interactions(tmp_path / "data", {0: [0], 1: [1]})
    with pytest.raises(ValueError, match="no two items are taken together .* set co_engagement_weight to 0"):
        co_engagement_vectors(tmp_path / "data", 2, seed=0)


@pytest.mark.parametrize("option", ["contrastive_weight", "co_engagement_weight"])
def test_an_option_that_needs_co_engaged_items_is_refused_without_them(tmp_path, option):
    problem = f"{option} is 1.0 but no user has two different training items in a row; set"
    with pytest.raises(ValueError, match=problem):
        check(ids_arguments(tmp_path, sequences=[[3]], **{option: 1.0}))


def test_items_taken_together_share_prefixes_and_new_items_still_get_ids(tmp_path):
    groups = np.arange(NUM_ITEMS).reshape(-1, 10)  # whoever takes one of ten takes the others
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(group).tolist() for group in groups for _ in range(5)]
    out, _ = run_ids(tmp_path, sequences=sequences, method="residual_k_means", co_engagement_weight=5.0)
    tokenizer, saved = Tokenizer.load(out / "tokenizer.npz"), load_id_embeddings(out)
    assert saved.shape[1] == tokenizer.embedding_size == 12 + tokenizer.co_engagement_columns
    assert np.load(out / "embeddings.npy").shape == (NUM_ITEMS, 12)  # of the text alone, for other stages
    first = np.stack(pq.read_table(out / "semantic_ids.parquet")["codes"].to_numpy())[:, 0].reshape(-1, 10)
    assert all(len(set(group.tolist())) <= 3 for group in first)
    assert assign(tokenizer, np.random.default_rng(1).normal(size=(3, 12))).shape == (3, 2)
    with pytest.raises(ValueError, match="the tokenizer was fitted on 12 columns"):
        assign(tokenizer, np.ones((3, tokenizer.embedding_size)))
