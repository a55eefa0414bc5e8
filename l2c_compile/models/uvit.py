"""U-ViT: a transformer denoiser with long skips, where time, label and patches are all tokens.

Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models" (arXiv 2209.12152), section 3. The
published checkpoints load unchanged.

Shapes: B batch, C channels, H height, W width, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2c_compile.errors import nearest
from l2c_compile.models.layers import Attention, Mlp, PatchEmbed, check_sizes, timestep_embedding, unpatchify

UVIT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    f"U-ViT-{size}/2": {"img_size": 32, "patch_size": 2, "num_classes": 1001, "conv": False, **shape}
    for size, shape in {
        "M": {"embed_dim": 768, "depth": 16, "num_heads": 12},
        "L": {"embed_dim": 1024, "depth": 20, "num_heads": 16},
        "H": {"embed_dim": 1152, "depth": 28, "num_heads": 16},
    }.items()
}
"""The constructor arguments of the published ImageNet models for 256 x 256 images; label 1000 is the null class."""


class UViTBlock(nn.Module):
    """Attention and MLP with residuals; a decoder block first merges the tokens of its encoder partner."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, *, qkv_bias: bool, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), tanh_gelu=False)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x_BTD: Tensor, skip_BTD: Tensor | None = None) -> Tensor:
        """Return the tokens after both sublayers; shape and dtype are kept."""
        if self.skip_linear is not None:
            assert skip_BTD is not None
            x_BTD = self.skip_linear(torch.cat([x_BTD, skip_BTD], dim=-1))
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        result: Tensor = x_BTD + self.mlp(self.norm2(x_BTD))
        return result


class UViT(nn.Module):
    """The diffusion transformer with long skips.

    Args:
        img_size: the height and width of the latent.
        patch_size: the side of a patch.
        in_chans: the number of channels of the latent, and of the prediction.
        embed_dim: the width of a token; a multiple of ``num_heads``.
        depth: the number of blocks around the middle block, half of them decoder blocks; even.
        num_heads: the number of attention heads of a block.
        mlp_ratio: the width of the MLP's middle, in multiples of ``embed_dim``.
        qkv_bias: whether the attention's input projection has a bias.
        mlp_time_embed: whether an MLP stands between the timestep's frequencies and its token.
        num_classes: the number of rows of the label table, the null class included; 0 or less for an unconditional
            model.
        conv: whether the model ends with a 3 x 3 convolution.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        in_chans: int = 4,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        conv: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(img_size, patch_size, embed_dim, num_heads)
        if depth % 2:
            raise ValueError(f"depth must be even (each encoder block has a decoder block), got {depth}")
        if embed_dim % 2:
            raise ValueError(f"embed_dim must be even (cosines and sines of the timestep), got {embed_dim}")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_extra_tokens = 2 if num_classes > 0 else 1
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed: nn.Module = nn.Identity()
        if mlp_time_embed:
            self.time_embed = nn.Sequential(
                nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim)
            )
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes > 0 else None
        num_tokens = self.num_extra_tokens + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))

        def block(*, skip: bool) -> UViTBlock:
            return UViTBlock(embed_dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, skip=skip)

        self.in_blocks = nn.ModuleList(block(skip=False) for _ in range(depth // 2))
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size * patch_size * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        self._initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides: float) -> UViT:
        """Return a model of a published size, freshly initialised.

        Args:
            name: the key of ``UVIT_PRESETS``, for example ``"U-ViT-H/2"``.
            **overrides: the constructor arguments that replace the preset's, for example ``img_size=64``.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in UVIT_PRESETS:
            hint = nearest(name, UVIT_PRESETS) or f"known: {', '.join(UVIT_PRESETS)}"
            raise ValueError(f"no U-ViT preset is called {name!r}; {hint}")
        settings: dict[str, Any] = {**UVIT_PRESETS[name], **overrides}
        return cls(**settings)

    def forward(self, x_BCHW: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in a batch of latents.

        Args:
            x_BCHW: the noisy latents, in the dtype of the weights.
            timesteps: the timesteps, shape (B,), 0 (clean) to 1000 (noise), integer or floating.
            y: the class labels, shape (B,), int64; a model with classes requires them, any other takes none.

        Returns:
            The noise, in the shape of ``x_BCHW``.

        Raises:
            ValueError: if labels are missing, or the model takes none.
        """
        if (y is None) != (self.label_emb is None):
            wanted = "no labels y" if self.label_emb is None else "labels y"
            raise ValueError(f"this UViT was built with num_classes={self.num_classes}: it wants {wanted}")
        patches = self.patch_embed(x_BCHW)
        time = self.time_embed(timestep_embedding(timesteps, self.embed_dim).to(patches.dtype))
        tokens = [time.unsqueeze(1), patches]
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(y).unsqueeze(1))
        x_BTD = torch.cat(tokens, dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x_BTD = block(x_BTD)
            skips.append(x_BTD)
        x_BTD = self.mid_block(x_BTD)
        for block, skip_BTD in zip(self.out_blocks, reversed(skips), strict=True):
            x_BTD = block(x_BTD, skip_BTD)
        out_BTV = self.decoder_pred(self.norm(x_BTD))[:, self.num_extra_tokens :]
        result: Tensor = self.final_layer(unpatchify(out_BTV, self.patch_size, self.in_chans))
        return result

    def _initialize(self) -> None:
        """Draw linear weights and positions from a narrow normal distribution."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                # The attribute is annotated as a Tensor, but it is None without a bias.
                if getattr(module, "bias") is not None:  # noqa: B009
                    nn.init.zeros_(module.bias)
