"""Registered ops of the kernel products and the autograd function around ``kernel_apply``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern.ops.first_order import first_order_only
from padkern.ops.kernel_products.reference import centre_of, kernel_apply_ref

define(
    "padkern::kernel_quadratic",
    "(Tensor rows, Tensor membership, Tensor sigma_sq, float[] alphas, Tensor? betas, str kernel, "
    "str backend) -> (Tensor quadratic, Tensor linear, Tensor row_sums)",
)
define(
    "padkern::kernel_apply",
    "(Tensor query, Tensor rows, Tensor vectors, Tensor sigma_sq, float[] alphas, Tensor? betas, "
    "str kernel, str part, int power, bool skip_diagonal, str backend) -> Tensor",
)
define(
    "padkern::draw_memberships",
    "(Tensor seeds, int rows, int chosen, str backend) -> Tensor",
)

# Sizes are read by the launchers; a membership is [N, P] of bool or uint8, a column a 0/1 vector.


def _launcher(op: str, backend: str) -> Callable[..., Any]:
    """The launcher of one backend, with the schema's arguments up to ``backend``."""
    if backend == "native":
        from padkern.ops.kernel_products import native

        return getattr(native, f"{op}_native")
    if backend == "blocked":
        from padkern.ops.kernel_products import blocked

        return getattr(blocked, f"{op}_blocked")
    if backend == "reference":
        from padkern.ops.kernel_products import reference

        return getattr(reference, f"{op}_ref")
    raise ValueError(f"backend must be native, blocked or reference, got {backend!r}")


