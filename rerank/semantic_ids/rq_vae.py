"""RQ-VAE: an autoencoder whose bottleneck is a sum of codes, one per level.

Letters of shapes: B rows of a batch, D embedding columns, d latent columns, L levels, C codes per level.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from rerank.semantic_ids.k_means import fit_residual_k_means
from rerank.semantic_ids.tokenizer import Layer, Tokenizer

FIT_SAMPLE = 65_536  # items that the mean and the k-means initialisation look at


@dataclass(frozen=True)
class RqVaeSettings:
    """How to fit; the options of the same names of `SemanticIdsArguments` explain them and hold the defaults."""

    levels: int
    codebook_size: int
    latent_size: int
    hidden_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    commitment_weight: float
    seed: int


class ResidualQuantizer(nn.Module):
    """Codebooks that follow the residuals assigned to them by moving averages; no gradient reaches them."""

    def __init__(self, codebooks: torch.Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codebooks", codebooks)  # (L, C, d)
        self.register_buffer("counts", torch.ones(codebooks.shape[:2]))  # (L, C)
        self.register_buffer("sums", codebooks.clone())  # (L, C, d)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The quantized latents (B, d) with straight-through gradients, and the commitment loss."""
        residuals, quantized, commitment = latents, torch.zeros_like(latents), latents.new_zeros(())
        for level in range(len(self.codebooks)):
            codes = torch.cdist(residuals.detach(), self.codebooks[level]).argmin(dim=1)  # (B,)
            chosen = self.codebooks[level][codes]
            commitment = commitment + F.mse_loss(residuals, chosen)
            if self.training:
                self._update(level, residuals.detach(), codes)
            quantized, residuals = quantized + chosen, residuals - chosen
        return latents + (quantized - latents).detach(), commitment

    @torch.no_grad()
    def _update(self, level: int, residuals: torch.Tensor, codes: torch.Tensor) -> None:
        """Moving averages of how often a code is used and of what it is used for; an unused code stays in place.

        Source: van den Oord et al. 2017, appendix A.1; GR2 reports decays of 0.95 to 0.99.
        """
        members = F.one_hot(codes, self.codebooks.shape[1]).to(residuals.dtype)  # (B, C)
        self.counts[level].lerp_(members.sum(dim=0), 1 - self.decay)
        self.sums[level].lerp_(members.T @ residuals, 1 - self.decay)
        self.codebooks[level] = self.sums[level] / self.counts[level].clamp(min=1e-8)[:, None]


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _export(stack: nn.Sequential) -> list[Layer]:
    linear = [layer for layer in stack if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()) for layer in linear]


def fit_rq_vae(embeddings: np.ndarray, settings: RqVaeSettings) -> Tokenizer:
    """A tokenizer fitted to embeddings (N, D), which may be memory-mapped; the same for the same seed."""
    rng = np.random.default_rng(settings.seed)
    sample = _sample(embeddings, rng)
    mean = sample.mean(axis=0)
    scale = float(1 / max(np.sqrt(((sample - mean) ** 2).mean()), 1e-8))
    sizes = [embeddings.shape[1], settings.hidden_size, settings.latent_size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder, decoder = _mlp(sizes), _mlp(sizes[::-1])

    def scaled(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((rows - mean) * scale).astype(np.float32))

    with _one_thread():
        codebooks = _train(encoder, decoder, embeddings, scaled, scaled(sample), settings, rng)
    return Tokenizer(codebooks, mean.astype(np.float32), scale, _export(encoder), _export(decoder))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # The steps are too small to share: threads cost more than they bring, many times more on a busy machine, and
    # the order of their sums would make ids depend on the number of cores.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _sample(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if len(embeddings) <= FIT_SAMPLE:
        return np.asarray(embeddings)
    return np.asarray(embeddings[np.sort(rng.choice(len(embeddings), FIT_SAMPLE, replace=False))])


def _train(
    encoder: nn.Sequential,
    decoder: nn.Sequential,
    embeddings: np.ndarray,
    scaled: Callable[[np.ndarray], torch.Tensor],
    sample: torch.Tensor,
    settings: RqVaeSettings,
    rng: np.random.Generator,
) -> np.ndarray:
    """Train in place and return the codebooks (L, C, d)."""
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=settings.learning_rate)
    quantizer = _start_quantizer(encoder, sample, settings)
    for _ in trange(settings.epochs, desc="RQ-VAE", unit="epoch", mininterval=1):
        for batch in np.array_split(rng.permutation(len(embeddings)), -(-len(embeddings) // settings.batch_size)):
            targets = scaled(np.asarray(embeddings[np.sort(batch)]))  # (B, D); sorted: a memory map reads forward
            quantized, commitment = quantizer(encoder(targets))
            loss = F.mse_loss(decoder(quantized), targets) + settings.commitment_weight * commitment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return quantizer.codebooks.numpy()


@torch.no_grad()
def _start_quantizer(encoder: nn.Sequential, sample: torch.Tensor, settings: RqVaeSettings) -> ResidualQuantizer:
    start = fit_residual_k_means(encoder(sample).numpy(), settings.levels, settings.codebook_size, settings.seed)
    return ResidualQuantizer(torch.from_numpy(start), settings.ema_decay)
