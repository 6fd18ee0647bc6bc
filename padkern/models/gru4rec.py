"""GRU4Rec encoder over packed tokens.

Source: Hidasi et al. 2016, "Session-based recommendations with recurrent neural networks",
arXiv:1511.06939.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from padkern.data.batch import PackedSequences
from padkern.models.encoder import PackedEncoder
from padkern.models.projection import Linear


class StepOrder(NamedTuple):
    """Packed tokens by step: all first tokens, then all second ones, longest sequence first.

    Attributes:
        order: ``[T]`` int64 tokens in that order.
        back: ``[T]`` int64 place of every token in it.
        counts: ``[width]`` int64 tokens per step, on the CPU.
    """

    order: Tensor
    back: Tensor
    counts: Tensor


def step_order(packed: PackedSequences) -> StepOrder:
    """The order in which a recurrent network takes the tokens; sequences of a length stay in
    their order."""
    longest_first = torch.argsort(packed.offsets.diff(), descending=True, stable=True)
    rank = torch.argsort(longest_first)
    rows = packed.grid // max(packed.width, 1)
    order = torch.argsort(packed.steps * packed.batch_size + rank[rows])
    counts = torch.bincount(packed.steps, minlength=packed.width)
    return StepOrder(order, torch.argsort(order), counts.cpu())


class GRU4Rec(PackedEncoder):
    """Gated recurrent sequence encoder: item vectors in, one state per token out.

    Every step runs over the sequences that are that long, so no padding is computed. The cell is
    torch's, which applies the reset gate after the recurrent product. Against the paper: item
    vectors in place of one-hot input, and the output layer over all items is the product of the
    state with the expert's item vectors; the linear map before it gives states the scale that GRU
    outputs, between -1 and 1, lack.

    Args:
        dim: width d of item vectors and states.
        max_len: longest sequence; the network itself has no such limit.
        num_layers: GRU layers.
        dropout: probability on the input and on the output of each layer.
        hidden: width of the layers, default ``dim``.

    Shape:
        ``forward(x [T, d], packed)`` gives ``[T, d]``, or ``[B, d]`` with ``last=True``.

    Raises:
        ValueError: a size below 1, or the probability is out of range.

    Source: Hidasi et al. 2016, arXiv:1511.06939.
    """

    # nn.Module hides the types of what is registered on it.
    layers: Any

    def __init__(
        self,
        dim: int = 128,
        max_len: int = 20,
        *,
        num_layers: int = 1,
        dropout: float = 0.2,
        hidden: int | None = None,
    ) -> None:
        super().__init__(dim, max_len, dropout)
        hidden = dim if hidden is None else hidden
        for name, value in (("num_layers", num_layers), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.layers = nn.ModuleList(
            nn.GRU(hidden if number else dim, hidden) for number in range(num_layers)
        )
        self.out = Linear(hidden, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier on inputs, orthogonal on the recurrence, gate by gate; zero biases."""
        for layer in self.layers:
            for gate in layer.weight_ih_l0.data.chunk(3):
                nn.init.xavier_normal_(gate)
            for gate in layer.weight_hh_l0.data.chunk(3):
                nn.init.orthogonal_(gate)
            nn.init.zeros_(layer.bias_ih_l0)
            nn.init.zeros_(layer.bias_hh_l0)
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, packed: PackedSequences, *, last: bool = False) -> Tensor:
        """See :class:`padkern.models.encoder.SequenceEncoder`."""
        masks = self.masks(packed)
        if not len(x):
            return self.out(x.new_zeros(0, self.out.in_features))
        order, back, counts = step_order(packed)
        # Under autocast x may be of a half type, which nn.GRU refuses.
        states = x.index_select(0, order).to(self.out.weight.dtype)
        states = masks.drop(states, 0, order)
        for number, layer in enumerate(self.layers):
            states = layer(PackedSequence(states, counts))[0].data
            states = masks.drop(states, number + 1, order)
        return self.out(states.index_select(0, back[packed.last] if last else back))
