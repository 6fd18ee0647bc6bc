"""Runs the cases of three ops' Triton backends in Triton's interpreter, in one other process.

Triton reads TRITON_INTERPRET when a kernel is defined, and padkern when it chooses a backend: a
process interprets or it does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CASES = (
    "test_gated_table_triton.py",
    "test_triple_expert_triton.py",
    "test_catalogue_loss_triton.py",
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_the_triton_backends_in_the_interpreter():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", *(str(folder / name) for name in CASES)]
    # One thread: the arrays are small, and other tests may run beside this one.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", "-p", "no:benchmark"],
        env=environment,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
