"""What goes into a DiT: patches with their positions, and the embedding of (timestep, class).

DiT paper (Peebles & Xie, arXiv 2212.09748) section 3.2, "Patchify" and "adaLN-Zero block". Mirrors `PatchEmbed`,
`Timesteps`, `TimestepEmbedding`, `LabelEmbedding` and `CombinedTimestepLabelEmbeddings` of diffusers 0.42, numbers and
state-dict keys included.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TIMESTEP_CHANNELS = 256  # width of the sinusoidal timestep features, the same in every published DiT


def sincos_1d(dim: int, positions: torch.Tensor) -> torch.Tensor:
    """Sine and cosine features of positions, in float64 (float32 on mps, which has no float64).

    Args: `dim`, even; `positions`, any shape with n elements. Returns (n, dim): dim/2 sines, then dim/2 cosines.
    Source: Vaswani et al. 2017, section 3.5, with frequencies 10000^(-2i/dim).
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    frequencies = torch.arange(dim // 2, dtype=dtype, device=positions.device) / (dim / 2.0)
    frequencies = 1.0 / 10000**frequencies  # (dim/2,)
    angles = torch.outer(positions.flatten(), frequencies)  # (n, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, dim)


def sincos_2d(dim: int, height: int, width: int, base_size: int, device=None) -> torch.Tensor:
    """Positions of a (height, width) grid of patches: half of the features tell the column, half the row.

    A grid of another size than `base_size`, the trained one, is squeezed or stretched over the trained range.
    Returns (1, height * width, dim) float32, row by row.
    Raises ValueError if `dim` is not a multiple of 4. Source: diffusers `get_2d_sincos_pos_embed`.
    """
    if dim % 4:
        raise ValueError(f"the width of the model must be a multiple of 4 for 2-D positions, not {dim}")
    rows = torch.arange(height, dtype=torch.float32, device=device) / (height / base_size)
    columns = torch.arange(width, dtype=torch.float32, device=device) / (width / base_size)
    column_of_patch, row_of_patch = torch.meshgrid(columns, rows, indexing="xy")  # (height, width) each
    features = [sincos_1d(dim // 2, column_of_patch), sincos_1d(dim // 2, row_of_patch)]
    return torch.cat(features, dim=1).float()[None]  # (1, height * width, dim)


class PatchEmbed(nn.Module):
    """Latents to tokens: each patch becomes one token, and its fixed 2-D position is added.

    The positions stand in a buffer that is computed, never saved. Source: DiT section 3.2; diffusers `PatchEmbed`.
    """

    def __init__(self, sample_size: int, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.base_size = sample_size // patch_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("pos_embed", sincos_2d(dim, self.base_size, self.base_size, self.base_size),
                             persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, tokens, dim); sizes are multiples of the patch size."""
        tokens = self.proj(latents)  # (batch, dim, height/patch, width/patch)
        height, width = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2)  # (batch, tokens, dim)
        positions = self.pos_embed  # (1, tokens, dim)
        if (height, width) != (self.base_size, self.base_size):
            positions = sincos_2d(positions.shape[-1], height, width, self.base_size, tokens.device)
        return (tokens + positions).to(tokens.dtype)


class Timesteps(nn.Module):
    """Sinusoidal features of a timestep: cosines first, then sines.

    The lowest frequency is 1/10000 with `downscale_freq_shift` 1, as diffusers has it, and a little more with 0, as
    facebookresearch/DiT has it.
    Source: DDPM (Ho et al. 2020) appendix B; diffusers `Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)`.
    """

    def __init__(self, num_channels: int = TIMESTEP_CHANNELS, downscale_freq_shift: float = 1):
        super().__init__()
        self.num_channels = num_channels
        self.downscale_freq_shift = downscale_freq_shift

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """(batch,) in 0..999, fractions allowed -> (batch, num_channels) float32."""
        half = self.num_channels // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(exponents / (half - self.downscale_freq_shift))  # (half,)
        angles = timestep[:, None].float() * frequencies  # (batch, half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (batch, num_channels)


class TimestepEmbedding(nn.Module):
    """The two-layer MLP over the sinusoidal features. Source: DiT section 3.2; diffusers `TimestepEmbedding`."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels) -> (batch, dim)."""
        return self.linear_2(F.silu(self.linear_1(features)))


class LabelEmbedding(nn.Module):
    """A table of one vector a class, plus one for "no class" (the null class, id `num_classes`), last.

    In training mode each label becomes the null class with probability `dropout_prob`, which is what classifier-free
    guidance needs (Ho & Salimans, arXiv 2207.12598). Source: diffusers `LabelEmbedding`.
    """

    def __init__(self, num_classes: int, dim: int, dropout_prob: float = 0.1):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, class_labels: torch.Tensor) -> torch.Tensor:
        """(batch,) int64 in 0..num_classes -> (batch, dim)."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(class_labels.shape[0], device=class_labels.device) < self.dropout_prob
            class_labels = torch.where(dropped, self.num_classes, class_labels)  # (batch,)
        return self.embedding_table(class_labels)


class CombinedTimestepLabelEmbeddings(nn.Module):
    """c = embedding(t) + embedding(y): all that a DiT is told. Source: diffusers class of the same name."""

    def __init__(self, num_classes: int, dim: int, class_dropout_prob: float = 0.1, downscale_freq_shift: float = 1):
        super().__init__()
        self.time_proj = Timesteps(TIMESTEP_CHANNELS, downscale_freq_shift)
        self.timestep_embedder = TimestepEmbedding(TIMESTEP_CHANNELS, dim)
        self.class_embedder = LabelEmbedding(num_classes, dim, class_dropout_prob)

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """timestep (batch,), class_labels (batch,) int64 -> (batch, dim) in the dtype of the weights."""
        features = self.time_proj(timestep)  # (batch, 256)
        features = features.to(self.timestep_embedder.linear_1.weight.dtype)
        return self.timestep_embedder(features) + self.class_embedder(class_labels)  # (batch, dim)
