"""Readers of published files: from the raw files to filtered and split sequences.

Each round is a process of its own, so that its highest memory is that of the reading alone; start
of Python and imports are in the time of the round, not in ``read_s``. By default a hundredth of the
size of Amazon Electronics 2018 and a tenth of MIND-small; the full sizes with
``PADKERN_BENCH_ELECTRONICS=1`` and ``PADKERN_BENCH_MIND=1``.
"""

from __future__ import annotations

import os

import pytest
from raw_files import ITEMS, WRITERS, read_in_child

_SCALES = {
    "amazon2018": 1.0 if os.environ.get("PADKERN_BENCH_ELECTRONICS") == "1" else 0.01,
    "mind": 1.0 if os.environ.get("PADKERN_BENCH_MIND") == "1" else 0.1,
}


@pytest.mark.parametrize("kind", sorted(WRITERS))
def bench_read_and_split(benchmark, machine, tmp_path, kind):
    """Read with the authors' filters, and leave one out."""
    scale = _SCALES[kind]
    WRITERS[kind](tmp_path / kind, scale)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / kind).iterdir()}
    found = read_in_child(tmp_path / kind)
    assert found["train"] == found["interactions"] - 2 * found["users"]
    assert found["items"] <= max(50, ITEMS * scale)
    benchmark.group = f"read {kind}"
    benchmark.extra_info.update(machine(), scale=scale, bytes=sizes, **found)
    rounds = 1 if scale == 1.0 else 3
    benchmark.pedantic(lambda: read_in_child(tmp_path / kind), rounds=rounds, iterations=1)
