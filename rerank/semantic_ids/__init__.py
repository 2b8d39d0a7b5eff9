"""Stage: give every item a short unique semantic id.

In: data/items.parquet, and a sentence encoder or given embeddings. Out: semantic_ids.parquet (item, codes,
semantic_id), embeddings.npy (float32, length one, row = item), and tokenizer.npz, with which new items get ids without
refitting.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.semantic_ids \
        --config recipes/ml100k/2_semantic_ids.yaml

Source: RQ-VAE as in GR2 (arXiv:2602.07774) section 2.3, with k-means initialisation and EMA codebooks.
"""

import dataclasses
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import recipe, run_dir
from rerank.semantic_ids import quality
from rerank.semantic_ids.assignment import assign, assign_codes
from rerank.semantic_ids.collisions import check_room, resolve_collisions
from rerank.semantic_ids.embeddings import check_embeddings, encode, find_encoder, read_embeddings, save_normalised
from rerank.semantic_ids.id_tokens import (
    MAX_LEVELS,
    SemanticIds,
    load_semantic_ids,
    semantic_id_text,
    token_ids,
    token_sequences,
    tokens,
)
from rerank.semantic_ids.tokenizer import Latents, Tokenizer, reconstruction_error

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


@dataclass
class SemanticIdsArguments(recipe.StageArguments):
    """Options of the semantic_ids stage."""

    encoder: str | None = field(
        default=None,
        metadata={"help": "Sentence encoder: folder, hub name, or package:NAME (a model inside a Python package)."},
    )
    embeddings: str | None = field(
        default=None,
        metadata={
            "help": "Instead of an encoder: .npy with one row per item, or .parquet with item_id, embedding; "
            "${VARIABLE} is filled in from the environment."
        },
    )
    encoder_batch_size: int = field(default=64, metadata={"help": "Texts encoded at once."})
    levels: int = field(default=4, metadata={"help": "Codes, and so tokens, per item."})
    codebook_size: int = field(default=256, metadata={"help": "Codes per level."})
    latent_size: int = field(default=32, metadata={"help": "Width of the quantized vectors."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the RQ-VAE's hidden layer."})
    epochs: int = field(default=100, metadata={"help": "Passes over the items."})
    batch_size: int = field(default=256, metadata={"help": "Items per training step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "AdamW's, constant."})
    ema_decay: float = field(
        default=0.99, metadata={"help": "How slowly codes follow their residuals; GR2: .95 to .99."}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight of the pull of latents to their codes."})
    seed: int = field(default=0, metadata={"help": "Same seed, same ids."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.encoder is None) == (self.embeddings is None):
            raise ValueError("give either encoder or embeddings, and not both")
        if self.embeddings is not None:
            self.embeddings = os.path.expandvars(self.embeddings)
        for name in ("encoder_batch_size", "codebook_size", "latent_size", "hidden_size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")
        if not 1 <= self.levels <= MAX_LEVELS:
            raise ValueError(f"levels is {self.levels} but must be 1 to {MAX_LEVELS}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay is {self.ema_decay} but must be at least 0 and below 1; GR2 uses 0.95 to 0.99"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate} but must be above 0")
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight is {self.commitment_weight} but must not be negative")


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
    from rerank.semantic_ids.rq_vae import RqVaeSettings, fit_rq_vae

    started = time.monotonic()
    item_ids, texts = _read_items(args.run_dir)
    if args.encoder is not None:
        source, found = f"encoder {args.encoder}", encode(texts, args.encoder, args.encoder_batch_size)
    else:
        source, found = args.embeddings, read_embeddings(args.embeddings, item_ids)
    check_embeddings(found, item_ids, source)
    embeddings = save_normalised(found, out_dir / "embeddings.npy")
    embedded = time.monotonic()

    copies = quality.embedding_copies(embeddings)
    _check_distinct(copies, args.codebook_size, source)
    settings = RqVaeSettings(**{name.name: getattr(args, name.name) for name in dataclasses.fields(RqVaeSettings)})
    tokenizer = fit_rq_vae(embeddings, settings)
    tokenizer.save(out_dir / "tokenizer.npz")
    before = assign_codes(tokenizer, embeddings)
    after = resolve_collisions(before, Latents(tokenizer, embeddings), tokenizer.codebooks)
    SemanticIds(after, args.codebook_size).save(out_dir)

    metrics = _report(tokenizer, embeddings, before, after)
    metrics |= {"num_sharing_an_embedding": int((copies > 1).sum())}
    metrics |= {"embedding_seconds": embedded - started, "fit_seconds": time.monotonic() - embedded}
    logger.info(
        "%d items, %d levels of %d codes: ids of their own %.4f before and %.4f after %d were moved",
        len(after), args.levels, args.codebook_size, metrics["uniqueness_before"], metrics["uniqueness_after"],
        metrics["num_moved"],
    )  # fmt: skip
    return metrics


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


def _report(tokenizer: Tokenizer, embeddings: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Quality of ids before and after collisions were resolved."""
    unique_before, unique_after = quality.uniqueness(before), quality.uniqueness(after)
    variance = float(np.var(embeddings, axis=0, dtype=np.float64).sum())
    errors = [reconstruction_error(tokenizer, embeddings, codes) for codes in (before, after)]
    return {
        "num_items": len(after),
        "levels": tokenizer.levels,
        "codebook_size": tokenizer.codebook_size,
        "embedding_size": tokenizer.embedding_size,
        "uniqueness_before": unique_before["alone"],
        "uniqueness_after": unique_after["alone"],
        "distinct_before": unique_before["distinct"],
        "distinct_after": unique_after["distinct"],
        "num_moved": int((before != after).any(axis=1).sum()),
        "code_use": quality.code_use(before, tokenizer.codebook_size),
        "perplexity": quality.perplexity(before, tokenizer.codebook_size),
        "reconstruction_error_before": errors[0],
        "reconstruction_error_after": errors[1],
        "unexplained_variance": errors[0] / variance,
    }
