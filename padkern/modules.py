"""Small modules: losses over :mod:`padkern.functional`, and the gate on item frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from padkern.functional import mkmmd_loss
from padkern.ops.gated_table import gated_table
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FrequencyGate", "MKMMDLoss"]

GATE_FORMS = ("scale", "sigmoid", "uniform")


class MKMMDLoss(nn.Module):
    """:func:`padkern.mkmmd_loss` as a module.

    Args:
        alphas: Bandwidth multipliers, > 0.
        betas: Weights of the kernels; None for ones.
        kernel: "gaussian", "laplacian", "inverse_multiquadric", "rational_quadratic" or "energy".
        sigma_sq: Squared bandwidth; None or "median" finds it from the data of each call.
        estimator: "unbiased", "biased" or "tllib".
        learn_alphas: Trains the multipliers: the parameter ``log_alphas`` [K] starts at their
            logarithms.
        learn_betas: Trains the weights: the parameter ``beta_logits`` [K]; the weights are its
            softmax times the sum of ``betas``, so they stay positive and their sum stays.
        group: A torch.distributed process group: the loss over the rows of all ranks.
        precision: "float32" or "tf32", for GPU products of float32 inputs.
        backend: "auto", "reference", "native", "triton" or "cuda".

    A test wants the kernel that separates the samples best (maximise), an alignment the features
    that separate least (minimise); with learned kernels these pull against each other, so give the
    module's parameters an optimiser of their own with the opposite sign, as adversarial MMD does.

    Raises:
        ValueError: A learned weight starts at 0 or below, or "energy" is to learn what it has not.
    """

    def __init__(
        self,
        alphas: Sequence[float] = DEFAULT_ALPHAS,
        *,
        betas: Sequence[float] | None = None,
        kernel: str = "gaussian",
        sigma_sq: float | str | None = None,
        estimator: str = "unbiased",
        learn_alphas: bool = False,
        learn_betas: bool = False,
        group: ProcessGroup | None = None,
        precision: str = "float32",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if kernel == "energy" and (learn_alphas or learn_betas):
            raise ValueError("kernel 'energy' has no bandwidth or weight to learn")
        self.alphas = tuple(alphas)
        self.betas = None if betas is None else tuple(betas)
        self.kernel = kernel
        self.sigma_sq = sigma_sq
        self.estimator = estimator
        self.group = group
        self.precision = precision
        self.backend = backend
        self.log_alphas = self.beta_logits = None
        if learn_alphas:
            self.log_alphas = nn.Parameter(torch.tensor(self.alphas).log())
        if learn_betas:
            start = self.betas or (1.0,) * len(self.alphas)
            for beta in start:
                if not beta > 0:
                    raise ValueError(f"betas must be positive to be learned, got {beta}")
            self.beta_total = float(sum(start))
            self.beta_logits = nn.Parameter(torch.tensor(start).log())

    def kernel_alphas(self) -> Sequence[float] | Tensor:
        """The bandwidth multipliers as they are now."""
        return self.alphas if self.log_alphas is None else self.log_alphas.exp()

    def kernel_betas(self) -> Sequence[float] | Tensor | None:
        """The kernel weights as they are now; None for ones."""
        if self.beta_logits is None:
            return self.betas
        return self.beta_total * self.beta_logits.softmax(0)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_weight: Tensor | None = None,
        target_weight: Tensor | None = None,
    ) -> Tensor:
        """The scalar loss of source ``[n, D]`` and target ``[m, D]``."""
        return mkmmd_loss(
            source,
            target,
            alphas=self.kernel_alphas(),
            betas=self.kernel_betas(),
            kernel=self.kernel,
            sigma_sq=self.sigma_sq,
            estimator=self.estimator,
            source_weight=source_weight,
            target_weight=target_weight,
            group=self.group,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"alphas={self.alphas}, betas={self.betas}, kernel={self.kernel!r}, "
            f"sigma_sq={self.sigma_sq}, estimator={self.estimator!r}, backend={self.backend!r}"
        )


class FrequencyGate(nn.Module):
    """Table of expert weights per frequency bin of the candidate item.

    The weights depend on the candidate alone, so three experts fold into one item matrix.

    Args:
        num_bins: highest bin index; bin 0 is padding.
        num_experts: E.
        form: ``"scale"``: weights are ``exp(logit)``, free positive scales, because scores of
            different experts do not live on one scale; ``"sigmoid"``: the authors' sigmoid divided
            by its sum over experts; ``"uniform"``: 1 / E for every item, not learned.

    Raises:
        ValueError: another form. :func:`padkern.models.gates.build_gate` has more of them.
    """

    FORMS: tuple[str, ...] = GATE_FORMS

    def __init__(self, num_bins: int, num_experts: int = 3, *, form: str = "scale") -> None:
        super().__init__()
        if form not in self.FORMS:
            raise ValueError(f"form must be one of {self.FORMS}, got {form!r}")
        self.form = form
        # Sum over experts of about 1, so that scores start on the scale of one expert.
        start = torch.full((num_bins + 1, num_experts), -math.log(num_experts))
        self.logit = nn.Parameter(start, requires_grad=form != "uniform")

    @torch.no_grad()
    def reset_parity(self, aligned: float = -4.0, *, columns: Sequence[int] = (0, 1, 2)) -> None:
        """The authors' start: ramps 1 to 0 (IDs), ``aligned`` to ``aligned - 1``, 0 to 1 (text).

        Args:
            aligned: start of the second ramp.
            columns: which of the three, one per expert of the gate.
        """
        ramp = torch.linspace(0, 1, len(self.logit), device=self.logit.device)
        self.logit.copy_(torch.stack([1 - ramp, aligned - ramp, ramp], 1)[:, list(columns)])

    def fresh(self) -> Tensor:
        """Logits of equal weights 1 / E, of the shape of ``logit``."""
        return torch.full_like(self.logit.detach(), -math.log(self.logit.shape[1]))

    def weights(self) -> Tensor:
        """``[num_bins + 1, E]`` positive weights."""
        if self.form == "sigmoid":
            w = self.logit.sigmoid()
            return w / w.sum(1, keepdim=True)
        return self.logit.exp()

    def forward(self, bins: Tensor) -> Tensor:
        """``[n, E]`` weights of items in ``bins [n]``."""
        return self.weights().index_select(0, bins)

    def per_bin(self, bins: Tensor, num_bins: int) -> Tensor:
        """``[num_bins + 1, E]`` weights to show, one row per bin of the catalogue ``bins``."""
        return self.weights()

    def unseen_row(self, unseen_bin: int) -> int:
        """Row of ``logit`` that items of ``unseen_bin`` read."""
        return unseen_bin

    def grow(self, count: int, new_bin: int) -> None:
        """Makes room for ``count`` more items of bin ``new_bin``; here there is nothing to do."""

    def fold(self, tables: Sequence[Tensor], bins: Tensor, *, backend: str = "auto") -> Tensor:
        """``[N + 1, sum d_e]`` gated item matrix of the catalogue.

        Args:
            tables: item vectors ``[N + 1, d_e]`` of every expert.
            bins: ``[N + 1]`` bins, hidden items in the unseen bin.
            backend: of :func:`padkern.ops.gated_table.gated_table`.
        """
        return gated_table(tables, self.weights(), bins, backend=backend)

    def operands(
        self, tables: Sequence[Tensor], bins: Tensor, items: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """What the gated loss takes: tables, weights ``[bins, E]`` and rows ``[n]`` of them.

        Args:
            tables: item vectors ``[n, d_e]`` of every expert.
            bins: ``[n]`` bins of these items, hidden ones in the unseen bin.
            items: ``[n]`` ids of these items, each once; default the whole catalogue in order.
        """
        return tables, self.weights(), bins
