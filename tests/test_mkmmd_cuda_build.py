"""The CUDA library compiles, its kernels keep within their registers, and it refuses bad calls.

Needs a CUDA compiler, no GPU. What the kernels compute is the matter of ``test_mkmmd_cuda.py``.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from padkern import _native
from padkern.ops.mkmmd import cuda_impl

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90a")
# Kernels by what -Xptxas -v may say of them. The first group meets every pair of rows.
PAIR_KERNELS = ("Value", "Gradient", "StripCoefficients", "StripRows", "Norms")
OTHER_KERNELS = (
    *("WeightSums", "ColumnSums", "Mean", "Pack", "Bandwidth", "Combine", "Finish"),
    *("WideValue", "WideGradient"),
)


class Resources(NamedTuple):
    """What the assembler reports of one kernel for one architecture."""

    name: str
    arguments: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


class Build(NamedTuple):
    """A compiled library, the assembler's report and the seconds it took."""

    path: Path
    resources: list[Resources]
    seconds: float


def parse_resources(report: str) -> list[Resources]:
    """Reads the output of ``-Xptxas -v``; kernels are template instances of ``kernel<Body>``."""
    found = []
    for part in report.split("Compiling entry function ")[1:]:
        mangled, architecture = re.match(r"'(\S+)' for 'sm_(\w+)'", part).groups()
        # ...6kernelINS0_<length><name>[I<arguments>E]E...
        length, rest = re.search(r"kernelINS\d*_(\d+)(\w+)", mangled).groups()
        name, rest = rest[: int(length)], rest[int(length) :]
        arguments = ",".join(re.findall(r"L[ib](\d+)E", rest))
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        used = re.search(r"Used (\d+) registers", part).group(1)
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                *(name, arguments, architecture, int(used), int(stack), int(stores) + int(loads)),
                int(shared.group(1)) if shared else 0,
            )
        )
    return found


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """The library as CMakeLists.txt builds it, with the assembler's report."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    path = tmp_path_factory.mktemp("cuda") / "libpadkern_cuda.so"
    start = time.perf_counter()
    result = subprocess.run(
        [
            *(nvcc, "-std=c++17", "-O3", "-shared", "-Xptxas", "-v", f"-I{CSRC}"),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
            *("-Werror", "all-warnings", str(CSRC / "mkmmd" / "mkmmd_cuda.cu"), "-o", str(path)),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    resources = parse_resources(result.stdout + result.stderr)
    return Build(path, resources, time.perf_counter() - start)


@pytest.mark.slow
def test_kernels_keep_within_registers_and_memory(build, record_property):
    for kernel in build.resources:
        # As text: a property travels between processes where the tests are shared among several.
        record_property(f"{kernel.name}<{kernel.arguments}> sm_{kernel.architecture}", str(kernel))
    for architecture in ARCHITECTURES:
        kernels = [k for k in build.resources if k.architecture == architecture]
        assert {k.name for k in kernels} == {*PAIR_KERNELS, *OTHER_KERNELS}
        for kernel in kernels:
            assert kernel.spills == 0, kernel
            # All shared memory is dynamic: the launcher asks for what the sizes need.
            assert kernel.shared == 0, kernel
            if kernel.name in PAIR_KERNELS:
                assert kernel.stack == 0, kernel
        # Blocks of 128 threads: two fit a multiprocessor's 65536 registers up to 255 each, three up
        # to 168.
        assert all(k.registers <= 255 for k in kernels)
        (value,) = (k for k in kernels if k.name == "Value" and k.arguments == "1,0")
        assert value.registers <= 168, value


@pytest.mark.slow
def test_the_library_is_not_slow_to_compile(build):
    # Several times what it takes, so that a busy machine passes.
    assert build.seconds < 270


@pytest.mark.slow
def test_the_library_stands_alone(build):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    out = subprocess.run([readelf, "-d", str(build.path)], capture_output=True, text=True).stdout
    needed = [line for line in out.splitlines() if "(NEEDED)" in line]
    assert needed
    # No torch, and CUDA's runtime is linked in: the driver is looked for at the first call.
    for library in ("torch", "cudart", "libcuda"):
        assert not any(library in line for line in needed), needed


def _params(**changes):
    """A good call for [5, 3] and [4, 3] float32 rows, but for pointers that nobody may follow."""
    somewhere = 1 << 20
    params = cuda_impl._Params(
        dim=3,
        num_alphas=1,
        value=somewhere,
        workspace=somewhere,
        workspace_bytes=1 << 40,
        products=3,
    )
    for sample, rows in ((params.source, 5), (params.target, 4)):
        sample.data, sample.rows, sample.row_stride, sample.column_stride = somewhere, rows, 3, 1
    alphas = (ctypes.c_double * 1)(1.0)
    params.host_alphas = ctypes.addressof(alphas)
    params.keep = alphas
    for name, value in changes.items():
        target, _, field = name.rpartition("__")
        setattr(getattr(params, target) if target else params, field, value)
    return params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source__rows": 0}, "sizes must be positive"),
        ({"dim": 1 << 20}, "sizes must be positive, dim below"),
        ({"num_alphas": 65}, "alphas must hold 1 to 64 values, got 65"),
        ({"dtype": 2}, "dtype must be 0 .* got 2"),
        ({"estimator": 4}, "estimator must be 0 to 3 .* got 4 and 0"),
        ({"kernel": -1}, "kernel 0 to 4, got 0 and -1"),
        ({"products": 2}, "products must be 1 or 3, got 2"),
        ({"path": 7}, "path must be .* got 7"),
        ({"source__dtype": 1}, "source has dtype 1"),
        ({"target__dtype": 4}, "target has dtype 4"),
        ({"target__weight": 1 << 20, "target__weight_dtype": 9}, "target_weight has unknown dtype"),
        ({"source__data": None}, "source must not be null"),
        ({"sigma_gradient": 1 << 20}, "gradient is wanted exactly when"),
        ({"alphas_gradient": 1 << 20}, "alphas_gradient and betas_gradient go together"),
        ({"target__rows": 1}, "target needs at least 2 rows for this estimator, got 1"),
        ({"estimator": 2}, "equal sizes, got 5 and 4"),
        ({"host_alphas": None}, "give either host_alphas or alphas"),
        ({"betas": 1 << 20, "betas_dtype": 4}, "must be of dtype 0 to 3, got 4"),
        ({"value": None}, "value must not be null"),
        ({"workspace": (1 << 20) + 8}, "aligned to 64 bytes"),
        ({"workspace_bytes": 100}, r"workspace must hold \d+ bytes, got 100"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_calls_are_refused_with_a_text(build, changes, message):
    library = _native.open_cuda(build.path)
    params = _params(**changes)
    assert library.padkern_mkmmd(ctypes.byref(params)) == 1
    assert re.search(message, library.padkern_cuda_error_text().decode())


@pytest.mark.slow
def test_sizes_without_a_gpu(build):
    library = _native.open_cuda(build.path)
    assert library.padkern_mkmmd_params_bytes() == ctypes.sizeof(cuda_impl._Params)

    def size(rows, dim, **changes):
        params = _params(source__rows=rows, target__rows=rows, dim=dim, **changes)
        return library.padkern_mkmmd_workspace_bytes(ctypes.byref(params))

    gradient = {
        name: 1 << 20 for name in ("sigma_gradient", "source__gradient", "target__gradient")
    }
    assert size(0, 4) == 0
    # Packed rows take as much as float32 inputs. Gradients add a copy per split of the columns, and
    # none from 8192 rows on; wide rows a strip of coefficients.
    for dim in (64, 128, 256):
        inputs = 2 * 16384 * dim * 4
        assert size(16384, dim) < 1.1 * inputs
        assert size(16384, dim, **gradient) < 1.1 * inputs
    assert size(4096, 1024, **gradient) < 1.6 * 2 * 4096 * 1024 * 4
    assert size(672, 128, **gradient) < 10 * 2**20
    # Sizes beyond 32 bits are added up in 64.
    assert size(1 << 26, 1 << 12) > 1 << 40


@pytest.mark.slow
def test_a_launch_without_a_driver_is_an_error_not_a_crash(build):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA driver; the call's pointers lead nowhere")
    library = _native.open_cuda(build.path)
    code = library.padkern_mkmmd(ctypes.byref(_params()))
    assert code > 1000
    assert "CUDA" in library.padkern_cuda_error_text().decode()
