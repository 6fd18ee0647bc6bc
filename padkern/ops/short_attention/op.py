"""Public attention over short packed sequences, its registered ops and their autograd functions.

``padkern::short_attention`` and ``padkern::short_attention_grad`` are functional and know nothing
of autograd. The second recomputes the probabilities and gives the three gradients side by side, as
one tensor, which is the gradient of a joint projection as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.first_order import once_differentiable
from padkern.ops.keyed_dropout import check_dropout
from padkern.ops.short_attention.reference import long_attention, short_attention_ref

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_TOKENS = 64

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, float scale, float dropout, SymInt seed, "
    "SymInt step, SymInt longest) -> Tensor"
)
define("padkern::short_attention", "(" + _ARGUMENTS)
define("padkern::short_attention_grad", "(Tensor d_out, " + _ARGUMENTS)


@impl("padkern::short_attention", "CPU")
def _value_cpu(*args: Any) -> Tensor:
    from padkern.ops.short_attention.native import short_attention_native

    return short_attention_native(*args[:-1])


def _value_triton(*args: Any) -> Tensor:
    from padkern.ops.short_attention.triton_impl import short_attention_triton

    return short_attention_triton(*args)


@impl("padkern::short_attention_grad", "CPU")
def _grad_cpu(*args: Any) -> Tensor:
    from padkern.ops.short_attention.native import short_attention_grad_native

    return short_attention_grad_native(*args[:-1])


def _grad_triton(*args: Any) -> Tensor:
    from padkern.ops.short_attention.triton_impl import short_attention_grad_triton

    return short_attention_grad_triton(*args)


impl("padkern::short_attention", "CUDA")(_value_triton)
impl("padkern::short_attention_grad", "CUDA")(_grad_triton)


def _result_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@register_fake("padkern::short_attention")
def _value_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape, dtype=_result_dtype(q))


@register_fake("padkern::short_attention_grad")
def _grad_fake(d_out: Tensor, q: Tensor, *_: Any) -> Tensor:
    tokens, heads, dim = q.shape
    return q.new_empty((tokens, 3, heads, dim), dtype=_result_dtype(q))


_VALUE = torch.ops.padkern.short_attention.default
_GRAD = torch.ops.padkern.short_attention_grad.default


def _runs(backend: str, x: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What gives the states and the gradients; Triton's interpreter takes tensors on the CPU,
    which the registered ops give to the native backend."""
    return (_value_triton, _grad_triton) if backend == "triton" and x.is_cpu else (_VALUE, _GRAD)


