"""A fitted semantic-id tokenizer: plain numpy, so that new items get ids without torch and without refitting.

Letters of shapes: N items, D embedding columns, d latent columns, L levels, C codes per level.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rerank.models.text_embeddings import blocks

# attributes of a tokenizer that are one number
PLAIN = ("scale", "balanced_levels", "random_levels", "seed", "co_engagement_columns")

Layer = tuple[np.ndarray, np.ndarray]  # weight (out, in) and bias (out)


@dataclass
class Tokenizer:
    """Encoder, residual codebooks and decoder.

    Attributes:
        codebooks: (L, C, d).
        mean: (D,) subtracted from an embedding first.
        scale: Multiplies the difference; embeddings of length one have tiny columns.
        encoder: Linear layers with a ReLU between them; without any, latents are the scaled embeddings.
        decoder: The same, back to scaled embeddings.
        balanced_levels: Number of last levels whose codes `assignment.balance` assigns.
        random_levels: Number of last levels with random codes.
        seed: Seed of those.
        co_engagement_columns: Number of last embedding columns that hold co-engagement; zeros for a new item.
    """

    codebooks: np.ndarray
    mean: np.ndarray
    scale: float = 1.0
    encoder: list[Layer] = field(default_factory=list)
    decoder: list[Layer] = field(default_factory=list)
    balanced_levels: int = 0
    random_levels: int = 0
    seed: int = 0
    co_engagement_columns: int = 0

    @property
    def levels(self) -> int:
        return self.codebooks.shape[0]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def embedding_size(self) -> int:
        return len(self.mean)

    def latents(self, embeddings: np.ndarray) -> np.ndarray:
        """Vectors to quantize (N, d) for embeddings (N, D)."""
        return _apply(self.encoder, ((embeddings - self.mean) * self.scale).astype(np.float32))

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) that codes (N, L) stand for."""
        latents = sum(self.codebooks[level][codes[:, level]] for level in range(self.levels))
        return _apply(self.decoder, latents) / self.scale + self.mean

    def save(self, path: str | Path) -> None:
        """Write everything to one .npz file."""
        layers = {
            f"{part}_{number}_{kind}": array
            for part, stack in (("encoder", self.encoder), ("decoder", self.decoder))
            for number, layer in enumerate(stack)
            for kind, array in zip(("weight", "bias"), layer, strict=True)
        }
        plain = {name: np.asarray(getattr(self, name)) for name in PLAIN}
        np.savez(path, codebooks=self.codebooks, mean=self.mean, **plain, **layers)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a file, or of a finished semantic_ids folder."""
        path = Path(path) / "tokenizer.npz" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give the folder of a finished semantic_ids stage")
        with np.load(path) as saved:
            encoder, decoder = (_read_layers(saved, part) for part in ("encoder", "decoder"))
            plain = {name: saved[name].item() for name in PLAIN if name in saved}
            return cls(saved["codebooks"], saved["mean"], encoder=encoder, decoder=decoder, **plain)


def _read_layers(saved: np.lib.npyio.NpzFile, part: str) -> list[Layer]:
    present = itertools.takewhile(lambda number: f"{part}_{number}_weight" in saved, itertools.count())
    return [(saved[f"{part}_{number}_weight"], saved[f"{part}_{number}_bias"]) for number in present]


def _apply(layers: list[Layer], values: np.ndarray) -> np.ndarray:
    for number, (weight, bias) in enumerate(layers):
        values = values @ weight.T + bias
        if number + 1 < len(layers):
            values = np.maximum(values, 0)
    return values


def nearest(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Index of the nearest row of `codebook` for each vector; the lower index on ties."""
    # ||v - e||² without ||v||², which is the same for every code
    return ((codebook**2).sum(axis=1) - 2 * vectors @ codebook.T).argmin(axis=1)


def quantize(latents: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Codes (N, L) of latents (N, d): on each level the code nearest to the residual of the levels before.

    Source: GR2 (arXiv:2602.07774) section 2, r_{k+1} = r_k - e_{z_k}.
    """
    rest = latents.copy()
    codes = np.empty((len(latents), len(codebooks)), dtype=np.int64)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = nearest(rest, codebook)
        rest -= codebook[codes[:, level]]
    return codes


@dataclass(frozen=True)
class Latents:
    """Latents of embeddings (N, D), computed for the rows that are asked for."""

    tokenizer: Tokenizer
    embeddings: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.tokenizer.latents(np.asarray(self.embeddings[rows]))


def nearest_codes(tokenizer: Tokenizer, embeddings: np.ndarray) -> np.ndarray:
    """Codes (N, L) of embeddings (N, D): the nearest on every level."""
    codes = np.empty((len(embeddings), tokenizer.levels), dtype=np.int64)
    for block in blocks(len(embeddings)):
        codes[block] = quantize(tokenizer.latents(np.asarray(embeddings[block])), tokenizer.codebooks)
    return codes


def reconstruction_error(tokenizer: Tokenizer, embeddings: np.ndarray, codes: np.ndarray) -> float:
    """Mean squared distance between embeddings (N, D) and their reconstruction from codes (N, L)."""
    squared = ((embeddings[block] - tokenizer.reconstruct(codes[block])) ** 2 for block in blocks(len(embeddings)))
    return sum(float(part.sum(dtype=np.float64)) for part in squared) / len(embeddings)


def number_prefixes(codes: np.ndarray, depth: int) -> np.ndarray:
    """A number (N,) from 0 on that rows of codes (N, L) share when their first `depth` codes are equal.

    Numbers follow the order of the prefixes.
    """
    numbers = np.zeros(len(codes), dtype=np.int64)
    for level in codes[:, :depth].T:  # level by level: C^L may overflow, N times C does not
        numbers = np.unique(numbers * (level.max(initial=0) + 1) + level, return_inverse=True)[1].ravel()
    return numbers


def members(numbers: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """The rows that bear each wanted number, ascending."""
    order = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[order], wanted)
    ends = np.searchsorted(numbers[order], wanted, side="right")
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]
