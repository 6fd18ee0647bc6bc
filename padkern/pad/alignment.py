"""Losses that draw text and ID vectors together: MK-MMD and its rivals, one call for all.

Row i of both matrices is the same item. MK-MMD and CORAL compare the two clouds and never look at
which row belongs to which; InfoNCE, cosine and squared distance compare an item with itself. Sums
run over rows first, so that no value depends on the number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from padkern import _validation
from padkern.functional import mkmmd_loss
from padkern.ops.linear import linear
from padkern.pad.config import AlignConfig

__all__ = ["alignment_loss", "coral_loss", "cosine_loss", "infonce_loss", "mse_loss"]


def alignment_loss(text_rows: Tensor, id_rows: Tensor, config: AlignConfig) -> Tensor:
    """The loss that ``config.loss`` names.

    Args:
        text_rows: ``[n, d]`` projected text.
        id_rows: ``[n, d]`` ID vectors of the same items.
        config: ``loss`` and what belongs to it: ``kernel``, ``alphas`` and ``estimator`` of the
            MK-MMD, ``temperature`` of InfoNCE.

    Returns:
        Scalar.

    Raises:
        TypeError, ValueError: as the loss does.
        ValueError: ``config.loss`` is "none", which is no loss.
    """
    if config.loss == "mkmmd":
        return mkmmd_loss(
            text_rows,
            id_rows,
            alphas=config.alphas,
            kernel=config.kernel,
            estimator=config.estimator,
        )
    if config.loss == "infonce":
        return infonce_loss(text_rows, id_rows, temperature=config.temperature)
    paired = {"coral": coral_loss, "cosine": cosine_loss, "mse": mse_loss}
    if config.loss not in paired:
        raise ValueError(f"loss must name an alignment loss, got {config.loss!r}")
    return paired[config.loss](text_rows, id_rows)


def infonce_loss(text_rows: Tensor, id_rows: Tensor, *, temperature: float = 0.07) -> Tensor:
    r"""Symmetric InfoNCE: an item's text must find its ID vector among those of all rows, and back.

    .. math::
        -\frac{1}{2n}\sum_i \log\frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}
        -\frac{1}{2n}\sum_i \log\frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}},
        \qquad s_{ij} = \cos(t_i, v_j) / \tau

    Args:
        text_rows: ``[n, d]``; float64, float32, float16 or bfloat16. An item that stands in two
            rows is its own negative: pass each item once.
        id_rows: ``[n, d]``.
        temperature: tau, > 0, dimensionless.

    Returns:
        Scalar, float64 if an input is, else float32; 0 for a single row, which has no rival. A zero
        row has cosine 0 with every other and takes no gradient. NaN or Inf gives NaN.

    Raises:
        TypeError: an input is no float matrix.
        ValueError: shapes or devices differ, an input is empty, or the temperature is not positive.

    Source: van den Oord et al. 2018, arXiv:1807.03748; both directions as in Radford et al. 2021,
    arXiv:2103.00020.
    """
    text_rows, id_rows = _rows(text_rows, id_rows)
    if not 0.0 < temperature < math.inf:  # also false for NaN
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    scores = linear(_unit(text_rows), _unit(id_rows)) / temperature  # [n, n]
    rivals = 0.5 * (scores.logsumexp(1) + scores.logsumexp(0))
    return (rivals - scores.diagonal()).mean()


def coral_loss(text_rows: Tensor, id_rows: Tensor) -> Tensor:
    r"""Deep CORAL: squared Frobenius distance of the two covariance matrices.

    .. math::
        \frac{1}{4 d^2}\,\lVert C_t - C_v\rVert_F^2, \qquad
        C_x = \frac{1}{n-1}\sum_i (x_i - \bar x)(x_i - \bar x)^\top

    Means are not compared: a shift of either side changes nothing.

    Args:
        text_rows: ``[n, d]``, n >= 2; float64, float32, float16 or bfloat16.
        id_rows: ``[n, d]``.

    Returns:
        Scalar, float64 if an input is, else float32. NaN or Inf gives NaN.

    Raises:
        TypeError: an input is no float matrix.
        ValueError: shapes or devices differ, or there are fewer than two rows.

    Source: Sun and Saenko 2016, arXiv:1607.01719.
    """
    text_rows, id_rows = _rows(text_rows, id_rows, least=2)
    count, dim = text_rows.shape

    def covariance(x: Tensor) -> Tensor:
        columns = (x - x.mean(0)).t()
        return linear(columns, columns) / (count - 1)

    gap = covariance(text_rows) - covariance(id_rows)
    return gap.square().sum(1).sum() / (4 * dim**2)


def cosine_loss(text_rows: Tensor, id_rows: Tensor) -> Tensor:
    r"""Cosine distillation: mean of ``1 - cos`` of an item's two vectors.

    .. math::
        \frac{1}{n}\sum_i \left(1 - \cos(t_i, v_i)\right)

    Half of :func:`mse_loss` of the rows scaled to length 1. Both sides take a gradient; detach the
    one that is to teach.

    Args:
        text_rows: ``[n, d]``, n >= 1; float64, float32, float16 or bfloat16.
        id_rows: ``[n, d]``.

    Returns:
        Scalar from 0 to 2, float64 if an input is, else float32. A zero row counts 1 and takes no
        gradient. NaN or Inf gives NaN.

    Raises:
        TypeError: an input is no float matrix.
        ValueError: shapes or devices differ, or an input is empty.
    """
    text_rows, id_rows = _rows(text_rows, id_rows)
    return (1 - (_unit(text_rows) * _unit(id_rows)).sum(1)).mean()


def mse_loss(text_rows: Tensor, id_rows: Tensor) -> Tensor:
    r"""Distillation by distance: mean squared distance of an item's two vectors.

    .. math::
        \frac{1}{n}\sum_i \lVert t_i - v_i\rVert^2

    Summed over the coordinates, so that its weight does not shrink as the width grows. Both sides
    take a gradient; detach the one that is to teach.

    Args:
        text_rows: ``[n, d]``, n >= 1; float64, float32, float16 or bfloat16.
        id_rows: ``[n, d]``.

    Returns:
        Scalar in squared feature units, float64 if an input is, else float32. NaN gives NaN.

    Raises:
        TypeError: an input is no float matrix.
        ValueError: shapes or devices differ, or an input is empty.

    Source: Hinton et al. 2015, arXiv:1503.02531 (distillation); Romero et al. 2015, arXiv:1412.6550
    (of features, by squared distance).
    """
    text_rows, id_rows = _rows(text_rows, id_rows)
    return (text_rows - id_rows).square().sum(1).mean()


def _rows(text_rows: Tensor, id_rows: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both matrices in one dtype, float64 or float32, checked."""
    _validation._check_matrix("text_rows", text_rows)
    _validation._check_matrix("id_rows", id_rows)
    if id_rows.shape != text_rows.shape:
        raise ValueError(
            f"id_rows must have shape {list(text_rows.shape)} like text_rows, "
            f"got {list(id_rows.shape)}"
        )
    if id_rows.device != text_rows.device:
        raise ValueError(f"id_rows must be on {text_rows.device}, got {id_rows.device}")
    if len(text_rows) < least:
        raise ValueError(f"text_rows must have at least {least} rows, got {len(text_rows)}")
    double = torch.float64 in (text_rows.dtype, id_rows.dtype)
    dtype = torch.float64 if double else torch.float32
    return text_rows.to(dtype), id_rows.to(dtype)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero and takes no gradient.

    Dividing by the largest magnitude first keeps squares of tiny and huge rows in range. Length 1
    does not depend on that factor, so it may be a constant of the gradient.
    """
    largest = x.detach().abs().amax(1, keepdim=True)
    empty = largest == 0  # false for NaN, which must pass
    x = x / largest.masked_fill(empty, 1.0)
    length = x.square().sum(1, keepdim=True).masked_fill(empty, 1.0).sqrt()
    return (x / length).masked_fill(empty, 0.0)
