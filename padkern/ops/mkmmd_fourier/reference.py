"""Random-feature MK-MMD in plain torch: the specification, with the [n + m, n + m] matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fourier_loss_ref(
    source: Tensor,
    target: Tensor,
    frequencies: Tensor,
    *,
    alphas: Sequence[float],
    sigma_sq: Tensor,
    biased: bool,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """MK-MMD whose kernel u is mean_f cos(w_f (a - b) / sqrt(alpha_u sigma_sq)); float64."""
    rows = torch.cat([source, target]).double()
    n = len(source)
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for alpha in alphas:
        angles = rows @ frequencies / (alpha * sigma_sq.double()).sqrt()
        kernel = kernel + (angles[:, None] - angles[None]).cos().mean(2)
    weights = [
        torch.ones(len(sample), dtype=torch.float64, device=rows.device)
        if weight is None
        else weight.double()
        for sample, weight in ((source, source_weight), (target, target_weight))
    ]
    loss = -2 * weights[0] @ kernel[:n, n:] @ weights[1] / (weights[0].sum() * weights[1].sum())
    for part, weight in ((kernel[:n, :n], weights[0]), (kernel[n:, n:], weights[1])):
        diagonal = 0 if biased else weight.square().sum()
        pairs = weight @ part @ weight - len(alphas) * diagonal
        loss = loss + pairs / (weight.sum().square() - diagonal)
    return loss
