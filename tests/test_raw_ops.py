"""The registered ops of ranking, losses, gated table and encoder, called past the public functions.

Every argument of every op is broken in turn: rank, sizes, dtype, values of ids and numbers. An op
that takes a broken call reads or writes beyond a tensor, so there is one rule: an error of one
line that names an argument, before anything is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from padkern.testing.records import OP_SPECS

CHECKED = (
    "gated_bce",
    "dropout_add_norm",
    "short_attention",
    "gated_table",
    "catalogue_loss",
    "count_ranks",
    "linear",
    "segment_sum",
)


def _name(op: Any) -> str:
    return op.name().removeprefix("padkern::")


RAW_OPS = [
    pytest.param(spec, raw, id=_name(raw.op))
    for spec in OP_SPECS
    if spec.name in CHECKED
    for raw in spec.raw_ops
]

# Dimensions whose size nothing else in the call decides. One more row is one more bin or item, or
# one more sequence, an empty one; one less may be one that no id names.
FREE = {
    ("gated_bce_value", "gate", 0),
    ("gated_bce_value", "negatives", 1),
    ("gated_bce_value_grad", "gate", 0),
    ("gated_bce_value_grad", "negatives", 1),
    ("gated_table", "gate", 0),
    ("gated_table_grad", "gate", 0),
    ("catalogue_loss_value", "items", 0),
    ("catalogue_loss_value_grad", "items", 0),
    ("short_attention", "offsets", 0),
    ("short_attention_grad", "offsets", 0),
    ("rank_pack_items", "item_matrix", 0),
    ("rank_topk", "item_matrix", 0),  # within the last panel
    ("segment_sum", "values", 0),
    ("segment_sum", "starts", 0),
}
# Those that may be empty too; the rows of x where there is nothing else to have as many.
FREE_OR_EMPTY = {
    ("gated_table", "tables", 1),
    ("rank_pack_items", "item_matrix", 1),
    ("dropout_add_norm", "x", 0),
    ("linear", "x", 0),
    ("linear", "weight", 0),
    ("segment_sum", "values", 1),
}
# Ids without an upper limit.
UNBOUNDED = {"token_ids"}
# The tensor and dimension that ids count, whichever of them the op has.
LIMITS = {
    "item_bins": [("gate", 0)],
    "positives": [("item_tables", 1)],
    "negatives": [("item_tables", 1)],
    "targets": [("items", 0), ("item_matrix", 0)],
    "candidates": [("items", 0)],
    "excluded_values": [("items", 0)],
    "seen_values": [("item_matrix", 0)],
}
# Numbers out of range, by argument.
NUMBERS = {
    "dropout": (-0.1, 1.0, math.nan, math.inf),
    "positive_weight": (0.0, -0.1, math.nan, math.inf),
    "seed": (-1,),
    "step": (-1, 1 << 32),
    "eps": (-1e-9, math.nan),
    "top_k": (-1,),
    "at_most": (-1,),
}
FAR = (-1, 1 << 40, -(1 << 63), (1 << 63) - 1)


def _resized(x: Tensor, dimension: int) -> Iterator[tuple[str, Tensor]]:
    """One less, none, and one more, of values that the argument may have."""
    size = x.shape[dimension]
    if size > 1:
        yield "shrinks", x.narrow(dimension, 0, size - 1)
    if size > 0:
        yield "empties", x.narrow(dimension, 0, 0)
        yield "grows", torch.cat([x, x.narrow(dimension, size - 1, 1)], dimension)


def _sizes(op: str, name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "one more dimension", x[None]
    if x.dim() > 0:
        yield "scalar", x.new_zeros(())
    if x.dim() > 1:
        yield "flat", x.reshape(-1)
    for dimension in range(x.dim()):
        place = (op, name, dimension)
        if place in FREE_OR_EMPTY:
            continue
        for kind, changed in _resized(x, dimension):
            if kind == "empties" or place not in FREE:
                yield f"dimension {dimension} {kind}", changed


def _dtypes(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    others = {torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.complex64}
    for dtype in sorted(others - {x.dtype}, key=str):
        yield str(dtype), x.to(dtype)


def _values(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Ids out of range at the first, a middle and the last place."""
    if x.dtype != torch.int64:
        return
    for far in FAR:
        if far > 0 and name in UNBOUNDED:
            continue
        for place in {0, x.numel() // 2, x.numel() - 1} if x.numel() else ():
            changed = x.clone(memory_format=torch.contiguous_format)
            changed.view(-1)[place] = far
            yield f"{far} at {place}", changed


def _broken(op: Any, arguments: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    names = [argument.name for argument in op._schema.arguments]  # defaults are not given
    for at, (name, value) in enumerate(zip(names, arguments, strict=False)):

        def put(new: Any, at: int = at) -> tuple[Any, ...]:
            return (*arguments[:at], new, *arguments[at + 1 :])

        if isinstance(value, Tensor):
            for breaks in (_sizes(_name(op), name, value), _dtypes(value), _values(name, value)):
                yield from ((f"{name}: {what}", put(new)) for what, new in breaks)
        elif isinstance(value, list):
            yield f"{name}: none", put([])
            yield f"{name}: one more", put([*value, value[0]])
            yield f"{name}: too many", put(value * 20)
            for e, x in enumerate(value):
                if not isinstance(x, Tensor):
                    continue
                for breaks in (_sizes(_name(op), name, x), _dtypes(x)):
                    for what, new in breaks:
                        yield f"{name}[{e}]: {what}", put([*value[:e], new, *value[e + 1 :]])
        else:
            yield from ((f"{name}: {new}", put(new)) for new in NUMBERS.get(name, ()))


def _outcome(op: Any, arguments: tuple[Any, ...]) -> str:
    """Empty where the call is refused as it should be."""
    names = "|".join(argument.name for argument in op._schema.arguments)
    try:
        op(*arguments)
    except (TypeError, ValueError) as error:
        text = str(error)
        named = re.match(rf"(?:{names})\b.* must .+\Z", text)
        return "" if named else f"unclear: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("spec", "raw"), RAW_OPS)
def test_a_broken_call_is_refused(spec, raw, dtype, native_core):
    count, wrong = 0, []
    for options in spec.options_at(spec.check_shape):
        arguments = raw.arguments(spec.case(spec.check_shape, dtype, options=options), "native")
        raw.op(*arguments)
        for what, changed in _broken(raw.op, arguments):
            count += 1
            outcome = _outcome(raw.op, changed)
            if outcome:
                wrong.append(f"{options.name}: {what}: {outcome}")
    assert count > 20
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("spec", "raw"),
    [one for one in RAW_OPS if one.id not in ("rank_pack_items", "segment_sum")],
)  # which take one floating tensor
def test_floats_of_two_dtypes_are_refused(spec, raw, native_core):
    options = spec.options_at(spec.check_shape)[-1]
    arguments = raw.arguments(spec.case(spec.check_shape, options=options), "native")
    floats = [
        at
        for at, value in enumerate(arguments)
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    assert floats
    for at in floats:
        changed = (*arguments[:at], arguments[at].double(), *arguments[at + 1 :])
        with pytest.raises(TypeError, match="must be float"):
            raw.op(*changed)


def _limited(op: Any) -> set[str]:
    return {argument.name for argument in op._schema.arguments} & set(LIMITS)


@pytest.mark.parametrize(("spec", "raw"), [one for one in RAW_OPS if _limited(one.values[1].op)])
def test_the_first_id_too_many_is_named(spec, raw, native_core):
    names = [argument.name for argument in raw.op._schema.arguments]
    limited = _limited(raw.op)
    for options in spec.options_at(spec.check_shape):
        arguments = raw.arguments(spec.case(spec.check_shape, options=options), "native")
        given = dict(zip(names, arguments, strict=False))
        for name in limited & {name for name, value in given.items() if value is not None}:
            table, dimension = next(one for one in LIMITS[name] if one[0] in given)
            size = given[table].shape[dimension]
            ids = given[name].clone()
            ids.view(-1)[-1] = size
            text = rf"{name} must lie in [01]\.\.{size - 1}, got {size}"
            with pytest.raises(ValueError, match=text):
                raw.op(*(given | {name: ids}).values())


def test_what_must_be_given_together(native_core):
    ops = torch.ops.padkern
    x, w, ids = torch.zeros(3, 4), torch.ones(4), torch.zeros(3, dtype=torch.int64)
    rule = (0.0, 0, 0)
    for weight, shift in ((w, None), (None, w)):
        with pytest.raises(ValueError, match="weight and shift must be given together"):
            ops.dropout_add_norm(x, None, None, weight, shift, None, 1e-5, *rule, True)
    with pytest.raises(ValueError, match="d_out must be None without a weight"):
        ops.dropout_add_norm_grad(x, x, x, x[:0, 0], None, None, *rule, False)
    for pair in ((ids, None), (None, ids.new_zeros(4))):
        with pytest.raises(ValueError, match="excluded_values and excluded_offsets must be given"):
            ops.catalogue_loss_value(x, x, ids, None, None, *pair)


def test_the_core_knows_its_dtype_codes(native_core):
    with pytest.raises(ValueError, match=r"dtype must be 0 \(float32\) or 1 \(float64\), got 2"):
        native_core.rank_panel_width(2)
    with pytest.raises(ValueError, match="got -1"):
        native_core.gated_table_cpu(-1, (0, 1), ([0], [1], [1]), 0, 0, 0, (0, 0, 0), [])


def test_the_core_takes_no_null_for_a_tensor(native_core):
    """What the launcher would have to get wrong first."""
    gate, bins = torch.ones(1, 1), torch.zeros(2, dtype=torch.int64)
    table = torch.ones(2, 3)
    at, to = gate.data_ptr(), bins.data_ptr()
    tables = ([table.data_ptr()], [3], [3])
    for call in (
        (tables, at, to, 0, (0, 0, 0), []),
        (tables, at, to, 0, (0, 0, at), [table.data_ptr()]),
        (([0], [3], [3]), at, to, table.data_ptr(), (0, 0, 0), []),
    ):
        assert "null" in native_core.gated_table_cpu(0, (2, 1), *call)
    widths = ([table.data_ptr()], [3], [-3])
    text = native_core.gated_table_cpu(0, (2, 1), widths, at, to, 0, (0, 0, 0), [])
    assert "out of range" in text
