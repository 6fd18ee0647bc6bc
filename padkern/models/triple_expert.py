"""Experts under a frequency gate, and the scorers that evaluation and serving use.

Score of item i for user state u: ``sum_e g_e(bin(i)) <u_e, v_e(i)>``. The gate sees the candidate
only, so the sum folds into one inner product of ``[u_1; u_2; u_3]`` with ``[g_1 v_1; g_2 v_2;
g_3 v_3]``: exact, and a single maximum-inner-product search at serving time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern.data.batch import PackedSequences, pack, pack_ragged, unpad
from padkern.models.build import build_expert
from padkern.models.gates import build_gate
from padkern.ops.catalogue_loss import catalogue_cross_entropy
from padkern.ops.triple_expert import gated_bce_loss

if TYPE_CHECKING:
    from padkern.data.dataset import Ragged
    from padkern.data.plan import BatchPlan
    from padkern.models.registry import EncoderFactory


class ExpertModel(nn.Module):
    """Any number of experts over one catalogue, mixed by a frequency gate when there are several.

    Args:
        experts: name -> :class:`padkern.models.expert.Expert` or its text-space form, of any
            widths d_e.
        text: ``[N + 1, E]`` frozen text matrix, row 0 zero.
        item_bins: ``[N + 1]`` int64 frequency bin of every item, 0 for padding.
        unseen_bin: bin of items without a training interaction. They get a zero ID vector and are
            left out of training losses; ``None`` treats every item alike.
        gate_form: see :func:`padkern.models.gates.build_gate`.
        gate_knots: of the ``"continuous"`` gate.
        train_frequency: ``[N + 1]`` training counts; needed by the ``"continuous"`` gate.
        backend: of the gated item matrix and of both losses.

    Raises:
        ValueError: shapes do not fit, or row 0 is not padding.
    """

    # nn.Module hides the types of what is registered on it.
    experts: Any
    gate: Any
    text: Tensor
    item_bins: Tensor
    id_scale: Tensor

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        text: Tensor,
        item_bins: Tensor,
        *,
        unseen_bin: int | None = None,
        gate_form: str = "scale",
        gate_knots: int = 6,
        train_frequency: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if text.ndim != 2:
            raise ValueError(f"text must be [num_items + 1, E], got {list(text.shape)}")
        if item_bins.shape != text.shape[:1]:
            raise ValueError(
                f"item_bins must be [{text.shape[0]}] like the rows of text, "
                f"got {list(item_bins.shape)}"
            )
        if int(item_bins[0]) != 0 or int(item_bins.min()) < 0:
            raise ValueError("item_bins must be >= 0 and 0 for padding (row 0)")
        self.experts = nn.ModuleDict(experts)
        self.backend = backend
        self.unseen_bin = unseen_bin
        bins = item_bins.to(torch.int64)
        num_bins = max(int(bins.max()), unseen_bin or 0)
        self.register_buffer("text", text.detach().to(torch.float32))
        self.register_buffer("item_bins", bins)
        seen = bins > 0 if unseen_bin is None else (bins > 0) & (bins != unseen_bin)
        self.register_buffer("id_scale", seen.to(torch.float32))
        self.gate = (
            build_gate(
                gate_form, bins, len(self.experts), num_bins=num_bins, unseen_bin=unseen_bin,
                train_frequency=train_frequency, knots=gate_knots,
            )
            if len(self.experts) > 1
            else None
        )  # fmt: skip

    @property
    def num_items(self) -> int:
        return self.text.shape[0] - 1

    @property
    def max_len(self) -> int:
        return next(iter(self.experts.values())).encoder.max_len

    def tables(self, hidden: Tensor | None = None, rows: Tensor | None = None) -> list[Tensor]:
        """Item vectors ``[N + 1, d_e]`` of every expert.

        Args:
            hidden: ``[N + 1]`` bool, items to treat as unseen: their ID vectors count as zero.
            rows: ``[U]`` item ids, each once: the vectors ``[U, d_e]`` of these alone.
        """
        scale = self.id_scale
        if hidden is not None:
            scale = scale.masked_fill(hidden, 0.0)
        # Gathered once for all towers: at 4096 values a row that is the largest copy of a step.
        text = self.text if rows is None else self.text.index_select(0, rows)
        return [expert.tower(text, scale, rows) for expert in self.experts.values()]

    def encode(
        self, tables: Sequence[Tensor], packed: PackedSequences, *, last: bool = False
    ) -> Tensor:
        """``[T, sum d_e]`` states of all tokens, the experts' states side by side.

        ``[B, sum d_e]``, those of each sequence's last token, with ``last``. An expert's dropout
        masks are those of its place in this model.
        """
        states = [
            expert.encode(table, packed.stream(number), last=last)
            for number, (expert, table) in enumerate(
                zip(self.experts.values(), tables, strict=True)
            )
        ]
        return states[0] if len(states) == 1 else torch.cat(states, 1)

    def bins(self, hidden: Tensor | None = None) -> Tensor:
        """``[N + 1]`` bins, hidden items in the unseen one."""
        if hidden is None:
            return self.item_bins
        if self.unseen_bin is None:
            raise ValueError("hidden items need a bin of their own: pass unseen_bin")
        return self.item_bins.masked_fill(hidden, self.unseen_bin)

    def fold(self, tables: Sequence[Tensor], hidden: Tensor | None = None) -> Tensor:
        """``[N + 1, sum d_e]`` gated item matrix; score = inner product with :meth:`encode`."""
        if self.gate is None:
            return tables[0]
        return self.gate.fold(tables, self.bins(hidden), backend=self.backend)

    def item_matrix(self, tables: Sequence[Tensor] | None = None) -> Tensor:
        """``[N + 1, sum d_e]`` folded item matrix, row 0 zero; from ``tables`` if given."""
        matrix = self.fold(self.tables() if tables is None else tables)
        return torch.cat([torch.zeros_like(matrix[:1]), matrix[1:]])

    def forward(self, items: Tensor, offsets: Tensor | None = None, *, last: bool = True) -> Tensor:
        """User states.

        Args:
            items: ``[T]`` packed item ids with ``offsets``, or ``[B, L]`` padded with 0 on either
                side without.
            offsets: ``[B + 1]`` int64 cumulative lengths.
            last: states of each sequence's last item only; ``False`` gives all tokens.

        Returns:
            ``[B, sum d_e]``, or ``[T, sum d_e]`` with ``last=False``.

        Raises:
            ValueError: an id outside 1..N, an empty sequence, or one longer than ``max_len``.
        """
        if offsets is None:
            if items.ndim != 2:
                raise ValueError(f"items without offsets must be [B, L], got {list(items.shape)}")
            items, offsets = unpad(items)
        self._check_ids(items, "items")
        packed = pack(items, offsets, self.max_len)
        return self.encode(self.tables(), packed, last=last)

    def loss(
        self,
        packed: PackedSequences,
        targets: Tensor,
        *,
        candidates: Tensor | None = None,
        negatives: Tensor | None = None,
        hidden: Tensor | None = None,
        positive_weight: float = 1.0,
    ) -> Tensor:
        """Recommendation loss of next-item targets.

        Args:
            packed: input tokens.
            targets: ``[T]`` int64 item ids, 1..N.
            candidates: ``[C]`` sorted item ids of the softmax; default: every item that has been
                seen in training. Must hold all targets.
            negatives: ``[T, k]`` sampled item ids: binary cross-entropy
                ``w mean softplus(-s+) + mean softplus(s-)`` in place of the softmax.
            hidden: ``[N + 1]`` bool, items treated as unseen in this step.
            positive_weight: w of the binary cross-entropy; see
                :func:`padkern.ops.triple_expert.gbce_positive_weight`.

        Returns:
            Scalar.

        Raises:
            ValueError: a target outside 1..N or not among the candidates, or an unfit weight.
        """
        self._check_ids(targets, "targets")
        if negatives is None:
            allowed = self.seen_items() if candidates is None else candidates
            outside = targets[~torch.isin(targets, allowed)]
            if outside.numel():
                raise ValueError(
                    f"targets must be among the candidates, got item {int(outside[0])}"
                )
        tables = self.tables(hidden)
        states = self.encode(tables, packed)
        return self.loss_from(
            tables, states, targets, candidates=candidates, negatives=negatives, hidden=hidden,
            positive_weight=positive_weight,
        )  # fmt: skip

    def loss_from(
        self,
        tables: Sequence[Tensor],
        states: Tensor,
        targets: Tensor,
        *,
        candidates: Tensor | None = None,
        negatives: Tensor | None = None,
        hidden: Tensor | None = None,
        positive_weight: float = 1.0,
    ) -> Tensor:
        """:meth:`loss` for tables and states that are already there."""
        if negatives is not None:
            bins = self.item_bins if self.gate is None else self.bins(hidden)
            return self._gated_bce(tables, states, bins, targets, negatives, positive_weight)
        if positive_weight != 1.0:
            raise ValueError(f"positive_weight must be 1 without negatives, got {positive_weight}")
        if candidates is None:
            candidates = self.seen_items()
        return catalogue_cross_entropy(
            states,
            self.fold(tables, hidden),
            targets,
            candidates=candidates,
            backend=self.backend,
        )

    def plan_loss(
        self, plan: BatchPlan, *, hidden: Tensor | None = None, positive_weight: float = 1.0
    ) -> Tensor:
        """:meth:`loss` with the plan's negatives, from the vectors of the batch's items alone.

        Args:
            plan: on the device of the model, at least one negative per token.
            hidden, positive_weight: as in :meth:`loss`.
        """
        tables = self.tables(hidden, plan.unique)
        states = self.encode(tables, plan.local_inputs)
        bins = plan.bins if self.gate is None else self.bins(hidden).index_select(0, plan.unique)
        slots = (plan.target_rows, plan.negative_rows)
        return self._gated_bce(
            tables, states, bins, *slots, positive_weight, items=plan.unique, valid=plan.valid
        )

    def _gated_bce(
        self,
        tables: Sequence[Tensor],
        states: Tensor,
        bins: Tensor,
        targets: Tensor,
        negatives: Tensor,
        positive_weight: float,
        items: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The gated loss; ``targets`` and ``negatives`` are rows of ``tables`` and ``bins``, those
        of ``items``, by default of the whole catalogue; of ``valid`` tokens alone."""
        if self.gate is None:
            weights, bins = states.new_ones(1, 1), torch.zeros_like(bins)
        else:
            tables, weights, bins = self.gate.operands(tables, bins, items)
        width = max(table.shape[1] for table in tables)
        parts = states.split([table.shape[1] for table in tables], 1)
        users = torch.stack([F.pad(part, (0, width - part.shape[1])) for part in parts], 1)
        items = torch.stack([F.pad(table, (0, width - table.shape[1])) for table in tables])
        return gated_bce_loss(
            users, items, weights, bins, targets, negatives, valid=valid,
            positive_weight=positive_weight, backend=self.backend,
        )  # fmt: skip

    def seen_items(self) -> Tensor:
        """Sorted ids of items that may be candidates in training."""
        return torch.nonzero(self.id_scale).squeeze(1)

    def user_states(self, history: Ragged, tables: Sequence[Tensor] | None = None) -> Tensor:
        """``[n, sum d_e]`` states of histories, of each the last ``max_len`` items.

        Args:
            history: item ids, oldest first.
            tables: of :meth:`tables`, where the caller has them; else they are computed.
        """
        packed = pack_ragged(history, self.max_len).to(self.text.device)
        return self.encode(self.tables() if tables is None else tables, packed, last=True)

    def frozen(self) -> FrozenExperts:
        """A scorer for many calls: item vectors are computed once, as the weights are now."""
        return FrozenExperts(self, self.tables())

    def _check_ids(self, ids: Tensor, name: str) -> None:
        if ids.numel() and (int(ids.min()) < 1 or int(ids.max()) > self.num_items):
            raise ValueError(
                f"{name} must be item ids from 1 to {self.num_items}, "
                f"got {int(ids.min())} to {int(ids.max())}"
            )


