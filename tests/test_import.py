"""What importing padkern loads, and what works without the compiled core."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    out = run(
        "import sys, padkern\n"
        "heavy = ('torch', 'triton', 'transformers', 'typer', 'matplotlib', 'pyarrow')\n"
        "print([n for n in heavy if n in sys.modules], padkern.__version__)"
    )
    assert out.split() == ["[]", "0.1.0"]


def test_the_loss_loads_no_training_side():
    out = run(
        "import sys\nfrom padkern import mkmmd_loss, MKMMDLoss\n"
        "heavy = ('triton', 'transformers', 'typer', 'matplotlib', 'pyarrow', 'pydantic')\n"
        "own = [n for n in sys.modules if n.startswith(('padkern.pad', 'padkern.data'))]\n"
        "print([n for n in heavy if n in sys.modules] + own)"
    )
    assert out.strip() == "[]"


def test_without_the_compiled_core_the_reference_works():
    out = run(
        "import sys\nsys.modules['padkern._C'] = None\n"
        "import torch\nfrom padkern import mkmmd_loss\n"
        "x, y = torch.randn(4, 2), torch.randn(4, 2)\n"
        "print(bool(torch.isfinite(mkmmd_loss(x, y))))\n"
        "try:\n    mkmmd_loss(x, y, backend='native')\n"
        "except RuntimeError as error:\n    print(error)"
    )
    first, second = out.splitlines()
    assert first == "True"
    assert second.startswith("backend='native' cannot be used: padkern._C is not available")


def test_unknown_attribute_names_itself():
    import padkern

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = padkern.nothing


def test_lazy_names_are_listed():
    import padkern

    assert {"mkmmd_loss", "TripleExpert", "MKMMDLoss"} <= set(dir(padkern))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(isa, native_core):
    import platform

    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(native_core.isa()["detected"]):
        pytest.skip(f"this {platform.machine()} CPU has no {isa}")
    out = run(
        "import torch\nfrom functools import partial\nfrom padkern import mkmmd_loss, _native\n"
        "from padkern.testing import assert_mkmmd_matches_reference, make_mkmmd_inputs\n"
        "loss = partial(mkmmd_loss, backend='native')\n"
        "for shape in ((2, 2, 1), (47, 49, 15), (97, 50, 33), (481, 20, 8)):\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        for alphas in ((0.125, 0.25, 0.5, 1, 2), (0.3, 0.7)):\n"
        "            x, y = make_mkmmd_inputs(*shape, dtype)\n"
        "            assert_mkmmd_matches_reference(loss, x, y, alphas=alphas)\n"
        "print(_native.load().core.isa()['chosen'])",
        PADKERN_ISA=isa,
    )
    assert out.strip() == isa


def test_unknown_instruction_set_is_named(native_core):
    out = run(
        "import torch\nfrom padkern import mkmmd_loss\n"
        "try:\n    mkmmd_loss(torch.ones(2, 1), torch.ones(2, 1), backend='native')\n"
        "except RuntimeError as error:\n    print(error)",
        PADKERN_ISA="sse9",
    )
    assert "PADKERN_ISA must be baseline, avx2 or avx512, got 'sse9'" in out


def test_a_forked_child_computes_serially(native_core):
    out = run(
        "import os, torch\nfrom padkern import mkmmd_loss\n"
        "torch.set_num_threads(2)\n"
        "x, y = torch.randn(700, 64), torch.randn(700, 64)\n"
        "want = mkmmd_loss(x, y, backend='native').item()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if mkmmd_loss(x, y, backend='native').item() == want else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert out.strip() == "0"


def test_threads_are_torchs_own(native_core, restore_threads):
    import torch

    from padkern import _native

    assert _native.load().threads == "torch"
    for count in (1, 3, 2):
        torch.set_num_threads(count)
        assert native_core.num_threads() == count
