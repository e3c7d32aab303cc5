"""A small Transformer for tables: each feature is a token, and a [CLS] token is read out."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class TabularTransformer(nn.Module):
    """Classifies rows of real-valued features.

    Feature `j` of a row becomes the token `z[j] * weight[j] + bias[j]`, where `z` is the standardised value
    (Gorishniy et al. 2021, *Revisiting Deep Learning Models for Tabular Data*, section 3.3). The token of [CLS]
    stands first; the head reads it after the last block. `mean` and `deviation` are buffers: they are set from
    the training data and saved with the weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, n_features: int, n_labels: int, *, width: int, n_blocks: int, n_heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("deviation", torch.ones(n_features))
        self.weight = nn.Parameter(torch.randn(n_features, width) / width**0.5)
        self.bias = nn.Parameter(torch.randn(n_features, width) / width**0.5)
        self.cls = nn.Parameter(torch.randn(width) / width**0.5)
        self.blocks = nn.ModuleList(Block(width, n_heads, dropout) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_labels)

    def forward(self, features: Float[Tensor, "example feature"]) -> Float[Tensor, "example label"]:
        """Return the logits of raw (not standardised) features."""
        z = (features - self.mean) / self.deviation
        tokens = z.unsqueeze(-1) * self.weight + self.bias  # (example, feature, width)
        x = torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each normalised before and added to what came in."""

    # Not nn.TransformerEncoderLayer: its fused path at inference skips the hooks of its parts.

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "example token width"]) -> Float[Tensor, "example token width"]:
        """Return the block's output, of the shape of its input."""
        x = x + self.dropout(self._attend(self.norm_attention(x)))
        added: Tensor = self.dropout(self.down(gelu(self.up(self.norm_mlp(x)))))
        return x + added

    def _attend(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(x).unflatten(-1, (3, self.n_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (example, head, token, width / head)
        mixed = scaled_dot_product_attention(query, key, value)
        rows: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return rows
