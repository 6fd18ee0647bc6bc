"""Linear transforms of a text matrix: centring, removal or choice of directions, whitening.

Sentence and LLM embeddings are anisotropic: a shared mean and a few large directions hide what
tells items apart. Whitening: x -> diag(lambda)^-1/2 V^T (x - mean), with V and lambda the
eigenvectors and eigenvalues of the rows' covariance (divided by the number of rows); source: Su et
al. 2021, "Whitening sentence representations". Removal of the top directions: Mu and Viswanath
2018, "All-but-the-top". Projection into the null space, the directions of small variance: Hu et al.
2025, AlphaFuse, arXiv:2504.19218, which learns ID vectors there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 65536  # rows held in float64 at a time


@dataclass(frozen=True)
class TextTransform:
    """What to do with a text matrix before the models see it.

    The steps run in the order of the fields: centre, drop the leading directions, keep some of the
    rest (``pca`` or ``null_space``), whiten what is kept, normalise. All directions are principal
    directions of the centred rows, measured once.

    Attributes:
        center: subtract the mean of the fitted rows.
        all_but_top: number of leading principal directions removed, >= 0.
        pca: number of principal directions kept (output columns), or None for all input columns.
        null_space: number of the smallest principal directions kept (output columns, larger
            variance first) in place of the largest; directions of rounding noise alone (see
            ``eps``) do not count. 0: off. Not together with ``pca``.
        whiten: True (1.0) gives every kept direction variance 1, False (0.0) leaves the variances,
            a number between scales by variance^(-whiten/2).
        normalize: divide each row by its Euclidean norm at the end.
        eps: a direction whose standard deviation is at most eps times the largest one carries only
            rounding noise: whitening sets it to zero instead of blowing it up.
    """

    center: bool = True
    all_but_top: int = 0
    pca: int | None = None
    null_space: int = 0
    whiten: bool | float = False
    normalize: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.all_but_top < 0:
            raise ValueError(f"all_but_top must be at least 0, got {self.all_but_top}")
        if self.pca is not None and self.pca < 1:
            raise ValueError(f"pca must be at least 1 or None, got {self.pca}")
        if self.null_space < 0:
            raise ValueError(f"null_space must be at least 0, got {self.null_space}")
        if self.null_space and self.pca is not None:
            raise ValueError(
                f"null_space must be 0 where pca is set, got {self.null_space} and {self.pca}"
            )
        if not 0.0 <= float(self.whiten) <= 1.0:
            raise ValueError(f"whiten must be between 0 and 1, got {self.whiten}")
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must be between 0 and 1, got {self.eps}")

    def fit(self, matrix: np.ndarray, rows: np.ndarray | None = None) -> FittedTransform:
        """Measures mean and principal directions.

        Args:
            matrix: [N + 1, E] float; row 0 is padding. All-zero rows (items without text) are left
                out: they are the absence of information, not a point of the cloud.
            rows: row indices to fit on (row 0 is left out all the same); default all.

        Returns:
            The fitted transform.

        Raises:
            ValueError: not a 2-D matrix, no row to fit on, NaN or Inf, pca, all_but_top or
                null_space too large.
        """
        matrix = _matrix(matrix)
        width = matrix.shape[1]
        if self.all_but_top + (self.pca or 0) > width:
            raise ValueError(
                f"all_but_top + pca must be at most the matrix's {width} columns, "
                f"got {self.all_but_top} + {self.pca or 0}"
            )
        used = np.arange(1, len(matrix)) if rows is None else np.unique(np.asarray(rows))
        used = used[used != 0]
        used = used[matrix[used].any(axis=1)]
        if not len(used):
            raise ValueError("a text transform needs at least one row that is not zero")
        total = np.zeros(width)
        for part in _parts(used):
            total += matrix[part].astype(np.float64).sum(axis=0)
        if not np.isfinite(total).all():
            raise ValueError("a text transform needs finite rows, the matrix has NaN or Inf")
        mean = total / len(used) if self.center else np.zeros(width)

        if not (self.all_but_top or self.pca or self.null_space or self.whiten):
            return FittedTransform(self, mean, None, None)
        variance, directions = _principal(matrix, used, mean)
        top = self.all_but_top
        live = np.sqrt(variance) > self.eps * np.sqrt(variance[0])
        if self.pca is None and not self.null_space and not self.whiten:
            removed = directions[:, :top]
            return FittedTransform(self, mean, np.eye(width) - removed @ removed.T, None)
        keep = slice(top, top + self.pca if self.pca is not None else width)
        if self.null_space:
            end = int(live.sum())
            if top + self.null_space > end:
                raise ValueError(
                    f"all_but_top + null_space must be at most {end}, the directions in which the "
                    f"rows differ, got {top} + {self.null_space}"
                )
            keep = slice(end - self.null_space, end)
        kept, basis = variance[keep], directions[:, keep]
        if self.whiten:
            power = np.where(live[keep], kept, 1.0) ** (-float(self.whiten) / 2)
            basis = basis * np.where(live[keep], power, 0.0)
        return FittedTransform(self, mean, basis, variance)

    def fit_apply(self, matrix: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """``fit(matrix, rows).apply(matrix)``: float32 [N + 1, K], row 0 zeros."""
        return self.fit(matrix, rows).apply(matrix)


@dataclass(frozen=True)
class FittedTransform:
    """A transform with its measured mean and basis; also maps items that arrive later.

    Attributes:
        options: the TextTransform it was fitted from.
        mean: float64 [E].
        basis: float64 [E, K], or None for the identity (K = E).
        variance: float64 [E] variances along all principal directions, descending, or None.
    """

    options: TextTransform
    mean: np.ndarray
    basis: np.ndarray | None
    variance: np.ndarray | None

    def apply(self, matrix: np.ndarray) -> np.ndarray:
        """Maps a matrix; the arithmetic is float64.

        Args:
            matrix: [N + 1, E] float, row 0 padding; zero rows (items without text) stay zero.

        Returns:
            float32 [N + 1, K], row 0 zeros.

        Raises:
            ValueError: the matrix is not 2-D or has another number of columns than the fitted one.
        """
        matrix = _matrix(matrix)
        if matrix.shape[1] != len(self.mean):
            raise ValueError(
                f"the transform was fitted on {len(self.mean)} columns, got {matrix.shape[1]}"
            )
        width = len(self.mean) if self.basis is None else self.basis.shape[1]
        out = np.zeros((len(matrix), width), np.float32)
        for part in _parts(np.arange(1, len(matrix))):
            block = matrix[part].astype(np.float64)
            present = block.any(axis=1)
            block -= self.mean
            if self.basis is not None:
                block = block @ self.basis
            if self.options.normalize:
                norm = np.linalg.norm(block, axis=1, keepdims=True)
                block = block / np.where(norm > 0, norm, 1.0)
            out[part] = np.where(present[:, None], block, 0.0)
        return out


def _principal(
    matrix: np.ndarray, used: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Variances (descending, float64 [E]) and orthonormal directions [E, E] of the used rows."""
    width = matrix.shape[1]
    if len(used) < width:
        # Fewer rows than columns: the SVD keeps the accuracy that a covariance would square away.
        block = matrix[used].astype(np.float64) - mean
        _, singular, right = np.linalg.svd(block, full_matrices=True)
        variance = np.zeros(width)
        variance[: len(singular)] = singular**2 / len(used)
        directions = right.T
    else:
        covariance = np.zeros((width, width))
        for part in _parts(used):
            block = matrix[part].astype(np.float64) - mean
            covariance += block.T @ block
        variance, directions = np.linalg.eigh(covariance / len(used))
        variance, directions = np.maximum(variance[::-1], 0.0), directions[:, ::-1]
    # Eigenvectors have no sign of their own: make each one's largest entry positive.
    largest = np.abs(directions).argmax(axis=0)
    sign = np.where(directions[largest, np.arange(width)] < 0, -1.0, 1.0)
    return variance, directions * sign


def _matrix(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise ValueError(
            f"matrix must be a 2-D float array, got shape {matrix.shape} of {matrix.dtype}"
        )
    return matrix


def _parts(rows: np.ndarray):
    for start in range(0, len(rows), _CHUNK):
        yield rows[start : start + _CHUNK]
