"""DiT: a transformer denoiser with adaLN-Zero blocks.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2. The published
checkpoints load unchanged.

Shapes: B batch, C channels, H height, W width, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2c_compile.errors import nearest
from l2c_compile.models.layers import Attention, Mlp, PatchEmbed, check_sizes, timestep_embedding, unpatchify

_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

DIT_PRESETS: Mapping[str, Mapping[str, int]] = {
    f"DiT-{size}/{patch_size}": {"input_size": 32, "patch_size": patch_size, "num_classes": 1000, **shape}
    for size, shape in _SIZES.items()
    for patch_size in (2, 4, 8)
}
"""The constructor arguments of the published models (Table 1 of the paper) for 256 x 256 images (32 x 32 latents)."""

_FREQUENCY_DIM = 256


class TimestepEmbedder(nn.Module):
    """Makes a conditioning vector of a timestep."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCY_DIM, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_B: Tensor) -> Tensor:
        """Return the conditioning, shape (B, D), in the dtype of the weights."""
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        result: Tensor = self.mlp(timestep_embedding(t_B, _FREQUENCY_DIM).to(first.weight.dtype))
        return result


class LabelEmbedder(nn.Module):
    """Makes a conditioning vector of a class label; the last row of its table is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y_B: Tensor) -> Tensor:
        """Return the conditioning, shape (B, D)."""
        result: Tensor = self.embedding_table(y_B)
        return result


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), tanh_gelu=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        """Return the tokens after both sublayers; shape and dtype are kept."""
        modulation = self.adaLN_modulation(c_BD).unsqueeze(1).chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x_BTD = x_BTD + gate_attn * self.attn(_modulate(self.norm1(x_BTD), shift_attn, scale_attn))
        result: Tensor = x_BTD + gate_mlp * self.mlp(_modulate(self.norm2(x_BTD), shift_mlp, scale_mlp))
        return result


class FinalLayer(nn.Module):
    """Makes patches of the tokens, which the conditioning shifts and scales."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        """Return a patch for each token, shape (B, T, P * P * C)."""
        shift, scale = self.adaLN_modulation(c_BD).unsqueeze(1).chunk(2, dim=-1)
        result: Tensor = self.linear(_modulate(self.norm_final(x_BTD), shift, scale))
        return result


class DiT(nn.Module):
    """The class-conditional diffusion transformer.

    Args:
        input_size: the height and width of the latent.
        patch_size: the side of a patch.
        in_channels: the number of channels of the latent.
        hidden_size: the width of a token; a multiple of 4 and of ``num_heads``.
        depth: the number of blocks.
        num_heads: the number of attention heads of a block.
        mlp_ratio: the width of the MLP's middle, in multiples of ``hidden_size``.
        num_classes: the number of classes without the null class, whose label is ``num_classes``.
        learn_sigma: whether ``2 * in_channels`` channels are returned, those of the noise, then those of its variance.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(input_size, patch_size, hidden_size, num_heads)
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 (2D sine-cosine positions), got {hidden_size}")
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = _position_embedding(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * self.out_channels)
        self._initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides: float) -> DiT:
        """Return a model of a published size, freshly initialised.

        Args:
            name: the key of ``DIT_PRESETS``, for example ``"DiT-XL/2"``.
            **overrides: the constructor arguments that replace the preset's, for example ``input_size=64``.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in DIT_PRESETS:
            hint = nearest(name, DIT_PRESETS) or f"known: {', '.join(DIT_PRESETS)}"
            raise ValueError(f"no DiT preset is called {name!r}; {hint}")
        settings: dict[str, Any] = {**DIT_PRESETS[name], **overrides}
        return cls(**settings)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in a batch of latents.

        Args:
            x_BCHW: the noisy latents, in the dtype of the weights.
            t_B: the timesteps, 0 (clean) to 999 (noise), integer or floating.
            y: the class labels, shape (B,), int64; ``num_classes`` is the null class.

        Returns:
            A tensor of shape (B, out_channels, H, W), whose first ``in_channels`` channels are the noise.
        """
        x_BTD = self.x_embedder(x_BCHW) + self.pos_embed
        c_BD = self.t_embedder(t_B) + self.y_embedder(y)
        for block in self.blocks:
            x_BTD = block(x_BTD, c_BD)
        return unpatchify(self.final_layer(x_BTD, c_BD), self.patch_size, self.out_channels)

    def _initialize(self) -> None:
        """Make every block the identity and the output zero, so that training starts steadily (section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.t_embedder.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


def _modulate(x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return x_BTD * (1 + scale_B1D) + shift_B1D


def _position_embedding(dim: int, side: int) -> Tensor:
    """Return embeddings of all positions, shape (side * side, dim): half the width for the column, half for the row."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns = axis[None].expand(side, side, -1)
    rows = axis[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()
