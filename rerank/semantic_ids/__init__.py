"""Stage: give every item a short unique semantic id.

In: data/items.parquet, and a sentence encoder or given embeddings. Out: semantic_ids.parquet (item, codes,
semantic_id), assigned_codes.npy (items, levels: the codes before collisions were resolved), embeddings.npy (float32,
length one, row = item), and tokenizer.npz, with which new items get ids without refitting. With co_engagement_weight
also id_embeddings.npy, the embeddings with co-engagement vectors beside them. With extends nothing is fitted: items of
another run keep their ids, and new ones get theirs from its tokenizer.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.semantic_ids \
        --config recipes/ml100k/2_semantic_ids.yaml

Source: RQ-VAE as in GR2 (arXiv:2602.07774) section 2.3; each of its techniques is an option, and by default only
k-means initialisation and EMA codebooks are on. Besides: residual k-means, balanced last levels.
"""

import dataclasses
import logging
import time
from pathlib import Path

import numpy as np

from rerank.launch import run_dir
from rerank.launch.stages import Stage
from rerank.models.text_embeddings import find_encoder
from rerank.semantic_ids import assignment, extension, quality
from rerank.semantic_ids import embeddings as sources
from rerank.semantic_ids.arguments import SemanticIdsArguments
from rerank.semantic_ids.assignment import SemanticIds, assign, load_semantic_ids
from rerank.semantic_ids.co_engagement import co_engaged_pairs
from rerank.semantic_ids.tokenizer import Latents, Tokenizer

__all__ = ["SemanticIds", "Tokenizer", "assign", "load_semantic_ids"]

logger = logging.getLogger(__name__)


def check(args: SemanticIdsArguments) -> None:
    """Refuse an encoder or embeddings that are not there or do not fit the catalogue, and sizes that do not."""
    if args.encoder is not None:
        find_encoder(args.encoder)
    if args.embeddings is not None:
        sources.find_embeddings(args.embeddings)
    if args.extends is not None:
        extension.check(args)
    if run_dir.is_finished(args.run_dir, "data"):
        item_ids, _ = sources.read_items(args.run_dir)
        if args.extends is None:
            check_fitting(args, len(item_ids))
        if args.embeddings is not None:
            found = sources.read_embeddings(args.embeddings, item_ids)
            sources.check_embeddings(found, item_ids, args.source)


def check_shard(args: SemanticIdsArguments) -> None:
    """Refuse shards of given embeddings."""
    if args.encoder is None:
        raise ValueError(
            f"--shard parts the texts for an encoder, but {args.embeddings} gives embeddings; leave it out"
        )


def check_fitting(args: SemanticIdsArguments, num_items: int) -> None:
    """Refuse sizes that do not fit the catalogue, and options that need co-engaged items where there are none."""
    check_size(num_items, args.levels, args.codebook_size)
    for name in ("contrastive_weight", "co_engagement_weight"):
        if getattr(args, name):
            _pairs(args, name)


def check_size(num_items: int, levels: int, codebook_size: int) -> None:
    """Refuse codebooks larger than the catalogue, and catalogues larger than the number of ids."""
    if num_items < codebook_size:
        fitting = 1 << (num_items.bit_length() - 1) if num_items else 1
        raise ValueError(
            f"codebook_size is {codebook_size} but there are only {num_items} items; use {fitting} or less"
        )
    assignment.check_room(num_items, levels, codebook_size)


def main(args: SemanticIdsArguments, out_dir: Path) -> dict[str, object]:
    """Embed, fit or extend, assign, resolve collisions, save; returns the quality of the ids."""
    started = time.monotonic()
    of_text, embeddings = sources.embed(args, out_dir)
    embedded = time.monotonic()

    if args.extends is None:
        copies = quality.embedding_copies(embeddings)
        _check_distinct(copies, args.codebook_size, args.source)
        tokenizer = _fit(args, embeddings)
        tokenizer.co_engagement_columns = embeddings.shape[1] - of_text.shape[1]
        fitted, told = time.monotonic(), dict[str, object]()
        before = assignment.assign_codes(tokenizer, embeddings)
        after = assignment.resolve_collisions(before, Latents(tokenizer, embeddings), tokenizer.codebooks)
    else:
        fitted, old = time.monotonic(), extension.OldIds.load(args)
        ids = extension.extend(args, old, of_text, out_dir)
        tokenizer, embeddings, before, after, told = old.tokenizer, ids.embeddings, ids.before, ids.after, ids.metrics
        copies = quality.embedding_copies(embeddings)
        logger.info("%s", ids.words)
    tokenizer.save(out_dir / "tokenizer.npz")
    np.save(out_dir / assignment.ASSIGNED_CODES, before)
    SemanticIds(after, tokenizer.codebook_size).save(out_dir)

    metrics = quality.ids_metrics(tokenizer, embeddings, copies, before, after) | told
    metrics |= {"embedding_seconds": embedded - started, "fit_seconds": fitted - embedded}
    metrics |= {"assignment_seconds": time.monotonic() - fitted}
    logger.info(
        "%(num_items)d items; unique ids: %(uniqueness_before).4f, %(uniqueness_after).4f with %(num_moved)d moved",
        metrics,
    )
    return metrics


def _fit(args: SemanticIdsArguments, embeddings: np.ndarray) -> Tokenizer:
    """The tokenizer of the method, with the options of its assignment."""
    if args.method == "residual_k_means":
        from rerank.semantic_ids.k_means import fit_k_means_tokenizer

        tokenizer = fit_k_means_tokenizer(embeddings, args.levels, args.codebook_size, args.seed)
    else:
        from rerank.semantic_ids.rq_vae import fit_rq_vae

        pairs = _pairs(args, "contrastive_weight") if args.contrastive_weight else None
        tokenizer = fit_rq_vae(embeddings, args, pairs)
    return dataclasses.replace(
        tokenizer, balanced_levels=args.balanced_levels, random_levels=args.random_levels, seed=args.seed
    )


def _pairs(args: SemanticIdsArguments, option: str) -> np.ndarray:
    """The co-engaged pairs that an option above 0 needs."""
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


STAGE = Stage(
    name="semantic_ids",
    arguments=(SemanticIdsArguments,),
    main=main,
    check=check,
    main_of_shard=sources.make_shard,
    check_shard=check_shard,
    inputs=("data",),
    files=("encoder", "embeddings", "extends/semantic_ids/stage.json"),
)
