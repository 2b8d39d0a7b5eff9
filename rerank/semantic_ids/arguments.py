"""Options of the semantic_ids stage."""

import dataclasses
import os
from dataclasses import dataclass, field

from rerank import recipe
from rerank.semantic_ids.id_tokens import MAX_LEVELS

METHODS = ("rq_vae", "residual_k_means")
RQ_VAE_ONLY = (
    *("latent_size", "hidden_size", "epochs", "batch_size", "learning_rate", "k_means_start", "ema", "ema_decay"),
    *("commitment_weight", "diversity_weight", "reset_after", "contrastive_weight", "contrastive_temperature"),
)


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
    method: str = field(
        default="rq_vae", metadata={"help": "rq_vae; or residual_k_means: codes of the embeddings themselves, faster."}
    )
    co_engagement_weight: float = field(
        default=0.0,
        metadata={
            "help": "Above 0, ids also tell what users take together: weight of columns made of the training pairs "
            "beside the text's columns; 1: as much as the text."
        },
    )
    balanced_levels: int = field(
        default=0,
        metadata={"help": "Last levels whose codes Sinkhorn's algorithm spreads over the items of a prefix; try 1."},
    )
    random_levels: int = field(default=0, metadata={"help": "GR2: last levels whose codes are drawn at random."})
    latent_size: int = field(default=32, metadata={"help": "Width of the quantized vectors."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the RQ-VAE's hidden layer."})
    epochs: int = field(default=100, metadata={"help": "Passes over the items."})
    batch_size: int = field(default=256, metadata={"help": "Items per training step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "AdamW's, constant."})
    k_means_start: bool = field(
        default=True, metadata={"help": "Codebooks start from k-means++ on the residuals; false: at random."}
    )
    ema: bool = field(
        default=True,
        metadata={"help": "Codes follow their residuals by moving averages; false: by gradients of a codebook loss."},
    )
    ema_decay: float = field(
        default=0.99, metadata={"help": "How slowly codes follow their residuals; GR2: .95 to .99."}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight of the pull of latents to their codes."})
    diversity_weight: float = field(default=0.0, metadata={"help": "GR2: weight of the loss for even use of codes."})
    reset_after: int = field(
        default=0, metadata={"help": "GR2: batches after which an unused code is overwritten; 0: never."}
    )
    contrastive_weight: float = field(
        default=0.0, metadata={"help": "GR2: weight of the pull between items that users take one after the other."}
    )
    contrastive_temperature: float = field(default=0.1, metadata={"help": "Of that loss."})
    seed: int = field(default=0, metadata={"help": "Same seed, same ids."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.encoder is None) == (self.embeddings is None):
            raise ValueError("give either encoder or embeddings, and not both")
        if self.embeddings is not None:
            self.embeddings = os.path.expandvars(self.embeddings)
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; use one of {', '.join(METHODS)}")
        self._check_sizes()
        self._check_levels()
        if self.method != "rq_vae":
            self._refuse_rq_vae_options()

    def _check_sizes(self) -> None:
        for name in ("encoder_batch_size", "codebook_size", "latent_size", "hidden_size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")
        weights = ("commitment_weight", "diversity_weight", "contrastive_weight", "co_engagement_weight")
        for name in (*weights, "reset_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must not be negative")
        for name in ("learning_rate", "contrastive_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay is {self.ema_decay} but must be at least 0 and below 1; GR2 uses 0.95 to 0.99"
            )

    def _check_levels(self) -> None:
        if not 1 <= self.levels <= MAX_LEVELS:
            raise ValueError(f"levels is {self.levels} but must be 1 to {MAX_LEVELS}")
        for name in ("balanced_levels", "random_levels"):
            # the items under the empty prefix are the whole catalogue, too many to balance in memory
            if not 0 <= getattr(self, name) < self.levels:
                raise ValueError(f"{name} is {getattr(self, name)} but must be 0 to {self.levels - 1}: a last part")
        if self.balanced_levels and self.random_levels:
            raise ValueError("balanced_levels and random_levels both name the last levels; give one of them")

    def _refuse_rq_vae_options(self) -> None:
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for name in RQ_VAE_ONLY:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is an option of method rq_vae; remove it, or {self.method}")
