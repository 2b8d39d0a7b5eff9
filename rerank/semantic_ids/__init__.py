"""Stage: give every item a short unique semantic id.

In: data/items.parquet, and a sentence encoder or given embeddings. Out: semantic_ids.parquet (item, codes,
semantic_id), assigned_codes.npy (items, levels: the codes before collisions were resolved), embeddings.npy (float32,
length one, row = item), and tokenizer.npz, with which new items get ids without refitting. With co_engagement_weight
also id_embeddings.npy, the embeddings with what items are taken with beside them.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.semantic_ids \
        --config recipes/ml100k/2_semantic_ids.yaml

Source: RQ-VAE as in GR2 (arXiv:2602.07774) section 2.3; each of its techniques is an option, and by default only
k-means initialisation and EMA codebooks are on. Beside it, residual k-means and balanced last levels.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir
from rerank.semantic_ids import quality
from rerank.semantic_ids.arguments import SemanticIdsArguments
from rerank.semantic_ids.assignment import ASSIGNED_CODES, assign, assign_codes
from rerank.semantic_ids.co_engagement import co_engaged_pairs, co_engagement_vectors
from rerank.semantic_ids.collisions import check_room, resolve_collisions
from rerank.semantic_ids.embeddings import (
    ID_EMBEDDINGS,
    check_embeddings,
    encode,
    find_encoder,
    read_embeddings,
    save_normalised,
    save_with_co_engagement,
)
from rerank.semantic_ids.id_tokens import (
    SemanticIds,
    load_semantic_ids,
    semantic_id_text,
    token_ids,
    token_sequences,
    tokens,
)
from rerank.semantic_ids.tokenizer import Latents, Tokenizer

__all__ = [
    "SemanticIds",
    "Tokenizer",
    "assign",
    "load_semantic_ids",
    "semantic_id_text",
    "token_ids",
    "token_sequences",
    "tokens",
]

logger = logging.getLogger(__name__)

INPUTS = ("data",)


ARGUMENTS = (SemanticIdsArguments,)


def check(args: SemanticIdsArguments) -> None:
    """Refuse what can be seen before anything is fitted.

    Raises:
        FileNotFoundError: When the encoder or the embeddings are not there.
        ValueError: When they do not fit the catalogue, or the ids' size does not.
    """
    if args.encoder is not None:
        find_encoder(args.encoder)
    elif not Path(args.embeddings).is_file():
        raise FileNotFoundError(f"embeddings {args.embeddings} does not exist; give a .npy or .parquet file")
    if run_dir.is_finished(args.run_dir, "data"):
        item_ids, _ = _read_items(args.run_dir)
        check_size(len(item_ids), args.levels, args.codebook_size)
        for name in ("contrastive_weight", "co_engagement_weight"):
            if getattr(args, name):
                _pairs(args, name)
        if args.embeddings is not None:
            check_embeddings(read_embeddings(args.embeddings, item_ids), item_ids, args.embeddings)


def check_size(num_items: int, levels: int, codebook_size: int) -> None:
    """Refuse codebooks larger than the catalogue, and catalogues larger than the number of ids.

    Raises:
        ValueError: Naming a size that fits.
    """
    if num_items < codebook_size:
        fitting = 1 << (num_items.bit_length() - 1) if num_items else 1
        raise ValueError(
            f"codebook_size is {codebook_size} but there are only {num_items} items; use {fitting} or less"
        )
    check_room(num_items, levels, codebook_size)


def main(args: SemanticIdsArguments, out_dir: Path) -> dict[str, Any]:
    """Embed, fit, assign, resolve, save; the metrics say how good the ids are."""
    started = time.monotonic()
    item_ids, texts = _read_items(args.run_dir)
    if args.encoder is not None:
        source, found = f"encoder {args.encoder}", encode(texts, args.encoder, args.encoder_batch_size)
    else:
        source, found = args.embeddings, read_embeddings(args.embeddings, item_ids)
    check_embeddings(found, item_ids, source)
    embeddings = save_normalised(found, out_dir / "embeddings.npy")
    del found  # what was read of a memory map counts as memory until it is closed
    num_text_columns = embeddings.shape[1]
    if args.co_engagement_weight:
        vectors = co_engagement_vectors(run_dir.stage_dir(args.run_dir, "data"), len(item_ids), args.seed)
        path = out_dir / ID_EMBEDDINGS
        embeddings = save_with_co_engagement(embeddings, vectors, args.co_engagement_weight, path)
    embedded = time.monotonic()

    copies = quality.embedding_copies(embeddings)
    _check_distinct(copies, args.codebook_size, source)
    tokenizer = _fit(args, embeddings)
    tokenizer.co_engagement_columns = embeddings.shape[1] - num_text_columns
    tokenizer.save(out_dir / "tokenizer.npz")
    fitted = time.monotonic()
    before = assign_codes(tokenizer, embeddings)
    np.save(out_dir / ASSIGNED_CODES, before)
    after = resolve_collisions(before, Latents(tokenizer, embeddings), tokenizer.codebooks)
    SemanticIds(after, args.codebook_size).save(out_dir)

    metrics = quality.ids_metrics(tokenizer, embeddings, copies, before, after)
    metrics |= {"embedding_seconds": embedded - started, "fit_seconds": fitted - embedded}
    metrics |= {"assignment_seconds": time.monotonic() - fitted}
    logger.info(
        "%d items, %d levels of %d codes: ids of their own %.4f before and %.4f after %d were moved",
        len(after), args.levels, args.codebook_size, metrics["uniqueness_before"], metrics["uniqueness_after"],
        metrics["num_moved"],
    )  # fmt: skip
    return metrics


def _fit(args: SemanticIdsArguments, embeddings: np.ndarray) -> Tokenizer:
    """The tokenizer that the method makes, with the options of its assignment."""
    if args.method == "residual_k_means":
        from rerank.semantic_ids.k_means import fit_k_means_tokenizer

        tokenizer = fit_k_means_tokenizer(embeddings, args.levels, args.codebook_size, args.seed)
    else:
        from rerank.semantic_ids.rq_vae import RqVaeSettings, fit_rq_vae

        settings = RqVaeSettings(**{name.name: getattr(args, name.name) for name in dataclasses.fields(RqVaeSettings)})
        tokenizer = fit_rq_vae(
            embeddings, settings, _pairs(args, "contrastive_weight") if args.contrastive_weight else None
        )
    assignment = {"balanced_levels": args.balanced_levels, "random_levels": args.random_levels, "seed": args.seed}
    return dataclasses.replace(tokenizer, **assignment)


def _pairs(args: SemanticIdsArguments, option: str) -> np.ndarray:
    """The co-engaged pairs that an option above 0 needs.

    Raises:
        ValueError: When there are none.
    """
    pairs = co_engaged_pairs(run_dir.stage_dir(args.run_dir, "data"))
    if not len(pairs):
        raise ValueError(
            f"{option} is {getattr(args, option)} but no user has two different training items in a row; set it to 0"
        )
    return pairs


def _check_distinct(copies: np.ndarray, codebook_size: int, source: str) -> None:
    """Refuse more codes than there are different embeddings (each of n copies counts 1/n)."""
    num_distinct = round(float((1 / copies).sum()))
    if num_distinct < codebook_size:
        raise ValueError(
            f"{source} gives only {num_distinct} different embeddings for {len(copies)} items; "
            f"codebook_size is {codebook_size} but must be at most {num_distinct}"
        )


def _read_items(folder: str) -> tuple[list[str], list[str]]:
    """Original ids and texts of the catalogue, in item order."""
    table = pq.read_table(run_dir.stage_dir(folder, "data") / "items.parquet", columns=["item", "item_id", "text"])
    table = table.sort_by("item")
    return table["item_id"].to_pylist(), table["text"].to_pylist()