class _ShortAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, backend: str, *options: Any
    ) -> Tensor:
        return _runs(backend, q)[0](q, k, v, offsets, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.backend, *ctx.options = inputs[4:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad
        gradients = _runs(ctx.backend, d_out)[1](d_out, *saved, *ctx.options).unbind(1)
        wanted = (
            g.to(saved[0].dtype) if n else None for g, n in zip(gradients, needed, strict=False)
        )
        return (*wanted, *[None] * 7)


class _JointFunction(torch.autograd.Function):
    """The same for q, k and v in one tensor [T, 3, H, d]: no gradient has to be put together."""

    @staticmethod
    def forward(qkv: Tensor, offsets: Tensor, backend: str, *options: Any) -> Tensor:
        return _runs(backend, qkv)[0](*qkv.unbind(1), offsets, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.backend, *ctx.options = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, offsets = ctx.saved_tensors
        run = _runs(ctx.backend, d_out)[1]
        gradient = run(d_out, *qkv.unbind(1), offsets, *ctx.options)
        return (gradient.to(qkv.dtype), *[None] * 7)


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("offsets", offsets)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if q.dim() != 3:
        raise ValueError(f"q must have shape [T, H, d], got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have shape {list(q.shape)}, got {list(x.shape)}")
    for name, x in (("k", k), ("v", v), ("offsets", offsets)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, got {x.device}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets must be int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"offsets must have shape [B + 1], got {list(offsets.shape)}")


def _check_options(
    scale: float | None, longest: int | None, dropout: float, seed: int, step: int
) -> None:
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if longest is not None and longest < 1:
        raise ValueError(f"longest must be at least 1, got {longest}")
    check_dropout(dropout, seed, step)


def _check_offsets(offsets: Tensor, tokens: int, longest: int | None) -> None:
    """The values, for the reference on the CPU; the native backend checks its own."""
    cuts = offsets.tolist()
    if cuts[0] != 0 or cuts[-1] != tokens:
        raise ValueError(
            f"offsets must start at 0 and end at the {tokens} tokens, got {cuts[0]} and {cuts[-1]}"
        )
    lengths = offsets.diff()
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"offsets must not decrease, got a step of {int(lengths.min())}")
    if longest is not None and lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(
            f"longest must be at least the longest sequence, {int(lengths.max())}, got {longest}"
        )


def _bound(offsets: Tensor, longest: int | None) -> int:
    """At least the longest length; read from the offsets where nobody has said it."""
    if longest is not None:
        return longest
    # A compiler must not read the offsets: the kernels deal with a bound that is wrong.
    if torch.compiler.is_compiling() or offsets.numel() < 2:
        return MAX_TOKENS
    return max(1, int(offsets.diff().max()))


def _choose(
    backend: str, offsets: Tensor, longest: int | None, *tensors: Tensor
) -> tuple[str, int]:
    """The backend to run, and the bound that it is told."""
    bound = MAX_TOKENS

    def too_long() -> str | None:
        nonlocal bound
        bound = _bound(offsets, longest)
        if bound <= MAX_TOKENS:
            return None
        return f"offsets must give sequences of at most {MAX_TOKENS} tokens, got {bound}"

    chosen = _backends.choose_backend(
        backend,
        _backends.TRITON_BACKENDS,
        {
            "native": lambda: _backends.why_not_native(offsets, *tensors) or too_long(),
            "triton": lambda: _backends.why_not_triton(offsets, *tensors) or too_long(),
        },
        ("native",),
    )
    return chosen, bound


def _fallback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    options: tuple[float, float, int, int],
    longest: int | None,
    backend: str,
) -> Tensor:
    scale, dropout, seed, step = options
    compiling = torch.compiler.is_compiling()
    if q.is_cpu and not compiling:
        _check_offsets(offsets, q.shape[0], longest)
    alone = backend == "auto" and dropout == 0 and q.is_cpu and not compiling and len(q) > 0
    with _backends.without_autocast(q.device.type):
        if alone and int(offsets.diff().max()) > MAX_TOKENS:
            return long_attention(q, k, v, offsets, scale)
        return short_attention_ref(
            q, k, v, offsets,
            scale=scale, dropout=dropout, seed=seed, step=step, longest=longest,
            fused=backend == "auto" and not q.is_cpu,
        )  # fmt: skip


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    step: int = 0,
    longest: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Causal multi-head attention within packed sequences of at most 64 tokens.

    .. math::
        o_i = \sum_{j \le i} m_{ij} p_{ij} v_j, \qquad
        p_{i\cdot} = \mathrm{softmax}_{j \le i}(s\,\langle q_i, k_j\rangle)

    for the tokens i, j of one sequence and every head. m is 1 without dropout, else 0 or
    1 / (1 - dropout): a function of (seed, step, number of the sequence, i, j, head), drawn again
    in backward and the same for padded and packed tokens. Native results have the same bits for
    every thread count.

    Args:
        q: ``[T, H, d]`` queries of all tokens; float64, float32, float16 or bfloat16, any strides.
        k: ``[T, H, d]`` keys.
        v: ``[T, H, d]`` values.
        offsets: int64 ``[B + 1]`` cumulative lengths, from 0 to T; sequences may be empty.
        scale: s, default ``d ** -0.5``.
        dropout: probability in [0, 1) of dropping a p.
        seed: ``0..2**63 - 1``.
        step: ``0..2**32 - 1``.
        longest: upper bound of the lengths; spares reading them, on a GPU waiting for it. Triton
            gives NaN for tokens beyond it.
        backend: "auto", "reference" (plain torch on a padded grid, any device), "native" (CPU,
            first order, at most 64 tokens) or "triton" (GPU, likewise). A named backend never
            falls back; "auto" may, for longer sequences without dropout to
            ``scaled_dot_product_attention`` one by one.

    Returns:
        Tensor: ``[T, H, d]``; float64 if an input is float64, else float32. NaN or Inf in an input
        may spread over its sequence and head, not beyond.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit, or a value is out of range (offsets: on the CPU).
        RuntimeError: The named backend cannot run; the message says why.

    Source: Vaswani et al. 2017, arXiv:1706.03762; gradient as in Dao et al. 2022, arXiv:2205.14135.
    """
    _check(q, k, v, offsets)
    _check_options(scale, longest, dropout, seed, step)
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    factor = float(max(q.shape[2], 1) ** -0.5 if scale is None else scale)
    options = (factor, float(dropout), seed, step)
    chosen, bound = _choose(backend, offsets, longest, q, k, v)
    # Triton reads half inputs as they are.
    if chosen != "triton" or not q.dtype == k.dtype == v.dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if chosen == "reference":
        return _fallback(q, k, v, offsets, options, longest, backend)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _ShortAttentionFunction.apply(q, k, v, offsets, chosen, *options, bound)
    return _runs(chosen, q)[0](q, k, v, offsets, *options, bound)


def short_attention_qkv(
    qkv: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    step: int = 0,
    longest: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`short_attention` of queries, keys and values that one projection gave.

    Args:
        qkv: ``[T, 3, H, d]``; the other arguments are those of :func:`short_attention`.
        offsets, scale, dropout, seed, step, longest, backend: likewise.

    Returns:
        ``[T, H, d]``.

    Raises:
        TypeError, ValueError, RuntimeError: as there; ``qkv`` has another shape.
    """
    if not isinstance(qkv, Tensor) or qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError("qkv must be a Tensor of shape [T, 3, H, d]")
    wanted = torch.is_grad_enabled() and qkv.requires_grad
    if wanted:
        _check(qkv[:, 0], qkv[:, 1], qkv[:, 2], offsets)
        _check_options(scale, longest, dropout, seed, step)
        chosen, bound = _choose(backend, offsets, longest, qkv)
        if chosen != "reference":
            x = qkv if chosen == "triton" else qkv.to(_result_dtype(qkv))
            factor = float(max(qkv.shape[3], 1) ** -0.5 if scale is None else scale)
            options = (factor, float(dropout), seed, step, bound)
            return _JointFunction.apply(x, offsets, chosen, *options)
    return short_attention(
        qkv[:, 0], qkv[:, 1], qkv[:, 2], offsets,
        scale=scale, dropout=dropout, seed=seed, step=step, longest=longest, backend=backend,
    )  # fmt: skip
