"""RQ-VAE: an autoencoder whose bottleneck is a sum of codes, one per level.

Letters of shapes: B rows of a batch, D embedding columns, d latent columns, L levels, C codes per level.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from rerank.semantic_ids.arguments import SemanticIdsArguments
from rerank.semantic_ids.co_engagement import Partners
from rerank.semantic_ids.k_means import draw_sample, fit_residual_k_means
from rerank.semantic_ids.tokenizer import Layer, Tokenizer


def fit_rq_vae(embeddings: np.ndarray, args: SemanticIdsArguments, pairs: np.ndarray | None = None) -> Tokenizer:
    """A tokenizer fitted to embeddings (N, D), which may be memory-mapped; the same for the same seed.

    Args:
        pairs: Co-engaged items (P, 2), which the contrastive loss needs; without them there is none.
    """
    rng = np.random.default_rng(args.seed)
    sample = draw_sample(embeddings, rng)
    mean = sample.mean(axis=0)
    scale = float(1 / max(np.sqrt(((sample - mean) ** 2).mean()), 1e-8))  # of all columns together
    sizes = [embeddings.shape[1], args.hidden_size, args.latent_size]

    def scaled(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((rows - mean) * scale).astype(np.float32))

    with contextlib.ExitStack() as restored:
        restored.callback(torch.set_num_threads, torch.get_num_threads())
        restored.enter_context(torch.random.fork_rng(devices=[]))
        # The steps are too small to share: threads cost more than they bring, many times more on a busy machine.
        torch.set_num_threads(1)
        torch.manual_seed(args.seed)
        encoder, decoder = _mlp(sizes), _mlp(sizes[::-1])
        quantizer = _start_quantizer(encoder, scaled(sample), args)
        partners = None if pairs is None else Partners.of(pairs, len(embeddings))
        _train((encoder, quantizer, decoder), embeddings, scaled, partners, args, rng)
    codebooks = quantizer.codebooks.detach().numpy()
    return Tokenizer(codebooks, mean.astype(np.float32), scale, _export(encoder), _export(decoder))


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _export(stack: nn.Sequential) -> list[Layer]:
    linear = [layer for layer in stack if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]


def _train(
    parts: tuple[nn.Sequential, "ResidualQuantizer", nn.Sequential],
    embeddings: np.ndarray,
    scaled: Callable[[np.ndarray], torch.Tensor],
    partners: Partners | None,
    args: SemanticIdsArguments,
    rng: np.random.Generator,
) -> None:
    """Train in place, by the base loss of GR2 (arXiv:2602.07774) section 2 and the options' further losses."""
    encoder, quantizer, decoder = parts
    optimizer = torch.optim.AdamW(nn.ModuleList(parts).parameters(), lr=args.learning_rate)
    for _ in trange(args.epochs, desc="RQ-VAE", unit="epoch", mininterval=1):
        for batch in np.array_split(rng.permutation(len(embeddings)), -(-len(embeddings) // args.batch_size)):
            batch = np.sort(batch)  # a memory map reads forward
            targets = scaled(np.asarray(embeddings[batch]))  # (B, D)
            latents = encoder(targets)
            quantized = quantizer(latents)
            loss = F.mse_loss(decoder(quantized.latents), targets) + args.commitment_weight * quantized.commitment
            loss = loss + quantized.codebook + args.diversity_weight * quantized.diversity
            if partners is not None:
                has_partner, drawn = partners.draw(batch, rng)
                if len(drawn):
                    positives = encoder(scaled(np.asarray(embeddings[drawn])))
                    anchors = latents[torch.from_numpy(has_partner)]
                    contrast = contrastive_loss(anchors, positives, args.contrastive_temperature)
                    loss = loss + args.contrastive_weight * contrast
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def _start_quantizer(encoder: nn.Sequential, sample: torch.Tensor, args: SemanticIdsArguments) -> "ResidualQuantizer":
    """Codebooks by k-means++ on the residuals, or drawn as in VQ-VAE's reference code, U(-1/C, 1/C)."""
    shape = (args.levels, args.codebook_size, args.latent_size)
    if args.k_means_start:
        start = fit_residual_k_means(encoder(sample).numpy(), args.levels, args.codebook_size, args.seed)
    else:
        start = np.random.default_rng(args.seed).uniform(-1, 1, shape).astype(np.float32) / args.codebook_size
    decay = args.ema_decay if args.ema else None
    return ResidualQuantizer(torch.from_numpy(start), decay, args.reset_after, args.diversity_weight > 0)


@dataclass
class Quantized:
    """Quantized latents (B, d), with straight-through gradients, and the losses of the bottleneck."""

    latents: torch.Tensor
    commitment: torch.Tensor  # pulls latents to their codes
    codebook: torch.Tensor  # pulls codes to their latents; 0 where they follow by moving averages
    diversity: torch.Tensor  # lowest when a batch uses all codes alike


class ResidualQuantizer(nn.Module):
    """Codebooks (L, C, d), each for the residuals of the levels before it.

    Args:
        codebooks: Initial codebooks.
        ema_decay: Codes are moving averages of the residuals assigned to them, without gradients; None: codes learn
            by the gradient of the codebook loss.
        reset_after: Number of batches after which an unused code is overwritten; 0: never.
        has_diversity: Whether to compute the diversity loss.
    """

    def __init__(
        self, codebooks: torch.Tensor, ema_decay: float | None, reset_after: int = 0, has_diversity: bool = False
    ) -> None:
        super().__init__()
        self.decay, self.reset_after, self.has_diversity = ema_decay, reset_after, has_diversity
        self.codebooks = nn.Parameter(codebooks) if ema_decay is None else codebooks
        self.counts = torch.ones(codebooks.shape[:2])  # (L, C)
        self.sums = codebooks.detach().clone()  # (L, C, d)
        self.idle = torch.zeros(codebooks.shape[:2], dtype=torch.long)  # (L, C) batches unused

    def forward(self, latents: torch.Tensor) -> Quantized:
        """Quantize latents (B, d); in training, update the codebooks."""
        rest, total = latents, torch.zeros_like(latents)
        commitment, codebook_loss, diversity = (latents.new_zeros(()) for _ in range(3))
        for level in range(len(self.codebooks)):
            codebook = self.codebooks[level]
            codes = torch.cdist(rest.detach(), codebook.detach()).argmin(dim=1)  # (B,)
            chosen = codebook[codes]
            if self.decay is None:
                codebook_loss = codebook_loss + F.mse_loss(chosen, rest.detach())
            if self.has_diversity:
                # a copy: codes are updated before the backward pass
                diversity = diversity + diversity_loss(rest, codebook.clone())
            chosen = chosen.detach()
            commitment = commitment + F.mse_loss(rest, chosen)
            if self.training:
                self._learn(level, rest.detach(), codes, chosen)
            total, rest = total + chosen, rest - chosen
        return Quantized(latents + (total - latents).detach(), commitment, codebook_loss, diversity)

    @torch.no_grad()
    def _learn(self, level: int, rest: torch.Tensor, codes: torch.Tensor, chosen: torch.Tensor) -> None:
        """Moving averages of the number and the sum of the residuals of each code; an unused code stays in place.

        Source: van den Oord et al. 2017, appendix A.1; GR2 reports decays of 0.95 to 0.99.
        """
        members = F.one_hot(codes, self.codebooks.shape[1]).to(rest.dtype)  # (B, C)
        if self.decay is not None:
            self.counts[level].lerp_(members.sum(dim=0), 1 - self.decay)
            self.sums[level].lerp_(members.T @ rest, 1 - self.decay)
            self.codebooks[level] = self.sums[level] / self.counts[level].clamp(min=1e-8)[:, None]
        if self.reset_after:
            self._reset(level, rest, members, ((rest - chosen) ** 2).sum(dim=1))

    def _reset(self, level: int, rest: torch.Tensor, members: torch.Tensor, errors: torch.Tensor) -> None:
        """Overwrite codes unused for `reset_after` batches by the residuals farthest from their codes.

        Source: GR2 (arXiv:2602.07774) section 2.3, i* = argmax_i ||r_i - e_{z_i}||². Chosen here, since it is UNKNOWN:
        several dead codes of one batch take the farthest, the second farthest, and so on.
        """
        self.idle[level] = torch.where(members.any(dim=0), 0, self.idle[level] + 1)
        dead = torch.nonzero(self.idle[level] >= self.reset_after).ravel()[: len(rest)]
        farthest = rest[errors.topk(len(dead)).indices]
        self.codebooks[level, dead] = farthest
        self.sums[level, dead] = farthest
        self.counts[level, dead] = 1.0
        self.idle[level, dead] = 0


def diversity_loss(rest: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """C * sum_j p_j², p the softmax over negative distances averaged over the batch; 1 at uniform use, C at one code.

    Source: GR2 (arXiv:2602.07774) section 2.3, without its weight. Its distance and temperature are UNKNOWN; chosen
    here: squared distance, as in the argmin, and 1.
    """
    shares = torch.softmax(-(torch.cdist(rest, codebook) ** 2), dim=1).mean(dim=0)  # (C,)
    return len(codebook) * (shares**2).sum()


def contrastive_loss(latents: torch.Tensor, partners: torch.Tensor, temperature: float) -> torch.Tensor:
    """-log softmax of an item's partner against the other items of the batch, mean over the rows of latents (B, d).

    Source: GR2 (arXiv:2602.07774) section 2.3, L_ctr with one positive drawn per item and step, which has the same
    mean as its sum over all positives. UNKNOWN and chosen here: negatives are the batch's other items; latents are
    scaled to length one, since the loss would else fall by scaling them.
    """
    latents, partners = F.normalize(latents), F.normalize(partners)
    positive = (latents * partners).sum(dim=1) / temperature  # (B,)
    negative = latents @ latents.T / temperature  # (B, B)
    negative = negative.masked_fill(torch.eye(len(latents), dtype=torch.bool), -torch.inf)
    return (torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive).mean()
