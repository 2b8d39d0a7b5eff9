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

from rerank.semantic_ids.co_engagement import Partners
from rerank.semantic_ids.k_means import centre_and_scale, draw_sample, fit_residual_k_means
from rerank.semantic_ids.quantizer import ResidualQuantizer, contrastive_loss
from rerank.semantic_ids.tokenizer import Layer, Tokenizer


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
    k_means_start: bool
    ema: bool
    ema_decay: float
    commitment_weight: float
    diversity_weight: float
    reset_after: int
    contrastive_weight: float
    contrastive_temperature: float
    seed: int


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _export(stack: nn.Sequential) -> list[Layer]:
    linear = [layer for layer in stack if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()) for layer in linear]


def fit_rq_vae(embeddings: np.ndarray, settings: RqVaeSettings, pairs: np.ndarray | None = None) -> Tokenizer:
    """A tokenizer fitted to embeddings (N, D), which may be memory-mapped; the same for the same seed.

    Args:
        pairs: Co-engaged items (P, 2), which the contrastive loss needs.
    """
    rng = np.random.default_rng(settings.seed)
    sample = draw_sample(embeddings, rng)
    mean, scale = centre_and_scale(sample)
    sizes = [embeddings.shape[1], settings.hidden_size, settings.latent_size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder, decoder = _mlp(sizes), _mlp(sizes[::-1])

    def scaled(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((rows - mean) * scale).astype(np.float32))

    with _one_thread():
        quantizer = _start_quantizer(encoder, scaled(sample), settings)
        partners = Partners.of(pairs, len(embeddings)) if settings.contrastive_weight else None
        _train(encoder, quantizer, decoder, embeddings, scaled, partners, settings, rng)
    codebooks = quantizer.codebooks.detach().numpy()
    return Tokenizer(codebooks, mean.astype(np.float32), scale, _export(encoder), _export(decoder))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # The steps are too small to share: threads cost more than they bring, many times more on a busy machine.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _train(
    encoder: nn.Sequential,
    quantizer: ResidualQuantizer,
    decoder: nn.Sequential,
    embeddings: np.ndarray,
    scaled: Callable[[np.ndarray], torch.Tensor],
    partners: Partners | None,
    settings: RqVaeSettings,
    rng: np.random.Generator,
) -> None:
    """Train in place, by the base loss of GR2 (arXiv:2602.07774) section 2 and what the settings add to it."""
    parameters = [*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    for _ in trange(settings.epochs, desc="RQ-VAE", unit="epoch", mininterval=1):
        for batch in np.array_split(rng.permutation(len(embeddings)), -(-len(embeddings) // settings.batch_size)):
            batch = np.sort(batch)  # a memory map reads forward
            targets = scaled(np.asarray(embeddings[batch]))  # (B, D)
            latents = encoder(targets)
            quantized = quantizer(latents)
            loss = F.mse_loss(decoder(quantized.latents), targets) + settings.commitment_weight * quantized.commitment
            loss = loss + quantized.codebook + settings.diversity_weight * quantized.diversity
            if partners is not None:
                has_partner, drawn = partners.draw(batch, rng)
                if len(drawn):
                    drawn_latents = encoder(scaled(np.asarray(embeddings[drawn])))
                    anchors = latents[torch.from_numpy(has_partner)]
                    contrast = contrastive_loss(anchors, drawn_latents, settings.contrastive_temperature)
                    loss = loss + settings.contrastive_weight * contrast
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def _start_quantizer(encoder: nn.Sequential, sample: torch.Tensor, settings: RqVaeSettings) -> ResidualQuantizer:
    """Codebooks by k-means++ on the residuals, or drawn as in VQ-VAE's reference code, U(-1/C, 1/C)."""
    shape = (settings.levels, settings.codebook_size, settings.latent_size)
    if settings.k_means_start:
        start = fit_residual_k_means(encoder(sample).numpy(), settings.levels, settings.codebook_size, settings.seed)
    else:
        start = np.random.default_rng(settings.seed).uniform(-1, 1, shape).astype(np.float32) / settings.codebook_size
    decay = settings.ema_decay if settings.ema else None
    return ResidualQuantizer(torch.from_numpy(start), decay, settings.reset_after, settings.diversity_weight > 0)