def _quadratic(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _launcher("kernel_quadratic", args[6])(*args[:6])


def _apply(*args: Any) -> Tensor:
    return _launcher("kernel_apply", args[10])(*args[:10])


def _draw(seeds: Tensor, rows: int, chosen: int, backend: str) -> Tensor:
    return _launcher("draw_memberships", backend)(seeds, rows, chosen)


for _key in ("CPU", "CUDA"):
    impl("padkern::kernel_quadratic", _key)(_quadratic)
    impl("padkern::kernel_apply", _key)(_apply)
    impl("padkern::draw_memberships", _key)(_draw)


@register_fake("padkern::kernel_quadratic")
def _quadratic_fake(rows: Tensor, membership: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    count, columns = membership.shape
    sizes = (columns, columns, count)
    first, second, third = (rows.new_empty((k,), dtype=torch.float64) for k in sizes)
    return first, second, third


@register_fake("padkern::kernel_apply")
def _apply_fake(query: Tensor, rows: Tensor, vectors: Tensor, *_: Any) -> Tensor:
    return query.new_empty((query.shape[0], vectors.shape[1]), dtype=torch.float64)


@register_fake("padkern::draw_memberships")
def _draw_fake(seeds: Tensor, rows: int, chosen: int, backend: str) -> Tensor:
    return seeds.new_empty((rows, 1 + seeds.shape[0]), dtype=torch.uint8)


_QUADRATIC = torch.ops.padkern.kernel_quadratic.default
_APPLY = torch.ops.padkern.kernel_apply.default
_DRAW = torch.ops.padkern.draw_memberships.default


_FIRST_ORDER = (
    "kernel products are once_differentiable; use backend='reference' for second derivatives"
)


class _ApplyFunction(torch.autograd.Function):
    """Gradients by query, rows, vectors and sigma_sq, each from further kernel products."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _APPLY(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        betas = inputs[5]
        ctx.save_for_backward(*inputs[:4], *(() if betas is None else (betas,)))
        ctx.options = inputs[4], *inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _gradients(ctx, grad)
        samples = (grad, *ctx.saved_tensors[:4])
        return tuple(
            None if g is None else first_order_only(_FIRST_ORDER, g, *samples) for g in gradients
        )


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients of :class:`_ApplyFunction` in the order of its arguments."""
    query, rows, vectors, sigma_sq, *rest = ctx.saved_tensors
    betas = rest[0] if rest else None
    alphas, kernel, _, power, skip_diagonal, backend = ctx.options

    def product(a: Tensor, b: Tensor, columns: Tensor, part: str) -> Tensor:
        return _APPLY(
            a, b, columns, sigma_sq, alphas, betas, kernel, part, power, skip_diagonal, backend
        )

    gradients: list[Tensor | None] = [None] * 11
    wanted = ctx.needs_input_grad
    if wanted[0]:
        gradients[0] = _by_points(query, rows, grad, vectors, product).to(query.dtype)
    if wanted[1]:
        gradients[1] = _by_points(rows, query, vectors, grad, product).to(rows.dtype)
    if wanted[2]:
        gradients[2] = product(rows, query, grad, "value").to(vectors.dtype)
    if wanted[3]:
        if kernel == "energy":
            gradients[3] = torch.zeros_like(sigma_sq)
        else:
            # Each kernel depends on d / sigma_sq; at sigma_sq 0 nothing changes it.
            total = (product(query, rows, vectors, "spread") * grad).sum()
            rate = torch.where(sigma_sq == 0, 0.0, -1 / sigma_sq.to(torch.float64))
            gradients[3] = (total * rate).to(sigma_sq.dtype).reshape(sigma_sq.shape)
    return gradients


def _by_points(
    points: Tensor,
    others: Tensor,
    own: Tensor,
    weights: Tensor,
    product: Callable[[Tensor, Tensor, Tensor, str], Tensor],
) -> Tensor:
    """Derivative by the points [Q, D] of sum_q sum_j (own_q . weights_j) k(points_q, others_j).

    2 sum_j w_qj k'_qj (p_q - o_j), from k' weights and k' (weights x others).
    """
    centre = centre_of(others)
    a, b = points.to(torch.float64) - centre, others.to(torch.float64) - centre
    own, weights = own.to(torch.float64), weights.to(torch.float64)
    count = weights.shape[1]
    outer = (weights[:, :, None] * b[:, None, :]).reshape(b.shape[0], -1)
    sums = product(points, others, torch.cat([weights, outer], 1), "slope")
    row_sum = (own * sums[:, :count]).sum(1, keepdim=True)
    moved = sums[:, count:].reshape(a.shape[0], count, -1)
    return 2 * (a * row_sum - (own[:, :, None] * moved).sum(1))


def kernel_apply(
    query: Tensor,
    rows: Tensor,
    vectors: Tensor,
    sigma_sq: Tensor,
    alphas: Sequence[float],
    betas: Tensor | None,
    kernel: str,
    backend: str,
    power: int = 1,
    skip_diagonal: bool = False,
) -> Tensor:
    """k(query, rows)^power vectors: [Q, V] in float64, with gradients by the first four arguments.

    The power is taken entry by entry. "reference" is differentiable to any order and by betas too.
    """
    if backend == "reference":
        return kernel_apply_ref(
            query, rows, vectors, sigma_sq, alphas, betas, kernel, "value", power, skip_diagonal
        )
    args = (query, rows, vectors, sigma_sq, alphas, betas, kernel, "value", power, skip_diagonal)
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:4]):
        return _ApplyFunction.apply(*args, backend)
    return _APPLY(*args, backend)


def kernel_quadratic(
    rows: Tensor,
    membership: Tensor,
    sigma_sq: Tensor,
    alphas: Sequence[float],
    betas: Tensor | None,
    kernel: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_p' k x_p [P], x_p' k 1 [P] and k 1 [N] in float64, k without its diagonal."""
    return _QUADRATIC(rows, membership, sigma_sq, alphas, betas, kernel, backend)


def draw_memberships(seeds: Tensor, rows: int, chosen: int, backend: str) -> Tensor:
    """[rows, 1 + P] uint8: the first ``chosen`` rows, then a random subset for each of P seeds."""
    return _DRAW(seeds, rows, chosen, backend)
