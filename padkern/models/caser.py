"""Caser encoder over packed tokens.

Source: Tang and Wang 2018, "Personalized top-N sequential recommendation via convolutional
sequence embedding", WSDM, doi 10.1145/3159652.3159656.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern.data.batch import PackedSequences
from padkern.models.encoder import PackedEncoder
from padkern.models.projection import Linear


class Caser(PackedEncoder):
    """Convolutional sequence encoder: item vectors in, one state per token out.

    The state of a token is what Caser makes of the image ``[window, d]`` of the last ``window``
    tokens, rows before the start of the sequence zero: horizontal filters of every height 1..window
    (ReLU, maximum over their places), vertical filters (weighted sums of the rows), a ReLU layer
    over both.

    Against the paper: no user embedding, so that users who are not in training have states too and
    the experts see a user through the history alone, as in PAD; the output layer over all items is
    the product of the state with the expert's item vectors, and a linear map before it frees the
    state from the sign of the ReLU.

    Args:
        dim: width d of item vectors and states.
        max_len: longest sequence.
        window: tokens that a state sees, 1..max_len.
        horizontal: filters of each height.
        vertical: vertical filters.
        dropout: probability on the outputs of the filters.

    Shape:
        ``forward(x [T, d], packed)`` gives ``[T, d]``, or ``[B, d]`` with ``last=True``.

    Raises:
        ValueError: a size or the probability is out of range.

    Source: Tang and Wang 2018, doi 10.1145/3159652.3159656; default sizes as in the authors' code
    (graytowne/caser_pytorch at 3e9ccfc).
    """

    # nn.Module hides the types of what is registered on it.
    horizontal: Any

    def __init__(
        self,
        dim: int = 128,
        max_len: int = 20,
        *,
        window: int = 5,
        horizontal: int = 16,
        vertical: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(dim, max_len, dropout)
        if not 1 <= window <= max_len:
            raise ValueError(f"window must lie in 1..{max_len} (max_len), got {window}")
        for name, value in (("horizontal", horizontal), ("vertical", vertical)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.window = window
        # A horizontal filter spans the width of the image: a convolution over d channels.
        self.horizontal = nn.ModuleList(
            nn.Conv1d(dim, horizontal, height) for height in range(1, window + 1)
        )
        self.vertical = Linear(window, vertical, bias=False)
        self.mix = Linear(window * horizontal + vertical * dim, dim)
        self.out = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier on weights, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, packed: PackedSequences, *, last: bool = False) -> Tensor:
        """See :class:`padkern.models.encoder.SequenceEncoder`."""
        masks = self.masks(packed)
        steps = packed.steps[:, None]
        features = torch.cat([self._horizontal(x, steps), self._vertical(x, steps)], 1)
        if last:
            features = features.index_select(0, packed.last)
        features = masks.drop(features, 0, packed.last if last else None)
        return self.out(F.relu(self.mix(features)))

    def _horizontal(self, x: Tensor, steps: Tensor) -> Tensor:
        """``[T, window * filters]`` maxima, low filters first.

        A filter's response at a token is the same in every window that holds it, so each is
        computed once: one product per row of the filter, added with its lag. Every response before
        the start of a sequence is the bias.
        """
        size = self.horizontal[0].out_channels
        rows = [
            filters.weight[:, :, -1 - lag]
            for lag in range(self.window)
            for filters in self.horizontal[lag:]  # height > lag
        ]
        widths = [(self.window - lag) * size for lag in range(self.window)]
        products = F.linear(x, torch.cat(rows)).split(widths, 1)
        bias = torch.cat([filters.bias for filters in self.horizontal])
        response = products[0] + bias
        for lag in range(1, self.window):
            response = response + F.pad(_lagged(products[lag], steps, lag), (lag * size, 0))
        highest = response
        pooled = []
        for lag in range(1, self.window):
            pooled.append(highest[:, widths[lag] :])  # the height window - lag + 1 is complete
            part = slice(widths[lag])
            before = torch.where(steps < lag, bias[part], response[:, part].roll(lag, 0))
            highest = torch.maximum(highest[:, part], before)
        return F.relu(torch.cat([highest, *reversed(pooled)], 1))

    def _vertical(self, x: Tensor, steps: Tensor) -> Tensor:
        """``[T, filters * d]`` weighted sums of the last tokens' vectors, weights oldest first."""
        tokens, dim = x.shape
        rows = [_lagged(x, steps, lag) for lag in reversed(range(self.window))]
        image = torch.stack(rows).view(self.window, tokens * dim)
        count = self.vertical.out_features
        sums = (self.vertical.weight @ image).view(count, tokens, dim)
        return sums.transpose(0, 1).reshape(tokens, count * dim)


def _lagged(x: Tensor, steps: Tensor, lag: int) -> Tensor:
    """Row t is the row of the token ``lag`` places before t, zero before the sequence's start."""
    return x.roll(lag, 0).masked_fill(steps < lag, 0.0) if lag else x
