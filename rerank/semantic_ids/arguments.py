"""Options of the semantic_ids stage."""

import dataclasses
from dataclasses import dataclass

from rerank.catalogue import MAX_LEVELS
from rerank.launch import recipe
from rerank.launch.values import check_choice, check_range, option

METHODS = ("rq_vae", "residual_k_means")
RQ_VAE_ONLY = (
    *("latent_size", "hidden_size", "epochs", "batch_size", "learning_rate", "k_means_start", "ema", "ema_decay"),
    *("commitment_weight", "diversity_weight", "reset_after", "contrastive_weight", "contrastive_temperature"),
)
SIZES = ("encoder_batch_size", "codebook_size", "latent_size", "hidden_size", "epochs", "batch_size")
WEIGHTS = ("commitment_weight", "diversity_weight", "contrastive_weight", "co_engagement_weight", "reset_after")


@dataclass
class SemanticIdsArguments(recipe.StageArguments):
    """Options of the semantic_ids stage."""

    encoder: str | None = option(None, "Sentence encoder: folder, hub name or package:NAME (a Python package).")
    embeddings: str | None = option(
        None, "Instead: a .npy with a row per item, or a .parquet with item_id, embedding."
    )
    encoder_batch_size: int = option(64, "Texts encoded at once.")
    extends: str | None = option(
        None, "Folder of an older run: its items keep their ids, new ones get theirs from its tokenizer."
    )
    levels: int = option(4, "Codes, and so tokens, per item.")
    codebook_size: int = option(256, "Codes per level.")
    method: str = option("rq_vae", "rq_vae, or residual_k_means without an autoencoder.")
    co_engagement_weight: float = option(
        0.0, "Weight of co-engagement vectors beside the text's embeddings; 1: equal."
    )
    balanced_levels: int = option(0, "Last levels with codes spread by Sinkhorn; try 1.")
    random_levels: int = option(0, "GR2: last levels whose codes are drawn at random.")
    latent_size: int = option(32, "Width of the quantized vectors.")
    hidden_size: int = option(256, "Width of the RQ-VAE's hidden layer.")
    epochs: int = option(100, "Passes over the items.")
    batch_size: int = option(256, "Items per training step.")
    learning_rate: float = option(3e-3, "AdamW's, constant.")
    k_means_start: bool = option(True, "Codebooks start from k-means++; false: at random.")
    ema: bool = option(True, "Codebooks by moving averages; false: by gradients.")
    ema_decay: float = option(0.99, "Decay of the moving averages; GR2: 0.95 to 0.99.")
    commitment_weight: float = option(0.25, "Weight of the commitment loss.")
    diversity_weight: float = option(0.0, "GR2: weight of the loss for even use of codes.")
    reset_after: int = option(0, "GR2: batches until an unused code is reset; 0: never.")
    contrastive_weight: float = option(0.0, "GR2: weight of the contrastive loss between successive items of a user.")
    contrastive_temperature: float = option(0.1, "Temperature of that loss.")
    seed: int = option(0, "Same seed, same ids.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.encoder is None) == (self.embeddings is None):
            raise ValueError("give either encoder or embeddings, and not both")
        check_choice("method", self.method, METHODS)
        check_range("levels", self.levels, least=1, most=MAX_LEVELS)
        for names, least in ((SIZES, 1), (WEIGHTS, 0)):
            for name in names:
                check_range(name, getattr(self, name), least=least)
        for name in ("learning_rate", "contrastive_temperature"):
            check_range(name, getattr(self, name), above=0)
        check_range("ema_decay", self.ema_decay, least=0, below=1)
        for name in ("balanced_levels", "random_levels"):
            # the items under the empty prefix are the whole catalogue, too many to balance in memory
            check_range(name, getattr(self, name), least=0, most=self.levels - 1)
        if self.balanced_levels and self.random_levels:
            raise ValueError("balanced_levels and random_levels both name the last levels; give one of them")
        if self.method != "rq_vae":
            for field in dataclasses.fields(self):
                if field.name in RQ_VAE_ONLY and getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name} is an option of method rq_vae; remove it, or {self.method}")

    @property
    def source(self) -> str:
        """Name of the embeddings' source in messages."""
        return f"encoder {self.encoder}" if self.embeddings is None else self.embeddings
