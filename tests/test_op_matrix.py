"""Every op against its reference over shapes, dtypes, layouts, options, instruction sets, threads.

The cases come from the records in ``padkern.testing.records``; nothing here knows a particular op.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from functools import cache, lru_cache
from itertools import chain, product
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from padkern import _native
from padkern.testing import (
    LAYOUTS,
    OpSpec,
    Options,
    Result,
    assert_matches,
    exact,
    run,
    run_eager,
    value_error,
)
from padkern.testing.records import OP_SPECS

SPECS = {spec.name: spec for spec in OP_SPECS}
ISAS = ("baseline", "avx2", "avx512")
EXAMPLES = int(os.environ.get("PADKERN_EXAMPLES", "300"))


class Cell(NamedTuple):
    """One cell of the matrix, by names, so that it can be counted and cached."""

    spec: str
    shape: str
    dtype: torch.dtype
    layout: str
    options: str


def _named(spec: OpSpec, options: str) -> Options:
    return next(choice for choice in spec.options if choice.name == options)


@cache
def _plan(name: str) -> dict[tuple[str, torch.dtype], list[Cell]]:
    """All layouts of all blocks with the default options and with one more choice each.

    The other choice is the one that has met this layout, dtype and shape the least.
    """
    spec, plan, met = SPECS[name], {}, Counter()
    for shape, dtype in product(spec.shapes, spec.dtypes):
        size = spec.shapes[shape]
        choices = [options.name for options in spec.options_at(size)]
        heavy = shape in spec.heavy
        turn = 1 + len(plan) % (len(LAYOUTS) - 1)
        cells = []
        for layout in (LAYOUTS[0], LAYOUTS[turn]) if heavy else LAYOUTS:
            around = (layout, dtype, shape)
            other = min(choices, key=lambda c: sum(met[place, c] for place in around))
            met.update((place, other) for place in around)
            for choice in dict.fromkeys((choices[0], other)):
                cells.append(Cell(name, shape, dtype, layout, choice))
        plan[shape, dtype] = cells
    return plan


def _case(cell: Cell):
    spec = SPECS[cell.spec]
    options = _named(spec, cell.options)
    return spec.case(spec.shapes[cell.shape], cell.dtype, cell.layout, options)


@lru_cache(maxsize=64)
def _expected(cell: Cell) -> Result:
    return exact(SPECS[cell.spec], _case(cell))


def _check(cell: Cell, backend: str | None) -> None:
    # Layouts share their values, but for the one that repeats rows.
    shared = cell if cell.layout == "expanded" else cell._replace(layout=LAYOUTS[0])
    spec, case = SPECS[cell.spec], _case(cell)
    assert_matches(spec, case, run(spec, case, backend), _expected(shared))


def _implementations():
    return [
        pytest.param(spec, backend, id=f"{spec.name}-{backend}" if backend else spec.name)
        for spec in OP_SPECS
        for backend in spec.implementations
    ]


def _blocks():
    for spec in OP_SPECS:
        for shape, dtype in product(spec.shapes, spec.dtypes):
            for backend in spec.implementations:
                kind = str(dtype).removeprefix("torch.")
                name = "-".join(filter(None, (spec.name, shape, kind, backend)))
                yield pytest.param(spec, shape, dtype, backend, id=name)


@pytest.fixture
def backend_ready(request):
    """Skips with the reason where the test's backend cannot run."""
    if request.node.callspec.params.get("backend") == "native":
        request.getfixturevalue("native_core")


@pytest.mark.parametrize(("spec", "shape", "dtype", "backend"), list(_blocks()))
def test_matches_the_reference(spec, shape, dtype, backend, backend_ready, poisoned_empty):
    """Value and gradients, every shape x dtype x layout, the options in turn."""
    for cell in _plan(spec.name)[shape, dtype]:
        _check(cell, backend)


