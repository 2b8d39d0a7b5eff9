"""The bottleneck of the RQ-VAE: codebooks level by level, and how each of them learns.

Letters of shapes: B rows of a batch, d latent columns, L levels, C codes per level.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Quantized:
    """Latents quantized (B, d), with straight-through gradients, and the losses that belong to it."""

    latents: torch.Tensor
    commitment: torch.Tensor  # pulls latents to their codes
    codebook: torch.Tensor  # pulls codes to their latents; 0 where they follow by moving averages
    diversity: torch.Tensor  # lowest when a batch uses all codes alike


class ResidualQuantizer(nn.Module):
    """Codebooks (L, C, d), each for what the levels before it leave.

    Args:
        codebooks: Where they start.
        ema_decay: Codes follow the residuals assigned to them by moving averages, and no gradient reaches them; None:
            codes learn by the gradient of the codebook loss.
        reset_after: A code unused for so many batches is overwritten; 0: never.
        has_diversity: Whether to work out the diversity loss.
    """

    def __init__(
        self, codebooks: torch.Tensor, ema_decay: float | None, reset_after: int = 0, has_diversity: bool = False
    ) -> None:
        super().__init__()
        self.decay, self.reset_after, self.has_diversity = ema_decay, reset_after, has_diversity
        if ema_decay is None:
            self.codebooks = nn.Parameter(codebooks)
        else:
            self.register_buffer("codebooks", codebooks)
        self.register_buffer("counts", torch.ones(codebooks.shape[:2]))  # (L, C)
        self.register_buffer("sums", codebooks.detach().clone())  # (L, C, d)
        self.register_buffer("idle", torch.zeros(codebooks.shape[:2], dtype=torch.long))  # (L, C) batches unused

    def forward(self, latents: torch.Tensor) -> Quantized:
        """Quantize, and in training let the codebooks follow."""
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
        members = F.one_hot(codes, self.codebooks.shape[1]).to(rest.dtype)  # (B, C)
        if self.decay is not None:
            self._follow(level, rest, members)
        if self.reset_after:
            self._reset(level, rest, members, ((rest - chosen) ** 2).sum(dim=1))

    def _follow(self, level: int, rest: torch.Tensor, members: torch.Tensor) -> None:
        """Moving averages of how often a code is used and of what it is used for; an unused code stays in place.

        Source: van den Oord et al. 2017, appendix A.1; GR2 reports decays of 0.95 to 0.99.
        """
        self.counts[level].lerp_(members.sum(dim=0), 1 - self.decay)
        self.sums[level].lerp_(members.T @ rest, 1 - self.decay)
        self.codebooks[level] = self.sums[level] / self.counts[level].clamp(min=1e-8)[:, None]

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
    """-log of the share that an item's partner has among it and the other items of the batch, mean over (B, d).

    Source: GR2 (arXiv:2602.07774) section 2.3, L_ctr with one positive drawn per item and step, which has the same
    mean as its sum over all positives. UNKNOWN and chosen here: negatives are the batch's other items; latents are
    scaled to length one, since the loss would else fall by scaling them.
    """
    latents, partners = F.normalize(latents), F.normalize(partners)
    positive = (latents * partners).sum(dim=1) / temperature  # (B,)
    negative = latents @ latents.T / temperature  # (B, B)
    negative = negative.masked_fill(torch.eye(len(latents), dtype=torch.bool), -torch.inf)
    return (torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive).mean()
