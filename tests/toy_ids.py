"""Sixty items with embeddings in six groups, and runs of the semantic_ids stage on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from toy_run import finish, write_interactions, write_items

from rerank.launch import run_dir
from rerank.semantic_ids import check, main
from rerank.semantic_ids.arguments import SemanticIdsArguments

NUM_ITEMS = 60


def clustered_embeddings(num_items: int = NUM_ITEMS) -> np.ndarray:
    """Six groups of items, the items of a group close to each other."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 12))
    return (centres[np.arange(num_items) % 6] + 0.2 * rng.normal(size=(num_items, 12))).astype(np.float32)


def ids_arguments(
    folder: Path, embeddings: np.ndarray | None = None, sequences: Sequence[Sequence[int]] = (), **options
) -> SemanticIdsArguments:
    """Arguments of the stage for a run whose data stage is finished, embeddings beside it."""
    data = run_dir.stage_dir(folder, "data")
    texts = [f"Film {item}" for item in range(NUM_ITEMS)]
    write_items(data, NUM_ITEMS, item_id=[f"film{item}" for item in range(NUM_ITEMS)], text=texts)
    if sequences:
        write_interactions(data, dict(enumerate(sequences)))
    else:
        finish(data)
    np.save(folder / "embeddings.npy", clustered_embeddings() if embeddings is None else embeddings)
    options = {"levels": 2, "codebook_size": 8, **options}
    if options.get("method", "rq_vae") == "rq_vae":
        options = {"latent_size": 4, "hidden_size": 16, "epochs": 5, **options}
    if "encoder" not in options:
        options["embeddings"] = str(folder / "embeddings.npy")
    return SemanticIdsArguments(run_dir=str(folder), **options)


def run_ids(folder: Path, **options) -> tuple[Path, dict]:
    """The stage's folder and metrics for a run in a new folder."""
    out_dir = folder / "out"
    out_dir.mkdir(parents=True)
    args = ids_arguments(folder, **options)
    check(args)
    return out_dir, main(args, out_dir)


def write_encoder(folder: Path) -> np.ndarray:
    """Save a sentence encoder that knows the numbers of items; its vectors, of unknown words and of each number."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = FastTokenizer(WordLevel({"[UNK]": 0, **{str(k): k + 1 for k in range(NUM_ITEMS)}}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).normal(size=(NUM_ITEMS + 1, 12)).astype(np.float32)
    module = StaticEmbedding(words, embedding_weights=weights)
    SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return weights
