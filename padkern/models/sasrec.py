"""SASRec encoder over packed tokens: the authors' post-LN form and a modern pre-LN one.

Source: Kang and McAuley 2018, arXiv:1808.09781; the post-LN layout follows the PAD release
(Applied-Machine-Learning-Lab/PAD at 506c72d, ``model/modules.py``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from padkern.data.batch import PackedSequences


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention within each packed sequence; projections without bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, packed: PackedSequences) -> Tensor:
        # Tokens stand first in the grid, so the causal mask alone keeps real queries off the
        # empty slots behind them, and rows of empty slots are never read back.
        _tokens, dim = x.shape
        qkv = self.qkv(x)  # under autocast its dtype differs from that of x
        grid = qkv.new_zeros(packed.batch_size * packed.width, 3 * dim)
        grid = grid.index_copy(0, packed.grid, qkv)
        q, k, v = grid.view(
            packed.batch_size, packed.width, 3, self.num_heads, dim // self.num_heads
        ).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        y = y.transpose(1, 2).reshape(-1, dim)[packed.grid]
        return self.out(y)


class Block(nn.Module):
    """Attention and feed-forward with residuals, norm after (``post``) or before (``pre``)."""

    def __init__(
        self, dim: int, num_heads: int, dropout: float, norm: str, hidden: int, eps: float
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = CausalSelfAttention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(F.gelu(h) if self.pre else F.relu(h))

    def forward(self, x: Tensor, packed: PackedSequences) -> Tensor:
        if self.pre:
            x = x + self.drop(self.attention(self.norm1(x), packed))
            return x + self.drop(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x, packed)))
        return self.norm2(x + self.drop(self.feed_forward(x)))


class SASRec(nn.Module):
    """Self-attentive sequence encoder: item vectors in, one state per token out.

    Positions are right-aligned: the last item of every sequence stands at slot ``max_len - 1``.

    Args:
        dim: width d of item vectors and states.
        max_len: longest sequence.
        num_layers: blocks.
        num_heads: attention heads; must divide ``dim``.
        dropout: probability on the input, attention weights and residual branches.
        norm: ``"post"`` (authors: LayerNorm after each residual, ReLU, norm on the input) or
            ``"pre"`` (LayerNorm before each branch, GELU, one final norm).
        hidden: feed-forward width, default ``4 * dim``.
    """

    def __init__(
        self,
        dim: int = 128,
        max_len: int = 20,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        norm: str = "post",
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("post", "pre"):
            raise ValueError(f"norm must be 'post' or 'pre', got {norm!r}")
        self.dim, self.max_len, self.norm = dim, max_len, norm
        eps = 1e-6
        self.position = nn.Embedding(max_len, dim)
        self.edge_norm = nn.LayerNorm(dim, eps=eps)  # on the input (post) or the output (pre)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, dropout, norm, hidden or 4 * dim, eps) for _ in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, packed: PackedSequences) -> Tensor:
        """States of all tokens.

        Args:
            x: ``[T, d]`` item vectors of the packed tokens.
            packed: where the tokens stand.

        Returns:
            ``[T, d]`` states; row t has seen the tokens of its sequence up to t.
        """
        x = x + self.position(packed.positions)
        if self.norm == "post":
            x = self.edge_norm(x)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, packed)
        return self.edge_norm(x) if self.norm == "pre" else x