@pytest.mark.parametrize("spec", OP_SPECS, ids=lambda spec: spec.name)
def test_the_plan_meets_every_pair(spec):
    cells = {cell for cells in _plan(spec.name).values() for cell in cells}
    for shape, dtype, layout in product(spec.shapes, spec.dtypes, LAYOUTS):
        if shape not in spec.heavy:
            default = spec.options_at(spec.shapes[shape])[0].name
            assert Cell(spec.name, shape, dtype, layout, default) in cells
    names = {options.name for options in spec.options}
    for field, values in (("layout", LAYOUTS), ("dtype", spec.dtypes)):
        met = {(getattr(cell, field), cell.options) for cell in cells}
        assert not set(product(values, names)) - met


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        pytest.param(spec, dtype, id=f"{spec.name}-{dtype}")
        for spec in OP_SPECS
        if spec.eager is not None
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
def test_half_inputs_are_no_worse_than_eager(spec, dtype):
    """Against the same mathematics written in plain torch in the dtype of the inputs."""
    compared = 0
    plain = spec.options[0]
    for name, shape in spec.shapes.items():
        if name in spec.heavy or not plain.fits(shape) or math.prod(shape) < 500:
            continue
        case = spec.case(shape, dtype, options=plain)
        want, rough = exact(spec, case), run_eager(spec, case)
        for backend in _runnable(spec):
            got = run(spec, case, backend)
            assert value_error(got, want) <= value_error(rough, want), case.text
            for name, gradient in want.gradients.items():
                ours = (got.gradients[name].double() - gradient).norm()
                theirs = (rough.gradients[name].double() - gradient).norm()
                assert ours <= theirs, f"{case.text}: gradient by {name}"
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize(("spec", "backend"), _implementations())
def test_bits_do_not_depend_on_threads_or_run(spec, backend, backend_ready, restore_threads):
    """1, 2 and 4 threads, on any number of cores, and 20 repeats of two shapes."""
    if backend == "reference":
        pytest.skip("plain torch does not promise the same bits for every thread count")
    small = [shape for shape in spec.shapes.values() if spec.options[0].fits(shape)]
    shapes = [*spec.parallel_shapes, *small[:: max(1, len(small) // 8)]]
    for number, shape in enumerate(shapes):
        for options in spec.options_at(shape)[:: 1 if number < len(spec.parallel_shapes) else 7]:
            case, first = spec.case(shape, options=options), None
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                for _ in range(10 if number < 2 and options is spec.options[0] else 1):
                    got = run(spec, case, backend)
                    first = got if first is None else first
                    _assert_same_bits(got, first, f"{case.text} {threads} threads")


def _assert_same_bits(got: Result, want: Result, text: str) -> None:
    assert torch.equal(got.value, want.value), text
    for name, gradient in want.gradients.items():
        assert torch.equal(got.gradients[name], gradient), f"{text}: gradient by {name}"


@pytest.mark.parametrize(("spec", "backend"), _implementations())
def test_random_calls(spec, backend, backend_ready):
    """Random shapes, dtypes, layouts, options and values; PADKERN_EXAMPLES of them (300)."""
    columns = list(zip(*spec.shapes.values(), strict=True))
    most = spec.random_most or (40,) * len(columns)
    sizes = [
        st.integers(min(column), min(max(column), limit))
        for column, limit in zip(columns, most, strict=True)
    ]

    @settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES <= 300,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        shape = tuple(data.draw(size) for size in sizes)
        choices = spec.options_at(shape)
        options = data.draw(st.sampled_from(choices))
        layout, dtype = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(spec.dtypes))
        case = spec.case(shape, dtype, layout, options, seed=data.draw(st.integers(0, 2**31)))
        assert_matches(spec, case, run(spec, case, backend), exact(spec, case))

    check()


# ---- instruction sets ----------------------------------------------------------------------------


def _runnable(spec: OpSpec) -> list[str | None]:
    built = _native.load().core is not None
    return [backend for backend in spec.implementations if backend != "native" or built]


def _reduced_plan(spec: OpSpec) -> list[Cell]:
    """Every shape, and every pair of dtype, layout and options, in a fraction of the cells."""
    wanted, chosen = set(), []
    for cell in chain.from_iterable(_plan(spec.name).values()):
        if cell.shape in spec.heavy:
            continue
        pairs = {cell.shape, (cell.dtype, cell.layout), (cell.dtype, cell.options)}
        pairs.add((cell.layout, cell.options))
        if pairs - wanted:
            wanted |= pairs
            chosen.append(cell)
    return chosen


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa, native_core):
    """The reduced plan in a process of its own: the level is chosen once per process."""
    detected = native_core.isa()["detected"]
    if detected not in ISAS[ISAS.index(isa) :]:
        pytest.skip(f"this CPU has {detected}, not {isa}")
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"PADKERN_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    chosen, count = done.stdout.split()
    assert chosen == isa
    assert int(count) >= 150


def main() -> None:
    """Runs the reduced plan of every op with a native backend; prints the level and the count."""
    count = 0
    for spec in OP_SPECS:
        if "native" in spec.backends:
            for cell in _reduced_plan(spec):
                _check(cell, "native")
                count += 1
    print(_native.load().core.isa()["chosen"], count)


if __name__ == "__main__":
    main()
