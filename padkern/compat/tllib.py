"""The multi-kernel MMD of TLlib: ``tllib.alignment.dan`` and ``tllib.modules.kernels``.

The values are TLlib's, its constant 2 / (n - 1) included; memory is O(n D) in place of O(n^2 D) per
kernel. What differs:

- float16 and bfloat16 features are computed in float32, also under autocast.
- Identical rows give 2 / (n - 1) and gradients 0, where TLlib divides 0 by 0.
- ``GaussianKernel.sigma_square`` of a tracking kernel is set when the kernel itself is called, not
  when the loss is, which does not need it.
- Wrong arguments are refused with a message.

Source: thuml/Transfer-Learning-Library at c4aa59e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from padkern.functional import mkmmd_loss
from padkern.ops.mkmmd.reference import (
    compute_dtype,
    kernel_sum,
    mean_sq_distance,
    squared_distances,
)

__all__ = ["GaussianKernel", "MultipleKernelMaximumMeanDiscrepancy"]


class GaussianKernel(nn.Module):
    r"""Gaussian kernel matrix of one sample, ``exp(-d_ij / (2 sigma^2))``, d squared distances.

    Args:
        sigma: Bandwidth in feature units, not 0. Used when ``track_running_stats`` is False.
        track_running_stats: sigma^2 is ``alpha`` times the mean squared distance over all pairs of
            the rows at hand, detached. (Nothing is kept from call to call, in spite of the name.)
        alpha: Multiplier of that mean, > 0; without effect on a fixed ``sigma``.

    Raises:
        ValueError: ``sigma`` is missing where it is needed, or a value is out of range.
    """

    def __init__(
        self, sigma: float | None = None, track_running_stats: bool = True, alpha: float = 1.0
    ) -> None:
        super().__init__()
        if sigma is None and not track_running_stats:
            raise ValueError("sigma must be given where track_running_stats is False, got None")
        if sigma is not None and not 0.0 < abs(sigma) < math.inf:
            raise ValueError(f"sigma must be finite and not 0, got {sigma}")
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        self.sigma_square = None if sigma is None else torch.tensor(float(sigma) ** 2)
        self.track_running_stats = track_running_stats
        self.alpha = alpha

    def extra_repr(self) -> str:
        sigma = None if self.track_running_stats else float(self.fixed_sigma_square()) ** 0.5
        return f"sigma={sigma}, track_running_stats={self.track_running_stats}, alpha={self.alpha}"

    def fixed_sigma_square(self) -> float:
        """sigma^2 of a kernel that does not track."""
        assert self.sigma_square is not None
        return float(self.sigma_square)

    def forward(self, X: Tensor) -> Tensor:
        """``[n, n]`` kernel matrix of ``X [n, D]``, ones on the diagonal."""
        with torch.autocast(X.device.type, enabled=False):
            rows = X.to(compute_dtype(X, X))
            # Centred, so that a common offset cancels no digits.
            rows = rows - rows[:1].detach()
            rows = rows - rows.mean(0).detach()
            diagonal = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
            distances = torch.where(diagonal, 0, squared_distances(rows, rows))
            if self.track_running_stats:
                self.sigma_square = self.alpha * mean_sq_distance(X, X[:0]).detach()
            assert self.sigma_square is not None
            return kernel_sum(distances, (1.0,), self.sigma_square.to(rows.device, rows.dtype))


class MultipleKernelMaximumMeanDiscrepancy(nn.Module):
    r"""Sum of the kernels' unbiased MMD estimates plus 2 / (n - 1).

    Gaussian kernels of this module go to :func:`padkern.mkmmd_loss`, all of one kind in one pass;
    any other callable is evaluated on the pooled rows ``[2n, D]`` and must return the ``[2n, 2n]``
    kernel matrix.

    Args:
        kernels: The kernels, each called with the pooled rows as its only argument.
        linear: The estimate over neighbours alone, in O(n D): the mean over i of
            k(s_i, s_j) + k(t_i, t_j) - k(s_i, t_j) - k(s_j, t_i) with j = i + 1, and 0 after the
            last row; plus the same 2 / (n - 1).
        backend: As in :func:`padkern.mkmmd_loss`; ``linear`` and other callables take plain torch.

    Inputs:
        z_s: ``[n, D]`` source features, n >= 2.
        z_t: ``[n, D]`` target features, as many.

    Returns:
        Tensor: Scalar; float64 if an input is float64, else float32.

    Raises:
        TypeError: A kernel is not callable, or an input is not a floating point tensor.
        ValueError: No kernel, inputs of different shape, fewer than 2 rows.

    Example::

        loss = MultipleKernelMaximumMeanDiscrepancy(
            [GaussianKernel(alpha=2.0**k) for k in range(-3, 2)]
        )
        value = loss(torch.randn(32, 8), torch.randn(32, 8))
    """

    def __init__(
        self,
        kernels: Sequence[Callable[[Tensor], Tensor]],
        linear: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(kernels, (Sequence, nn.ModuleList)) or len(kernels) == 0:
            raise ValueError("kernels must be a sequence of at least one kernel")
        for i, kernel in enumerate(kernels):
            if not callable(kernel):
                raise TypeError(f"kernels[{i}] must be callable, got {type(kernel).__name__}")
        self.kernels = kernels
        self.linear = linear
        self.backend = backend

    def forward(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        _check(z_s, z_t)
        n = z_s.shape[0]
        tracking: list[float] = []
        fixed: list[float] = []
        total: Tensor | None = None
        for kernel in self.kernels:
            # A subclass may compute something else.
            if type(kernel) is not GaussianKernel:
                part = self._from_matrix(kernel, z_s, z_t)
                total = part if total is None else total + part
            elif kernel.track_running_stats:
                tracking.append(kernel.alpha)
            else:
                fixed.append(kernel.fixed_sigma_square())
        for alphas, sigma_sq in ((tracking, None), (fixed, 1.0)):
            if not alphas:
                continue
            if self.linear:
                part = _linear(z_s, z_t, alphas, sigma_sq)
            else:
                part = mkmmd_loss(
                    z_s, z_t, alphas=tuple(alphas), sigma_sq=sigma_sq, backend=self.backend
                )
            total = part if total is None else total + part
        assert total is not None
        return total + 2 / (n - 1)

    def _from_matrix(self, kernel: Callable[[Tensor], Tensor], z_s: Tensor, z_t: Tensor) -> Tensor:
        n = z_s.shape[0]
        matrix = kernel(torch.cat([z_s, z_t]))
        if matrix.shape != (2 * n, 2 * n):
            raise ValueError(
                f"a kernel must return the matrix [{2 * n}, {2 * n}] of the pooled rows, "
                f"got {list(matrix.shape)}"
            )
        matrix = matrix.to(compute_dtype(matrix, matrix))
        same_s, same_t = matrix[:n, :n], matrix[n:, n:]
        st, ts = matrix[:n, n:], matrix[n:, :n]
        if self.linear:
            i, j = _neighbours(n, matrix.device)
            cross = st[i, j].sum() + (st[j, i].sum() if n > 2 else 0)
            return (same_s[i, j].sum() + same_t[i, j].sum() - cross) / n
        diagonal = torch.eye(n, dtype=torch.bool, device=matrix.device)
        same = torch.where(diagonal, 0, same_s).sum() + torch.where(diagonal, 0, same_t).sum()
        return same / (n * (n - 1)) - (st.sum() + ts.sum()) / n**2


def _check(z_s: Tensor, z_t: Tensor) -> None:
    for name, value in (("z_s", z_s), ("z_t", z_t)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating point Tensor, got {kind}")
    if z_s.dim() != 2 or z_s.shape[0] < 2:
        raise ValueError(f"z_s must have shape [n, D] with n >= 2, got {list(z_s.shape)}")
    if z_t.shape != z_s.shape:
        raise ValueError(
            f"z_t must have the shape of z_s, {list(z_s.shape)}, got {list(z_t.shape)}; "
            "padkern.mkmmd_loss takes samples of different sizes"
        )


def _neighbours(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    i = torch.arange(n, device=device)
    return i, (i + 1) % n


def _linear(z_s: Tensor, z_t: Tensor, alphas: Sequence[float], sigma_sq: float | None) -> Tensor:
    """The estimate over neighbours, without the constant."""
    n = z_s.shape[0]
    dtype = compute_dtype(z_s, z_t)
    with torch.autocast(z_s.device.type, enabled=False):
        s, t = z_s.to(dtype), z_t.to(dtype)
        if sigma_sq is None:
            bandwidth = mean_sq_distance(s, t).detach()
        else:
            bandwidth = torch.tensor(sigma_sq, dtype=dtype, device=s.device)
        after_s, after_t = s.roll(-1, 0), t.roll(-1, 0)
        pairs = [(1, s, after_s), (1, t, after_t), (-1, s, after_t)]
        if n > 2:  # of two rows each is the other's neighbour: TLlib counts such a pair once
            pairs.append((-1, after_s, t))
        total = torch.zeros((), dtype=dtype, device=s.device)
        for sign, a, b in pairs:
            distances = (a - b).square().sum(1)
            total = total + sign * kernel_sum(distances, alphas, bandwidth).sum()
        return total / n
