"""SASRec encoder over packed tokens: the authors' post-LN form and a modern pre-LN one.

Matrix products run through :mod:`padkern.ops.linear`, attention and everything between them
through :mod:`padkern.ops.short_attention` and :mod:`padkern.ops.dropout_add_norm`: on the CPU one
pass each, elsewhere plain torch. Dropout masks are keyed, see :mod:`padkern.models.encoder`.

Source: Kang and McAuley 2018, arXiv:1808.09781; the post-LN layout follows the PAD release
(Applied-Machine-Learning-Lab/PAD at 506c72d, ``model/modules.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern.data.batch import PackedSequences
from padkern.models.encoder import Masks, PackedEncoder
from padkern.models.projection import Linear, project
from padkern.ops.dropout_add_norm import dropout_add_norm
from padkern.ops.short_attention import short_attention_qkv


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention within each packed sequence; projections without bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.out = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, packed: PackedSequences, mask: dict[str, Any]) -> Tensor:
        """``[T, d]`` from ``[T, d]``; ``mask`` holds the arguments of the dropout."""
        tokens, dim = x.shape
        # Under autocast the dtype of qkv differs from that of x.
        qkv = self.qkv(x).view(tokens, 3, self.num_heads, dim // self.num_heads)
        y = short_attention_qkv(qkv, packed.offsets, longest=max(packed.width, 1), **mask)
        return self.out(y.reshape(tokens, dim))

    def last(self, x: Tensor, packed: PackedSequences) -> Tensor:
        """``[B, d]``: the rows of :meth:`forward` of each sequence's last token, no dropout."""
        dim = x.shape[1]
        heads, width, batch = self.num_heads, packed.width, packed.batch_size
        w_query, w_rest = self.qkv.weight.split([dim, 2 * dim])
        q = project(x.index_select(0, packed.last), w_query)
        rest = project(x, w_rest)
        grid = rest.new_zeros(batch * width, 2 * dim).index_copy(0, packed.grid, rest)
        k, v = grid.view(batch, width, 2, heads, dim // heads).permute(2, 0, 3, 1, 4)
        lengths = packed.offsets[1:] - packed.offsets[:-1]
        real = torch.arange(width, device=x.device) < lengths[:, None]
        y = F.scaled_dot_product_attention(
            q.view(batch, heads, 1, dim // heads), k, v, attn_mask=real[:, None, None]
        )
        return self.out(y.reshape(batch, dim))


class Block(nn.Module):
    """Attention and feed-forward with residuals, norm after (``post``) or before (``pre``).

    :class:`SASRec` runs its parts: each residual sum is one pass with the norm behind it, which in
    the ``pre`` form belongs to the next part.
    """

    def __init__(self, dim: int, num_heads: int, norm: str, hidden: int, eps: float) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = CausalSelfAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Two linear maps; the second one's bias is left to the residual sum."""
        h = self.up(x, relu=not self.pre)
        return project(F.gelu(h) if self.pre else h, self.down.weight)


class SASRec(PackedEncoder):
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

    # nn.Module hides the types of what is registered on it.
    blocks: Any

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
        super().__init__(dim, max_len, dropout)
        if norm not in ("post", "pre"):
            raise ValueError(f"norm must be 'post' or 'pre', got {norm!r}")
        self.norm = norm
        eps = 1e-6
        self.position = nn.Embedding(max_len, dim)
        self.edge_norm = nn.LayerNorm(dim, eps=eps)  # on the input (post) or the output (pre)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, norm, hidden or 4 * dim, eps) for _ in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, packed: PackedSequences, *, last: bool = False) -> Tensor:
        """States of all tokens.

        Args:
            x: ``[T, d]`` item vectors of the packed tokens.
            packed: where the tokens stand, and the key of the dropout masks.
            last: states of each sequence's last token only; without dropout the last block then
                computes nothing else.

        Returns:
            ``[T, d]`` states; row t has seen the tokens of its sequence up to t. ``[B, d]`` with
            ``last``.
        """
        masks = self.masks(packed)
        run = self._pre if self.norm == "pre" else self._post
        short = last and masks.dropout == 0.0 and len(self.blocks) > 0
        states = run(x, packed, masks, short)
        return states.index_select(0, packed.last) if last and not short else states

    def _post(self, x: Tensor, packed: PackedSequences, masks: Masks, short: bool) -> Tensor:
        x = _add_norm(self.edge_norm, x, self.position(packed.positions))
        x = masks.drop(x, 0)
        for number, block in enumerate(self.blocks):
            place = 3 * number + 1
            if short and number + 1 == len(self.blocks):
                branch = block.attention.last(x, packed)
                x = x.index_select(0, packed.last)
            else:
                branch = block.attention(x, packed, masks.at(place))
            x = _add_norm(block.norm1, branch, x, **masks.at(place + 1))
            branch = block.feed_forward(x)
            x = _add_norm(block.norm2, branch, x, bias=block.down.bias, **masks.at(place + 2))
        return x

    def _pre(self, x: Tensor, packed: PackedSequences, masks: Masks, short: bool) -> Tensor:
        blocks = list(self.blocks)
        x = x + self.position(packed.positions)
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        norms = [*norms, self.edge_norm]
        normed, x = _add_norm(norms[0], x, None, return_sum=True, **masks.at(0))
        for number, block in enumerate(blocks):
            place = 3 * number + 1
            if short and number + 1 == len(blocks):
                branch = block.attention.last(normed, packed)
                x = x.index_select(0, packed.last)
            else:
                branch = block.attention(normed, packed, masks.at(place))
            normed, x = _add_norm(
                norms[2 * number + 1], branch, x, return_sum=True, **masks.at(place + 1)
            )
            branch = block.feed_forward(normed)
            normed, x = _add_norm(
                norms[2 * number + 2], branch, x,
                bias=block.down.bias, return_sum=True, **masks.at(place + 2),
            )  # fmt: skip
        return normed


def _add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None, **options: Any) -> Any:
    return dropout_add_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, **options)
