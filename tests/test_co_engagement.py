"""What items are taken with, as vectors, and ids that follow it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_semantic_ids import NUM_ITEMS, toy_run

from rerank import run_dir
from rerank.semantic_ids import Tokenizer, assign, main
from rerank.semantic_ids.arguments import SemanticIdsArguments
from rerank.semantic_ids.co_engagement import co_engaged_pairs, co_engagement_vectors
from rerank.semantic_ids.embeddings import load_id_embeddings


def write_data(folder, sequences, splits=None, seen=False):
    """A data stage with these sequences, and what mid-training may see of it."""
    rows = [(user, item, place) for user, items in enumerate(sequences) for place, item in enumerate(items)]
    users, items, positions = zip(*rows, strict=True)
    splits = splits or ["train"] * len(rows)
    table = pa.table({"user": users, "item": items, "position": positions, "split": splits})
    (folder / "data").mkdir(exist_ok=True)
    pq.write_table(table, folder / "data/interactions.parquet")
    run_dir.write_json(folder / "data/metrics.json", {"midtrain_has_seen_rerank_targets": seen})
    return folder / "data"


def test_vectors_are_close_where_company_is_alike(tmp_path):
    # 0 to 3 are taken together, and 4 to 7; 8 alone
    sequences = [[0, 1, 2, 3], [3, 1, 0, 2], [4, 5, 6, 7], [7, 5, 4, 6], [8]]
    found = co_engagement_vectors(write_data(tmp_path, sequences), 9, seed=0)
    alike = found @ found.T
    assert np.linalg.norm(found[:8], axis=1) == pytest.approx(np.ones(8))
    assert (found[8] == 0).all()
    assert alike[:4, :4].min() > 0.2 > 0.05 > np.abs(alike[:4, 4:8]).max()
    assert (co_engagement_vectors(tmp_path / "data", 9, seed=0) == found).all()


@pytest.mark.parametrize(("seen", "wanted"), [(False, [[0, 1]]), (True, [[0, 1], [1, 2]])])
def test_what_the_re_ranker_trains_on_counts_only_where_the_data_stage_says_so(tmp_path, seen, wanted):
    data = write_data(tmp_path, [[0, 1, 2, 3]], ["train", "train", "rerank", "test"], seen)
    assert co_engaged_pairs(data).tolist() == wanted


def test_nothing_taken_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no two items are taken together .* set co_engagement_weight to 0"):
        co_engagement_vectors(write_data(tmp_path, [[0], [1]]), 2, seed=0)
    with pytest.raises(ValueError, match="co_engagement_weight is -1 but must not be negative"):
        SemanticIdsArguments(run_dir="-", encoder="-", co_engagement_weight=-1)


def test_items_taken_together_share_prefixes_and_new_items_still_get_ids(tmp_path):
    given = toy_run(tmp_path)
    kept = {name: getattr(given, name) for name in ("run_dir", "embeddings", "levels", "codebook_size")}
    args = SemanticIdsArguments(**kept, method="residual_k_means", co_engagement_weight=5.0)
    groups = np.arange(NUM_ITEMS).reshape(-1, 10)  # whoever takes one of ten takes the others
    rng = np.random.default_rng(0)
    write_data(tmp_path, [rng.permutation(group).tolist() for group in groups for _ in range(5)])
    out = tmp_path / "out"
    out.mkdir()
    main(args, out)
    tokenizer, saved = Tokenizer.load(out / "tokenizer.npz"), load_id_embeddings(out)
    assert saved.shape[1] == tokenizer.embedding_size == 12 + tokenizer.co_engagement_columns
    assert np.load(out / "embeddings.npy").shape == (NUM_ITEMS, 12)  # of the text alone, for everybody else
    first = np.stack(pq.read_table(out / "semantic_ids.parquet")["codes"].to_numpy())[:, 0].reshape(-1, 10)
    shared = np.mean([len(set(group.tolist())) <= 3 for group in first])
    assert shared == 1.0
    assert assign(tokenizer, np.random.default_rng(1).normal(size=(3, 12))).shape == (3, 2)
    with pytest.raises(ValueError, match="the tokenizer was fitted on 12 columns"):
        assign(tokenizer, np.ones((3, tokenizer.embedding_size)))