class FrozenExperts:
    """An :class:`ExpertModel` with its item vectors at hand.

    Args:
        model: its weights must not change meanwhile.
        tables: ``[N + 1, d_e]`` per expert.
    """

    def __init__(self, model: ExpertModel, tables: Sequence[Tensor]) -> None:
        self.model, self.tables = model, tables

    def user_states(self, history: Ragged) -> Tensor:
        """As :meth:`ExpertModel.user_states`."""
        return self.model.user_states(history, self.tables)

    def item_matrix(self) -> Tensor:
        """As :meth:`ExpertModel.item_matrix`."""
        return self.model.item_matrix(self.tables)


class TripleExpert(ExpertModel):
    """PAD's model: a recommendation, an aligned and a language expert under a frequency gate.

    Args:
        num_items: catalogue size N.
        text: ``[N + 1, E]`` frozen text matrix, row 0 zero (padding).
        item_bins: ``[N + 1]`` int64 frequency bins, 0 for padding.
        dim: width d of each expert.
        max_len: longest history.
        encoder: ``"sasrec"`` (post-LN), ``"sasrec_pre_ln"``, ``"gru4rec"``, ``"caser"``, a
            registered name, or a factory called as ``encoder(dim, max_len, num_layers=,
            num_heads=, dropout=)``; each expert has one of its own.
        encoder_options: further arguments of the encoder, such as ``{"window": 8}`` of a Caser.
        num_layers: encoder blocks; none in a Caser.
        num_heads: attention heads of a SASRec.
        dropout: of the encoders.
        backend: of the gated item matrix and of both losses: "auto", "reference", "native"
            or "triton".
        unseen_bin: bin of items never seen in training; ``None``: no such bin.
        gate_form: ``"scale"``, ``"sigmoid"``, ``"uniform"``, ``"continuous"`` or ``"per_item"``,
            see :func:`padkern.models.gates.build_gate`.
        gate_knots: of the ``"continuous"`` gate.
        train_frequency: ``[N + 1]`` training counts; needed by the ``"continuous"`` gate.
        fuse: ``"sum"``, ``"cat"`` or ``"null_space"``, how the aligned expert joins ID and text
            vectors, see :class:`padkern.models.expert.ItemTower`.
        null_dim: width of the IDs with ``"null_space"``.
        text_layers: hidden layers of the text projections.
        text_maps: above 1, linear maps that an item's text mixes beside a shared one.
        pool_decay: starting decay of the recency path of the experts that see text; ``None``: none
            (0.6 in the ``"text_space"`` language expert, which always has one).
        pool_scale: starting factor of the aligned expert's recency path.
        language: ``"text_space"`` (the language expert scores in the text space, width E) or
            ``"projected"`` (width d, as released).
        id_init: ``"scaled"``, ``"xavier"`` or ``"text"``, see
            :func:`padkern.models.build.build_expert`.

    Shape:
        ``forward(items [T], offsets [B + 1])`` gives ``[B, W]``; ``item_matrix()`` gives
        ``[N + 1, W]``; score = inner product. W = 2 dim + E, or 3 dim with ``"projected"``.

    Raises:
        ValueError: a shape or option does not fit.

    Source: Wang et al. 2024, arXiv:2412.04107; gate and fold as in the released code.
    """

    #: Name of each expert -> its kind, in the order of the gate's columns.
    KINDS: Mapping[str, str] = {"rec": "id", "aligned": "fused", "language": "text"}
    NAMES = tuple(KINDS)

    def __init__(
        self,
        num_items: int,
        text: Tensor,
        item_bins: Tensor,
        *,
        dim: int = 128,
        max_len: int = 20,
        encoder: str | EncoderFactory = "sasrec",
        encoder_options: Mapping[str, Any] | None = None,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        backend: str = "auto",
        unseen_bin: int | None = None,
        gate_form: str = "scale",
        gate_knots: int = 6,
        train_frequency: Tensor | None = None,
        fuse: str = "sum",
        null_dim: int = 32,
        text_layers: int = 0,
        text_maps: int = 1,
        pool_decay: float | None = 0.6,
        pool_scale: float = 3.0,
        language: str = "text_space",
        id_init: str = "scaled",
    ) -> None:
        if text.shape[:1] != (num_items + 1,):
            raise ValueError(f"text must have {num_items + 1} rows, got {list(text.shape)}")
        experts = {
            name: build_expert(
                kind, num_items, text, dim=dim, max_len=max_len,
                encoder=encoder, encoder_options=encoder_options,
                num_layers=num_layers, num_heads=num_heads, dropout=dropout, fuse=fuse,
                null_dim=null_dim, text_layers=text_layers, text_maps=text_maps,
                pool_decay=pool_decay, pool_scale=pool_scale, language=language, id_init=id_init,
            )
            for name, kind in self.KINDS.items()
        }  # fmt: skip
        super().__init__(
            experts, text, item_bins, unseen_bin=unseen_bin, gate_form=gate_form,
            gate_knots=gate_knots, train_frequency=train_frequency, backend=backend,
        )  # fmt: skip
