"""Small modules: losses over :mod:`padkern.functional`, and the gate on item frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from padkern.functional import mkmmd_loss

__all__ = ["FrequencyGate", "MKMMDLoss"]

GATE_FORMS = ("scale", "sigmoid")


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


class FrequencyGate(nn.Module):
    """Table of expert weights per frequency bin of the candidate item.

    The weights depend on the candidate alone, so three experts fold into one item matrix.

    Args:
        num_bins: highest bin index; bin 0 is padding.
        num_experts: E.
        form: ``"scale"``: weights are ``exp(logit)``, free positive scales, because scores of
            different experts do not live on one scale; ``"sigmoid"``: the authors' sigmoid divided
            by its sum over experts.
    """

    def __init__(self, num_bins: int, num_experts: int = 3, *, form: str = "scale") -> None:
        super().__init__()
        if form not in GATE_FORMS:
            raise ValueError(f"form must be one of {GATE_FORMS}, got {form!r}")
        self.form = form
        # Sum over experts of about 1, so that scores start on the scale of one expert.
        self.logit = nn.Parameter(torch.full((num_bins + 1, num_experts), -math.log(num_experts)))

    @torch.no_grad()
    def reset_parity(self, aligned: float = -4.0) -> None:
        """The authors' start: ramps 1 to 0 (IDs), ``aligned`` to ``aligned - 1``, 0 to 1 (text)."""
        ramp = torch.linspace(0, 1, len(self.logit), device=self.logit.device)
        self.logit.copy_(torch.stack([1 - ramp, aligned - ramp, ramp], 1))

    def weights(self) -> Tensor:
        """``[num_bins + 1, E]`` positive weights."""
        if self.form == "scale":
            return self.logit.exp()
        w = self.logit.sigmoid()
        return w / w.sum(1, keepdim=True)

    def forward(self, bins: Tensor) -> Tensor:
        """``[n, E]`` weights of items in ``bins [n]``."""
        return self.weights().index_select(0, bins)
