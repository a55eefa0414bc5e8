"""The layers that DiT and U-ViT share.

Shapes: B batch, C channels, H height, W width, P patch size, T tokens, D width.
Attribute names (``qkv``, ``proj``, ``fc1``, ``fc2``) are those of the published checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attend over all tokens; shape and dtype are kept."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(B, T, D))
        return result


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, *, tanh_gelu: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh" if tanh_gelu else "none")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply the layers to every token; shape and dtype are kept."""
        result: Tensor = self.fc2(self.act(self.fc1(x_BTD)))
        return result


class PatchEmbed(nn.Module):
    """Cuts an image into P x P patches and projects each to one token, row by row."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the tokens, shape (B, T, D) with T = (H / P) * (W / P)."""
        result: Tensor = self.proj(x_BCHW)
        return result.flatten(2).transpose(1, 2)


def unpatchify(x_BTV: Tensor, patch_size: int, out_channels: int) -> Tensor:
    """Put the patches of an image back in their places.

    Args:
        x_BTV: a patch for each token, V = P * P * C with the channel innermost; T is a square.
        patch_size: the side P of a patch.
        out_channels: the number C of channels.

    Returns:
        The image, shape (B, C, H, W) with H = W = P * sqrt(T).
    """
    side = math.isqrt(x_BTV.shape[1])
    patches = x_BTV.reshape(x_BTV.shape[0], side, side, patch_size, patch_size, out_channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, out_channels, side * patch_size, side * patch_size)


def timestep_embedding(t_B: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Embed timesteps as cosines, then sines, of geometrically spaced frequencies.

    Args:
        t_B: the timesteps, integer or floating, one for each sample.
        dim: the width of the embedding, an even number.
        max_period: the factor of the slowest period, which is about ``2 * pi * max_period``.

    Returns:
        A tensor of shape (B, dim), always float32: half precision cannot tell neighbouring timesteps apart.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def check_sizes(image_size: int, patch_size: int, dim: int, num_heads: int) -> None:
    """Raise ValueError unless patches tile the image and heads divide the width."""
    if image_size % patch_size:
        raise ValueError(f"patches must tile the image, got size {image_size} and patch size {patch_size}")
    if dim % num_heads:
        raise ValueError(f"the width must be a multiple of the number of heads, got width {dim} and {num_heads} heads")
