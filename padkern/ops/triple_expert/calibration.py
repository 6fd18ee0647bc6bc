"""The weight of the positives: its range, and what gBCE makes of a sampling rate.

Source: Petrov & Macdonald 2023, "gSASRec: Reducing Overconfidence in Sequential Recommendation
Trained with Negative Sampling", arXiv:2308.07192.
"""

from __future__ import annotations

import math


def check_positive_weight(positive_weight: float) -> None:
    """Raises TypeError or ValueError for what is no positive finite number."""
    if isinstance(positive_weight, bool) or not isinstance(positive_weight, (int, float)):
        raise TypeError(f"positive_weight must be a number, got {type(positive_weight).__name__}")
    if not 0.0 < positive_weight < math.inf:  # also true for NaN
        raise ValueError(f"positive_weight must be positive and finite, got {positive_weight}")


def gbce_beta(negatives: int, candidates: int, calibration: float) -> float:
    r"""The power of gBCE's positive probability.

    .. math::
        \beta = \alpha\left(t\left(1 - \frac1\alpha\right) + \frac1\alpha\right),
        \qquad \alpha = \frac{k}{N - 1}

    Args:
        negatives: k >= 1 per positive.
        candidates: N >= 2 items that may be drawn, the positive among them.
        calibration: t in [0, 1]. 0 gives 1, plain binary cross-entropy; 1 gives alpha, with which
            uniform negatives teach a sigma(score) that is the probability of the item.

    Returns:
        float: beta, between alpha and 1.

    Raises:
        ValueError: An argument is out of range.
    """
    if negatives < 1:
        raise ValueError(f"negatives must be at least 1, got {negatives}")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, got {candidates}")
    if not 0.0 <= calibration <= 1.0:  # also true for NaN
        raise ValueError(f"calibration must lie in 0..1, got {calibration}")
    # The same, without the cancellation: a small alpha keeps its digits.
    return (1.0 - calibration) + calibration * (negatives / (candidates - 1))


def gbce_positive_weight(negatives: int, candidates: int, calibration: float) -> float:
    """The ``positive_weight`` at which the gated loss is gBCE: beta / k.

    gBCE adds the k negatives of a token, the gated loss takes their mean; so the loss is
    ``(k + 1) / k`` times gBCE, which divides by ``k + 1``.

    Args:
        negatives, candidates, calibration: as in :func:`gbce_beta`.

    Raises:
        ValueError: as there.
    """
    return gbce_beta(negatives, candidates, calibration) / negatives
