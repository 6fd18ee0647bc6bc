"""The mean-distance bandwidth of all rows, without a gradient and without reading the device."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern.ops.mkmmd.reference import compute_dtype


def first_used_row(rows: Tensor, weight: Tensor | None) -> Tensor:
    """[1, D]: the first row of weight != 0. Differences to it are 0 when all rows are identical."""
    if weight is None:
        return rows[:1]
    return rows.index_select(0, (weight != 0).to(torch.int8).argmax().reshape(1))


def pooled_mean_sq_distance(
    source: Tensor,
    target: Tensor,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """Equals :func:`mean_sq_distance`, detached; NaN when the source has no row of weight > 0."""
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        dtype = compute_dtype(source, target)
        origin = first_used_row(source, source_weight).to(dtype)
        samples = []
        for rows, weight in ((source, source_weight), (target, target_weight)):
            points = rows.to(dtype) - origin
            if weight is None:
                weight = points.new_ones(points.shape[0])
            else:
                points = torch.where((weight != 0)[:, None], points, 0)
            samples.append((points, weight.to(dtype)))
        total = samples[0][1].sum() + samples[1][1].sum()
        mean = (samples[0][1] @ samples[0][0] + samples[1][1] @ samples[1][0]) / total
        moment = sum((w @ (points - mean).square().sum(1)) for points, w in samples)
        return 2 * moment / total
