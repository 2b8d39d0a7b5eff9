"""Semantic ids that extend another run's: old ones bit for bit, new ones by its tokenizer, and what is refused."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_ids import NUM_ITEMS, clustered_embeddings
from toy_run import finish, write_interactions, write_items

from rerank import semantic_ids
from rerank.launch import run_dir
from rerank.semantic_ids import assign, check, extension, load_semantic_ids
from rerank.semantic_ids.arguments import SemanticIdsArguments

FIRST = 48  # items of the old run, the first of clustered_embeddings
OPTIONS = {"levels": 2, "codebook_size": 8, "method": "residual_k_means"}


def write_data(run, items, sequences=()):
    ids = [f"film{item}" for item in items]
    write_items(run / "data", len(items), item_id=ids, text=[f"Film {item}" for item in items])
    if len(sequences):
        write_interactions(run / "data", dict(enumerate(sequences)))
    else:
        finish(run / "data")
    np.save(run / "embeddings.npy", clustered_embeddings()[items])


def make_ids(run, **options):
    """Run the stage and finish its folder."""
    given = {**OPTIONS, "embeddings": str(run / "embeddings.npy"), **options}
    args = SemanticIdsArguments(run_dir=str(run), **given)
    check(args)
    folder = run_dir.partial_dir(run, "semantic_ids")
    folder.mkdir()
    metrics = semantic_ids.main(args, folder)
    run_dir.finish(run, "semantic_ids", given, vars(args), (), metrics)
    return metrics


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    run = tmp_path_factory.mktemp("old") / "run"
    write_data(run, range(FIRST))
    make_ids(run)
    return run


@pytest.fixture
def new(tmp_path):
    """The data of another day: film3 is gone, twelve films are new, and stand first."""
    run = tmp_path / "run"
    items = [*range(FIRST, NUM_ITEMS), *(item for item in range(FIRST) if item != 3)]
    write_data(run, items)
    return run


def test_old_items_keep_their_ids_bit_for_bit_and_new_ones_get_others(old, new, caplog):
    caplog.set_level("INFO")
    metrics = make_ids(new, extends=str(old))
    before, after = load_semantic_ids(old / "semantic_ids").codes, load_semantic_ids(new / "semantic_ids")
    kept = [item for item in range(FIRST) if item != 3]
    assert np.array_equal(after.codes[NUM_ITEMS - FIRST :], before[kept]) and after.codebook_size == 8
    every = np.concatenate([before, after.codes[: NUM_ITEMS - FIRST]])  # the id of film3 stays its own
    assert len(np.unique(every, axis=0)) == NUM_ITEMS
    tokenizer = (old / "semantic_ids/tokenizer.npz", new / "semantic_ids/tokenizer.npz")
    assert all(np.array_equal(*pair) for pair in zip(*(np.load(path).values() for path in tokenizer), strict=True))
    vectors = np.load(new / "embeddings.npy")[: NUM_ITEMS - FIRST]
    alone = assign(semantic_ids.Tokenizer.load(old / "semantic_ids"), vectors, before)
    assert np.array_equal(after.codes[: NUM_ITEMS - FIRST], alone)  # as the call in the README does
    assert metrics["num_new"] == NUM_ITEMS - FIRST and metrics["num_gone"] == 1 and metrics["num_items"] == 59
    assert "ids of 12 new items: 0% under a first-level prefix that no item of training has" in caplog.text
    third = shutil.copytree(new, new.with_name("third"))
    shutil.rmtree(third / "semantic_ids")
    make_ids(third, extends=str(new))  # nothing is new
    assert np.array_equal(load_semantic_ids(third / "semantic_ids").codes, after.codes)


def test_shares_of_unseen_prefixes_and_codes_by_hand():
    trained = np.array([[0, 0], [0, 1], [1, 2]])
    new = np.array([[0, 2], [2, 1], [1, 3], [1, 0]])
    assert extension.unseen_shares(new, trained) == (0.25, 0.5)  # 2 is no first code; 3 no second one
    assert "25% under a first-level prefix" in extension.unseen_words(new, trained)


def test_old_co_engagement_stays_and_new_items_have_none(tmp_path):
    walks = np.random.default_rng(0).integers(FIRST, size=(30, 8)).tolist()
    old, new = tmp_path / "old", tmp_path / "new"
    write_data(old, range(FIRST), walks)
    make_ids(old, co_engagement_weight=1.0)
    write_data(new, range(NUM_ITEMS), walks)
    make_ids(new, co_engagement_weight=1.0, extends=str(old))
    vectors = [np.load(run / "semantic_ids/id_embeddings.npy") for run in (old, new)]
    assert np.array_equal(vectors[1][:FIRST], vectors[0])
    width = np.load(old / "semantic_ids/embeddings.npy").shape[1]
    assert not vectors[1][FIRST:, width:].any() and vectors[1].shape == (NUM_ITEMS, vectors[0].shape[1])
    codes = [load_semantic_ids(run / "semantic_ids").codes for run in (old, new)]
    assert np.array_equal(codes[1][:FIRST], codes[0])


def with_encoder(run, content):
    """The run's record as if an encoder had made its ids; the encoder's folder."""
    encoder = run.parent / content
    encoder.mkdir(exist_ok=True)
    (encoder / "modules.json").write_text(content)
    record = json.loads((run / "semantic_ids/stage.json").read_text())
    given = {**OPTIONS, "encoder": str(encoder)}
    files = [vars(one) for one in run_dir.named_files.record([run_dir.NamedFile("encoder", str(encoder))])]
    (run / "semantic_ids/stage.json").write_text(json.dumps({**record, "given": given, "files": files}))
    return encoder


def test_another_encoder_is_refused_and_the_same_one_elsewhere_is_not(old, new, tmp_path):
    run = shutil.copytree(old, tmp_path / "old")
    encoder = with_encoder(run, "minilm")
    args = {**OPTIONS, "run_dir": str(new), "extends": str(run)}
    check(SemanticIdsArguments(**args, encoder=str(encoder)))
    moved = shutil.copytree(encoder, tmp_path / "moved")
    check(SemanticIdsArguments(**args, encoder=str(moved)))
    (moved / "modules.json").write_text("others")
    message = "encoder is .*moved but .* was made with .*minilm, or its files differ; give that encoder, or leave ext"
    with pytest.raises(ValueError, match=message):
        check(SemanticIdsArguments(**args, encoder=str(moved)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"extends": "nowhere"},
            "extends is nowhere, which has no finished data stage; give the folder of another run",
        ),
        ({"extends": "NEW"}, "which has no finished semantic_ids stage"),
        (
            {"codebook_size": 16},
            "codebook_size is 16 but 8 in .*, whose tokenizer is kept; leave it out, or leave ext",
        ),
        ({"seed": 7}, "seed is 7 but 0 in"),
    ],
)
def test_a_run_that_cannot_be_extended_is_refused_by_the_dry_run(old, new, options, message):
    options = {"extends": str(old), **options}
    options["extends"] = options["extends"].replace("NEW", str(new))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(
            SemanticIdsArguments(run_dir=str(new), **{**OPTIONS, "embeddings": str(new / "embeddings.npy"), **options})
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors: vectors[:, ::-1], "embeddings of 47 items that .* has too are others there .median cosine"),
        (lambda vectors: vectors[:, :5], "has 5 columns but .* 12; give those of the encoder that"),
    ],
)
def test_embeddings_of_another_encoder_are_refused(old, new, change, message):
    np.save(new / "embeddings.npy", change(np.load(new / "embeddings.npy")))
    args = SemanticIdsArguments(run_dir=str(new), **OPTIONS, embeddings=str(new / "embeddings.npy"), extends=str(old))
    with pytest.raises(ValueError, match=message):
        check(args)


def test_runs_without_a_common_item_are_refused(old, tmp_path):
    write_data(tmp_path / "run", range(FIRST, NUM_ITEMS))
    args = {**OPTIONS, "embeddings": str(tmp_path / "run/embeddings.npy"), "extends": str(old)}
    with pytest.raises(ValueError, match="which has none of the 12 items; give another run"):
        check(SemanticIdsArguments(run_dir=str(tmp_path / "run"), **args))
    assert pq.read_table(old / "semantic_ids/semantic_ids.parquet").num_rows == FIRST
