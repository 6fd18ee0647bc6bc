"""MK-MMD from random Fourier features in O(N F) time, streamed over chunks of rows.

Forward keeps the sums of the features, a few numbers per feature; backward streams the rows again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padkern.ops.first_order import first_order_only
from padkern.ops.mkmmd.reference import compute_dtype
from padkern.ops.mkmmd_batched.bandwidth import first_used_row

# The kernels with a spectral density: all but energy, which is not bounded.
FOURIER_KERNELS = ("gaussian", "laplacian", "inverse_multiquadric", "rational_quadratic")
CHUNK_VALUES = 1 << 17  # of one temporary
MOST_DOUBLINGS = 3
SECOND_ORDER = "mkmmd_fourier is once_differentiable: it has no second derivatives"


def draw_frequencies(
    dim: int, count: int, kernel: str, generator: torch.Generator, device: torch.device
) -> Tensor:
    """float64 [dim, count]: frequencies w of the kernel at alpha sigma_sq = 1.

    E cos(w (a - b)) is the kernel. Each of them is a scale mixture of Gaussians, so w is a normal
    vector times an own radius: gaussian 1; laplacian 1/|g| (a multivariate Cauchy vector);
    rational_quadratic sqrt(e) with e exponential; inverse_multiquadric |g|/sqrt(2); g normal.
    """
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    normal = torch.randn(dim, count, dtype=torch.float64, **options)
    if kernel != "gaussian":
        mixing = torch.randn(2, count, dtype=torch.float64, **options)
        if kernel == "laplacian":
            radius = mixing[0].abs().reciprocal()
        elif kernel == "inverse_multiquadric":
            radius = mixing[0].abs() / math.sqrt(2)
        else:
            assert kernel == "rational_quadratic", kernel
            # Half the squared length of two normal numbers is exponential.
            radius = mixing.norm(dim=0) / math.sqrt(2)
        normal = normal * radius
    return normal.to(device)


class FourierOptions(NamedTuple):
    """What does not carry a gradient.

    Attributes:
        frequencies: ``[D, F]`` float64, from :func:`draw_frequencies`.
        alphas: Bandwidth multipliers.
        biased: The V-statistic with the diagonals; otherwise the U-statistic.
    """

    frequencies: Tensor
    alphas: Sequence[float]
    biased: bool


class _Sample(NamedTuple):
    rows: Tensor
    weight: Tensor | None

    def chunks(self, size: int, origin: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(range, rows minus origin [r, D], weights [r]); rows of weight 0 become 0."""
        for start in range(0, len(self.rows), size):
            part = slice(start, min(start + size, len(self.rows)))
            rows = self.rows[part].to(origin.dtype) - origin
            if self.weight is None:
                yield part, rows, rows.new_ones(len(rows))
                continue
            weight = self.weight[part].to(origin.dtype)
            yield part, torch.where((weight != 0)[:, None], rows, 0), weight


