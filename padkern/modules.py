"""Small modules over :mod:`padkern.functional`: they hold options and pass them on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from padkern.functional import mkmmd_loss

__all__ = ["MKMMDLoss"]


class MKMMDLoss(nn.Module):
    """:func:`padkern.mkmmd_loss` as a module.

    Args:
        alphas: Bandwidth multipliers, > 0.
        sigma_sq: Squared bandwidth; None or "median" finds it from the data of each call.
        estimator: "unbiased", "biased" or "tllib".
        backend: "auto", "reference" or "native".
    """

    def __init__(
        self,
        alphas: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1, 2),
        *,
        sigma_sq: float | str | None = None,
        estimator: str = "unbiased",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.alphas = tuple(alphas)
        self.sigma_sq = sigma_sq
        self.estimator = estimator
        self.backend = backend

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
            alphas=self.alphas,
            sigma_sq=self.sigma_sq,
            estimator=self.estimator,
            source_weight=source_weight,
            target_weight=target_weight,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"alphas={self.alphas}, sigma_sq={self.sigma_sq}, estimator={self.estimator!r}, "
            f"backend={self.backend!r}"
        )
