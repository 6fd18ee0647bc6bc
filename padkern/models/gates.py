"""Gates with a weight per item, and the choice of a gate by name.

Every gate sees the candidate item alone, so that the experts fold into one item matrix whatever the
gate. The gated operations take a table ``[bins, E]`` and a row of it per item, and sum the table's
gradient block by block: for tens of bins that costs nothing, for a row per item it would take up to
64 tables of the catalogue's size (CPU) or items x items comparisons (Triton). A gate per item
therefore scales the experts' vectors itself, in plain torch on any device, and hands the gated loss
a table of ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from padkern.modules import GATE_FORMS, FrequencyGate
from padkern.ops.linear import linear

ITEM_FORMS = ("continuous", "per_item")


class ItemGate(FrequencyGate):
    """Weights ``exp(mix_i . logit)`` of item i: mixtures of a small table's rows, or more.

    ``"continuous"``: the table's rows are knots, and an item lies between two of them.
    ``"per_item"``: the table's rows are bins, and every seen item adds a logit of its own per
    expert, which :meth:`spread` keeps small. An item that is unseen, or hidden in this step, reads
    the unseen row and nothing of its own.

    Args:
        mix: ``[N + 1, R]`` weights of the table's R rows in the logits of every item.
        num_experts: E.
        form: ``"continuous"`` or ``"per_item"``.
        unseen_bin: bin of unseen items; ``None``: no such bin.
        unseen_row: row of the table that they read.

    The parameter ``logit`` is ``[R, E]``, with ``"per_item"`` followed by the ``[N + 1, E]`` logits
    of the items.
    """

    FORMS = ITEM_FORMS
    mix: Tensor

    def __init__(
        self,
        mix: Tensor,
        num_experts: int = 3,
        *,
        form: str = "continuous",
        unseen_bin: int | None = None,
        unseen_row: int | None = None,
    ) -> None:
        super().__init__(mix.shape[1] - 1, num_experts, form=form)
        self.register_buffer("mix", mix.to(torch.float32), persistent=False)
        self.unseen_bin = unseen_bin
        self._unseen_row = unseen_row
        if form == "per_item":
            own = torch.zeros(len(mix), num_experts)
            self.logit = nn.Parameter(torch.cat([self.logit.detach(), own]))

    def fresh(self) -> Tensor:
        """Logits of equal weights 1 / E, of the shape of ``logit``: items add nothing."""
        logit = super().fresh()
        logit[self.mix.shape[1] :] = 0.0
        return logit

    @torch.no_grad()
    def grow(self, count: int, new_bin: int) -> None:
        """Makes room for ``count`` more items of bin ``new_bin``, with nothing of their own.

        Without an unseen bin those of ``"continuous"`` lie at the coldest knot.
        """
        row = self.mix.new_zeros(count, self.mix.shape[1])
        if self.unseen_bin is not None:
            row[:, self.unseen_row(self.unseen_bin)] = 1.0
        else:
            row[:, 1 if self.form == "continuous" else new_bin] = 1.0
        self.mix = torch.cat([self.mix, row])
        if self.form == "per_item":
            own = self.logit.new_zeros(count, self.logit.shape[1])
            self.logit = nn.Parameter(torch.cat([self.logit, own]), self.logit.requires_grad)

    def weights(self) -> Tensor:
        """``[R, E]`` weights of the table's rows: knots, or bins."""
        return self._table().exp()

    def forward(self, bins: Tensor, items: Tensor | None = None) -> Tensor:
        """``[n, E]`` weights of items.

        Args:
            bins: ``[n]`` bins of these items; those in the unseen bin read its row.
            items: ``[n]`` their ids, each once; default the whole catalogue in order.
        """
        mix = self.mix if items is None else self.mix.index_select(0, items)
        unseen = None
        if self.unseen_bin is not None:
            unseen = (bins == self.unseen_bin)[:, None]
            row = torch.zeros_like(mix[:1])
            row[:, self.unseen_row(self.unseen_bin)] = 1.0
            mix = torch.where(unseen, row, mix)
        # A product, where indexing would add up the gradient in no fixed order on a GPU.
        logit = linear(mix, self._table().t())
        if self.form == "per_item":
            own = self._own() if items is None else self._own().index_select(0, items)
            logit = logit + (own if unseen is None else own.masked_fill(unseen, 0.0))
        return logit.exp()

    def per_bin(self, bins: Tensor, num_bins: int) -> Tensor:
        """``[num_bins + 1, E]`` mean weights of the items of every bin, 0 for an empty one."""
        weights = self(bins)
        empty = weights.new_zeros(weights.shape[1])
        rows = [weights[bins == b] for b in range(num_bins + 1)]
        return torch.stack([row.mean(0) if len(row) else empty for row in rows])

    def unseen_row(self, unseen_bin: int) -> int:
        """Row of ``logit`` that unseen items read."""
        return unseen_bin if self._unseen_row is None else self._unseen_row

    def fold(self, tables: Sequence[Tensor], bins: Tensor, *, backend: str = "auto") -> Tensor:
        """``[N + 1, sum d_e]`` gated item matrix; plain torch, whatever the ``backend``."""
        return torch.cat(self._scaled(tables, self(bins)), 1)

    def operands(
        self, tables: Sequence[Tensor], bins: Tensor, items: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """The tables scaled, a table of ones, and its only row; see the module."""
        weights = self(bins, items)
        ones = weights.new_ones(1, len(tables))
        return self._scaled(tables, weights), ones, torch.zeros_like(bins)

    def spread(self) -> Tensor:
        """Mean over the items of ``sum_e own_e^2``: the penalty on logits of their own."""
        return self._own()[1:].square().sum(1).mean()

    @staticmethod
    def _scaled(tables: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        return [table * weights[:, e : e + 1] for e, table in enumerate(tables)]

    def _table(self) -> Tensor:
        return self.logit[: self.mix.shape[1]]

    def _own(self) -> Tensor:
        return self.logit[self.mix.shape[1] :]


def knot_mix(
    train_frequency: Tensor, item_bins: Tensor, knots: int, unseen_bin: int | None = None
) -> Tensor:
    """Weights of piecewise-linear interpolation in ``log(1 + training count)``.

    The knots divide the range of the seen items' logarithms evenly. Row 0 of the table is that of
    padding, rows 1 to ``knots`` are the knots, coldest first, and with ``unseen_bin`` one more is
    that of the unseen items.

    Args:
        train_frequency: ``[N + 1]`` training counts, index 0 ignored.
        item_bins: ``[N + 1]`` bins, for who is unseen.
        knots: at least 2.
        unseen_bin: bin of unseen items; ``None``: a count of 0 is interpolated like any other.

    Returns:
        ``[N + 1, 1 + knots (+ 1)]`` float32 on the CPU, every row's sum 1.

    Raises:
        ValueError: a shape, a negative count or the number of knots does not fit.
    """
    if train_frequency.shape != item_bins.shape:
        raise ValueError(
            f"train_frequency must have shape {list(item_bins.shape)}, "
            f"got {list(train_frequency.shape)}"
        )
    if bool((train_frequency < 0).any()):
        raise ValueError(f"train_frequency must be >= 0, got {train_frequency.min().item()}")
    if knots < 2:
        raise ValueError(f"knots must be at least 2, got {knots}")
    place, item_bins = train_frequency.cpu().double().log1p(), item_bins.cpu()
    seen = torch.ones_like(item_bins, dtype=torch.bool)
    seen[0] = False
    if unseen_bin is not None:
        seen &= item_bins != unseen_bin
    if bool(seen.any()):
        low, high = place[seen].min(), place[seen].max()
        # Items that are all alike lie at the first knot.
        place = (place - low) / (high - low).clamp_min(1e-12) * (knots - 1)
    before = place.floor().clamp(0, knots - 2)
    part = (place - before).clamp(0, 1)[:, None]
    row = before.long()[:, None] + 1
    mix = torch.zeros(len(place), 1 + knots + (unseen_bin is not None), dtype=torch.float64)
    mix.scatter_(1, row, 1 - part).scatter_(1, row + 1, part)
    mix[~seen] = 0.0
    mix[~seen, -1] = 1.0
    mix[0] = 0.0
    mix[0, 0] = 1.0
    return mix.float()


def build_gate(
    form: str,
    item_bins: Tensor,
    num_experts: int,
    *,
    num_bins: int,
    unseen_bin: int | None = None,
    train_frequency: Tensor | None = None,
    knots: int = 6,
) -> FrequencyGate:
    """A gate with equal weights.

    Args:
        form: ``"scale"``, ``"sigmoid"`` or ``"uniform"`` of :class:`FrequencyGate`;
            ``"continuous"`` or ``"per_item"`` of :class:`ItemGate`.
        item_bins: ``[N + 1]`` int64 bin of every item, 0 for padding.
        num_experts: E.
        num_bins: highest bin.
        unseen_bin: bin of unseen items; ``None``: no such bin.
        train_frequency: ``[N + 1]`` training counts; needed by ``"continuous"``.
        knots: of ``"continuous"``, see :func:`knot_mix`.

    Raises:
        ValueError: an unknown form, no training counts where they are needed, or as
            :func:`knot_mix`.
    """
    if form in GATE_FORMS:
        return FrequencyGate(num_bins, num_experts, form=form)
    if form == "per_item":
        mix = nn.functional.one_hot(item_bins.cpu(), num_bins + 1)
        row = unseen_bin
    elif form == "continuous":
        if train_frequency is None:
            raise ValueError("gate_form 'continuous' needs train_frequency")
        mix = knot_mix(train_frequency, item_bins, knots, unseen_bin)
        row = None if unseen_bin is None else mix.shape[1] - 1
    else:
        forms = ", ".join((*GATE_FORMS, *ITEM_FORMS))
        raise ValueError(f"gate_form must be one of {forms}, got {form!r}")
    return ItemGate(mix, num_experts, form=form, unseen_bin=unseen_bin, unseen_row=row)
