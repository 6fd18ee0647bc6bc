"""padkern: fused kernels, three-phase PAD training and honest evaluation for recommenders.

The names below are loaded on first use, so ``import padkern`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "MKMMDLoss",
    "MKMMDTest",
    "TripleExpert",
    "__version__",
    "mkmmd_block",
    "mkmmd_fourier",
    "mkmmd_loss",
    "mkmmd_loss_batched",
    "mkmmd_per_class",
    "mkmmd_power",
    "mkmmd_test",
    "mkmmd_variance",
    "mkmmd_witness",
]

_LAZY = {
    "mkmmd_loss": "padkern.functional",
    "mkmmd_block": "padkern.estimators",
    "mkmmd_fourier": "padkern.estimators",
    "mkmmd_loss_batched": "padkern.estimators",
    "mkmmd_per_class": "padkern.estimators",
    "mkmmd_power": "padkern.two_sample",
    "mkmmd_test": "padkern.two_sample",
    "mkmmd_variance": "padkern.two_sample",
    "mkmmd_witness": "padkern.two_sample",
    "MKMMDLoss": "padkern.modules",
    "MKMMDTest": "padkern.two_sample",
    "TripleExpert": "padkern.models.triple_expert",
}

if TYPE_CHECKING:
    from padkern.estimators import (
        mkmmd_block,
        mkmmd_fourier,
        mkmmd_loss_batched,
        mkmmd_per_class,
    )
    from padkern.functional import mkmmd_loss
    from padkern.models.triple_expert import TripleExpert
    from padkern.modules import MKMMDLoss
    from padkern.two_sample import (
        MKMMDTest,
        mkmmd_power,
        mkmmd_test,
        mkmmd_variance,
        mkmmd_witness,
    )


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'padkern' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
