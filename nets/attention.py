"""One DiT block, as in the right half of the paper's figure 3: adaLN-Zero around self-attention and an MLP.

DiT paper (arXiv 2212.09748) section 3.2, "adaLN-Zero block". Mirrors `AdaLayerNormZero`, `Attention`, `FeedForward` and
`BasicTransformerBlock` of diffusers 0.42 as `DiTTransformer2DModel` uses them, numbers and state-dict keys included.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nets.embeddings import CombinedTimestepLabelEmbeddings


class AdaLayerNormZero(nn.Module):
    """The block's share of the conditioning tower, and its first norm.

    Owns the embedder `emb` (shared by all blocks of a new model) and `linear`, which turns the embedding into the six
    vectors of the block. Source: DiT section 3.2; diffusers `AdaLayerNormZero`.
    """

    def __init__(self, dim: int, num_classes: int, downscale_freq_shift: float = 1):
        super().__init__()
        self.emb = CombinedTimestepLabelEmbeddings(num_classes, dim, downscale_freq_shift=downscale_freq_shift)
        self.linear = nn.Linear(dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def modulation(self, embedding: torch.Tensor) -> torch.Tensor:
        """embedding (batch, dim) -> (batch, 6, dim): shift, scale, gate for attention, then the same for the MLP."""
        return self.linear(F.silu(embedding)).unflatten(1, (6, -1))

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim), twice (batch, 1, dim) -> (batch, tokens, dim)."""
        return self.norm(hidden_states) * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention. Source: diffusers `Attention` with its default SDPA processor."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim), nn.Dropout(dropout)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim) -> (batch, tokens, dim)."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, tokens, head_dim)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        hidden_states = F.scaled_dot_product_attention(query, key, value)  # (batch, heads, tokens, head_dim)
        hidden_states = hidden_states.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        for layer in self.to_out:
            hidden_states = layer(hidden_states)  # (batch, tokens, dim)
        return hidden_states


class GELU(nn.Module):
    """A linear layer and GELU in its tanh form. Source: diffusers `GELU(approximate="tanh")`."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., inner_dim)."""
        return F.gelu(self.proj(hidden_states), approximate="tanh")


class FeedForward(nn.Module):
    """The MLP of a block, four times as wide inside. Source: diffusers `FeedForward`, `gelu-approximate`."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim) -> (batch, tokens, dim)."""
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states


class BasicTransformerBlock(nn.Module):
    """One block of the token tower. Source: DiT figure 3; diffusers `BasicTransformerBlock`, `ada_norm_zero`.

    `norm_eps` and `norm_elementwise_affine` are those of the second norm alone, as upstream.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, num_classes: int, dropout: float = 0.0,
                 attention_bias: bool = True, norm_elementwise_affine: bool = False, norm_eps: float = 1e-5,
                 downscale_freq_shift: float = 1):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim, num_classes, downscale_freq_shift)
        self.attn1 = Attention(dim, heads, head_dim, dropout, attention_bias)
        self.norm3 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(dim, dropout)
        self.chunk_size, self.chunk_dim = None, 0

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0):
        """Run the MLP over `chunk_size` entries of dimension `dim` (0: batch, 1: tokens) at a time, to save memory."""
        self.chunk_size, self.chunk_dim = chunk_size, dim

    def forward(self, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """hidden_states (batch, tokens, dim), modulation (batch, 6, dim) -> (batch, tokens, dim)."""
        # beta_1, gamma_1, alpha_1, beta_2, gamma_2, alpha_2 of the paper's figure, each (batch, 1, dim)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unsqueeze(2).unbind(1)

        attended = self.attn1(self.norm1(hidden_states, shift_msa, scale_msa))  # (batch, tokens, dim)
        hidden_states = gate_msa * attended + hidden_states  # (batch, tokens, dim)

        normed = self.norm3(hidden_states) * (1 + scale_mlp) + shift_mlp  # (batch, tokens, dim)
        return gate_mlp * self.feed_forward(normed) + hidden_states  # (batch, tokens, dim)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The MLP, in chunks if `set_chunk_feed_forward` asked for them; (batch, tokens, dim) -> the same."""
        if self.chunk_size is None:
            return self.ff(hidden_states)
        chunks = hidden_states.split(self.chunk_size, dim=self.chunk_dim)
        return torch.cat([self.ff(chunk) for chunk in chunks], dim=self.chunk_dim)