class _Problem:
    """Centre, bandwidth and features, shared by value and gradient."""

    def __init__(
        self,
        options: FourierOptions,
        source: Tensor,
        target: Tensor,
        sigma_sq: Tensor | None,
        source_weight: Tensor | None,
        target_weight: Tensor | None,
    ) -> None:
        dtype = compute_dtype(source, target)
        dim, features = options.frequencies.shape
        self.samples = (_Sample(source, source_weight), _Sample(target, target_weight))
        self.chunk = max(16, CHUNK_VALUES // max(dim, features))
        self.frequencies = options.frequencies.to(dtype)
        self.biased = options.biased
        # In descending order: an angle that is twice an earlier one comes from doubling.
        self.alphas = sorted(options.alphas, reverse=True)
        self.centre = self._centre(dtype)
        self.given = self._mean_sq_distance() if sigma_sq is None else sigma_sq.double()
        self.sigma_sq = torch.where(self.given > 0, self.given, 1)
        self.rates = [((alpha * self.sigma_sq) ** -0.5).to(dtype) for alpha in self.alphas]
        self.totals = []
        self.pairs = []
        for sample in self.samples:
            weight = sample.weight
            ones = torch.full((), float(len(sample.rows)), dtype=torch.float64, device=self.device)
            total = ones if weight is None else weight.sum(dtype=torch.float64)
            squares = ones if weight is None else weight.double().square().sum()
            self.totals.append(total)
            self.pairs.append((total.square(), squares))

    @property
    def device(self) -> torch.device:
        return self.frequencies.device

    def _centre(self, dtype: torch.dtype) -> Tensor:
        """Mean of the pooled rows, about the first used one: identical rows become exactly 0."""
        origin = first_used_row(*self.samples[0])[0].to(dtype)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        mean = torch.zeros(origin.shape, dtype=torch.float64, device=self.device)
        for sample in self.samples:
            for _, rows, w in sample.chunks(self.chunk, origin):
                mean += (w @ rows).double()
                total += w.sum(dtype=torch.float64)
        return origin + (mean / total).to(dtype)

    def _mean_sq_distance(self) -> Tensor:
        moment = torch.zeros((), dtype=torch.float64, device=self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for sample in self.samples:
            for _, rows, w in sample.chunks(self.chunk, self.centre):
                moment += (w @ rows.square().sum(1)).double()
                total += w.sum(dtype=torch.float64)
        return 2 * moment / total

    def waves(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(u, cos, sin) [r, F] of the angles w_f x / sqrt(alpha_u sigma_sq) for each kernel u."""
        angles = rows @ self.frequencies
        known: dict[float, tuple[Tensor, Tensor, int]] = {}
        for u, alpha in enumerate(self.alphas):
            # A quarter of alpha is twice the angle. Doubling doubles the error too: three at most.
            cos, sin, doubled = known.get(4 * alpha, (angles, angles, MOST_DOUBLINGS))
            if doubled < MOST_DOUBLINGS:
                cos, sin = (sin * sin).mul_(-2).add_(1), (sin * cos).mul_(2)
                doubled += 1
            else:
                scaled = angles * self.rates[u]
                cos, sin, doubled = scaled.cos(), scaled.sin(), 0
            known[alpha] = cos, sin, doubled
            yield u, cos, sin

    def sums(self) -> Tensor:
        """float64 [2 samples, K, 2, F]: weighted sums of cos and sin."""
        shape = (2, len(self.alphas), 2, self.frequencies.shape[1])
        sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for index, sample in enumerate(self.samples):
            for _, rows, w in sample.chunks(self.chunk, self.centre):
                for u, cos, sin in self.waves(rows):
                    sums[index, u, 0] += w @ cos
                    sums[index, u, 1] += w @ sin
        return sums

    def loss(self, sums: Tensor) -> Tensor:
        """float64 scalar."""
        features = sums.shape[-1]
        if self.biased:
            means = [sums[i] / self.totals[i] for i in (0, 1)]
            return self.finish((means[0] - means[1]).square().sum() / features)
        value = -2 * (sums[0] * sums[1]).sum() / (self.totals[0] * self.totals[1]) / features
        for i, (square, squares) in enumerate(self.pairs):
            diagonal = len(self.alphas) * squares
            value = value + (sums[i].square().sum() / features - diagonal) / (square - squares)
        return self.finish(value)

    def finish(self, values: Tensor) -> Tensor:
        """Where the bandwidth is 0 every kernel is 1 and all cancels; below 0, or NaN, NaN."""
        degenerate = torch.where(self.given == 0, 0.0, math.nan)
        return torch.where(self.given > 0, values, degenerate.to(values.dtype))

    def gradients(
        self, sums: Tensor, grad: Tensor, wanted: Sequence[bool]
    ) -> tuple[list[Tensor], Tensor]:
        """Derivatives by the rows of both samples and by the bandwidth.

        ``wanted`` says which of the three are used; the others are empty or incomplete.
        """
        features = sums.shape[-1]
        out = []
        spread = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, sample in enumerate(self.samples):
            if not (wanted[i] or wanted[2]):
                out.append(sample.rows[:0])
                continue
            square, squares = self.pairs[i]
            within = sums[i] / (square if self.biased else square - squares)
            across = sums[1 - i] / (self.totals[0] * self.totals[1])
            by_angle = (2 * grad.double() / features * (within - across)).to(self.centre.dtype)
            by_angle *= torch.stack(self.rates).reshape(-1, 1, 1)
            by_angle[:, 0].neg_()  # the cosine's derivative is minus the sine
            gradient = torch.empty(
                sample.rows.shape, dtype=self.centre.dtype, device=sample.rows.device
            )
            for part, rows, w in sample.chunks(self.chunk, self.centre):
                slopes = rows.new_zeros(len(rows), features)
                for u, cos, sin in self.waves(rows):
                    slopes.addcmul_(cos, by_angle[u, 1]).addcmul_(sin, by_angle[u, 0])
                product = (slopes * w[:, None]) @ self.frequencies.T
                gradient[part] = product
                spread += (product * rows).sum(dtype=torch.float64)
            out.append(self.finish(gradient))
        # The angles go with sigma_sq^(-1/2).
        return out, self.finish(-0.5 * spread / self.sigma_sq)


class _FourierFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        source: Tensor,
        target: Tensor,
        sigma_sq: Tensor | None,
        source_weight: Tensor | None,
        target_weight: Tensor | None,
        options: FourierOptions,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(source.device.type, enabled=False):
            problem = _Problem(options, source, target, sigma_sq, source_weight, target_weight)
            sums = problem.sums()
            return problem.loss(sums).to(compute_dtype(source, target)), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.options = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        arguments, sums = ctx.saved_tensors[:5], ctx.saved_tensors[5]
        source, target, sigma_sq = arguments[:3]
        with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
            problem = _Problem(ctx.options, *arguments)
            rows, d_sigma = problem.gradients(sums, grad, ctx.needs_input_grad)
            gradients = [rows[0].to(source.dtype), rows[1].to(target.dtype)]
            samples = [source, target, grad]
            if sigma_sq is not None:
                gradients.append(d_sigma.to(sigma_sq.dtype).reshape(sigma_sq.shape))
                samples.append(sigma_sq)
        out: list[Tensor | None] = [None] * 6
        for position, gradient in enumerate(gradients):
            if ctx.needs_input_grad[position]:
                out[position] = first_order_only(SECOND_ORDER, gradient, *samples)
        return tuple(out)


def fourier_loss(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    options: FourierOptions,
) -> Tensor:
    """The scalar estimate; arguments are taken as already checked."""
    arguments = (source, target, sigma_sq, source_weight, target_weight, options)
    return _FourierFunction.apply(*arguments)[0]
