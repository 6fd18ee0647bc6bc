"""Runs the Triton cases of the sequence ops in Triton's interpreter, each in a process of its own.

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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
@pytest.mark.parametrize("op", ["short_attention", "ranking", "segments"])
def test_the_triton_backend_in_the_interpreter(op):
    cases = Path(__file__).with_name(f"test_{op}_triton.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "-x", "-m", "not gpu"]
    # One thread: the arrays are small, and other tests may run beside this one.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:benchmark"],
        env=environment,
        cwd=cases.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
