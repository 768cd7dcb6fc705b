"""Pixels to the transformer's image tokens, and back.

Source of the layout: ``Ideogram4Pipeline``'s decode path in diffusers: tokens are normalised with the
autoencoder's own batch-norm statistics, and a token's 128 channels run (patch row, patch column, latent
channel) with the latent channel fastest. FLUX.2's pipeline packs the latent channel slowest; the two must not
be mixed.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from ideoflow.model.spec import PATCH


def patchify(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4C): 2 x 2 patches, row by row, latent channel fastest."""
    b, c, h, w = latents.shape
    x = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // PATCH) * (w // PATCH), PATCH * PATCH * c)


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, rows * columns, 4C) -> (B, C, 2 rows, 2 columns); the inverse of :func:`patchify`."""
    rows, columns = grid
    b, _, channels = tokens.shape
    x = tokens.view(b, rows, columns, PATCH, PATCH, channels // PATCH**2).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, channels // PATCH**2, rows * PATCH, columns * PATCH)


def _statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    mean = vae.bn.running_mean.float()
    return mean, (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()


@torch.no_grad()
def encode_pixels(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> normalised image tokens (B, H/16 * W/16, 128), float32.

    The distribution's mode, not a sample: the latents of a picture are the same every time.
    """
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _statistics(vae)
    return (patchify(latents) - mean) / std


@torch.no_grad()
def decode_tokens(vae: AutoencoderKLFlux2, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Image tokens (B, rows * columns, 128) -> pixels (B, 3, 16 rows, 16 columns), about [-1, 1], float32."""
    mean, std = _statistics(vae)
    latents = unpatchify(tokens.float() * std + mean, grid)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
