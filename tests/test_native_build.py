"""What the build must prove: the core is there, links nothing it must not, and no wide-vector
instruction can reach a narrower CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from padkern import _native

ROOT = Path(__file__).resolve().parents[1]


def test_build_info_says_what_was_built(native_core):
    info = _native.build_info()
    assert info["version"] == native_core.__version__ == "0.1.0"
    assert "baseline" in info["isas"]
    assert info["cuda"]


def test_the_core_needs_no_torch_openmp_or_cuda(native_core):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    out = subprocess.run([readelf, "-d", native_core.__file__], capture_output=True, text=True)
    needed = [line for line in out.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    for library in ("torch", "gomp", "omp", "cudart"):
        assert not any(library in line for line in needed)


def _compile_object(tmp_path: Path, source: str, isa: str, flags: list[str]) -> Path:
    """Compiles the per-instruction-set source alone, with the flags of CMakeLists.txt."""
    out = tmp_path / f"{isa}.o"
    subprocess.run(
        [
            shutil.which("g++") or "g++",
            *("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
            *("-ffp-contract=fast", "-fno-exceptions", "-fvisibility=hidden"),
            *flags,
            f"-DPADKERN_ISA_NAMESPACE={isa}",
            f"-I{ROOT / 'csrc'}",
            *("-c", str(ROOT / "csrc" / source), "-o", str(out)),
        ],
        check=True,
        capture_output=True,
    )
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "flags", "forbidden"),
    [
        ("baseline", [], ("%ymm", "%zmm")),
        ("avx2", ["-mavx2", "-mfma", "-mf16c"], ("%zmm",)),
    ],
)
@pytest.mark.parametrize(
    "source",
    [
        "mkmmd/mkmmd_kernel.cpp",
        "mkmmd/kernel_products_kernel.cpp",
        "ranking/ranking_kernel.cpp",
    ],
)
def test_objects_hold_no_wider_instruction(tmp_path, source, isa, flags, forbidden):
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"x86-64 only, this is {platform.machine()}")
    if shutil.which("g++") is None or shutil.which("objdump") is None:
        pytest.skip("g++ and objdump are needed")
    path = _compile_object(tmp_path, source, isa, flags)
    code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True).stdout
    assert f"padkern{len(isa)}{isa}" in code  # the mangled namespace of this instruction set
    for register in forbidden:
        assert register not in code
    sections = subprocess.run(["objdump", "-h", str(path)], capture_output=True, text=True).stdout
    assert ".init_array" not in sections  # a static initialiser would run on every CPU
    symbols = subprocess.run(
        ["nm", "-C", "--undefined-only", str(path)], capture_output=True, text=True
    ).stdout
    assert "std::" not in symbols


def test_cmake_configures_without_torch_and_asks_for_cuda_only_when_told():
    text = (ROOT / "CMakeLists.txt").read_text()
    code = "\n".join(line.split("#", 1)[0] for line in text.splitlines())
    assert "find_package(Torch" not in code
    assert "OpenMP" not in code
    assert "march=native" not in code
    assert "ffast-math" not in code


@pytest.mark.slow
def test_cuda_on_without_a_compiler_fails_with_one_clear_line(tmp_path):
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    compiler = shutil.which("c++") or shutil.which("g++")
    if cmake is None or ninja is None or compiler is None:
        pytest.skip("cmake, ninja and a C++ compiler are needed")
    import sys

    import pybind11

    def configure(mode: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(cmake, "-S", str(ROOT), "-B", str(tmp_path / mode), "-GNinja"),
                *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}"),
                *(f"-DPython_EXECUTABLE={sys.executable}", f"-DPADKERN_CUDA={mode}"),
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ],
            # A compiler that is no compiler stands for a machine without nvcc.
            env={"PATH": "/usr/bin:/bin", "CUDACXX": str(tmp_path / "no-nvcc")},
            capture_output=True,
            text=True,
        )

    failed = configure("ON")
    assert failed.returncode != 0
    assert "PADKERN_CUDA=ON but no working CUDA compiler was found" in failed.stderr
    passed = configure("AUTO")
    assert passed.returncode == 0, passed.stderr
    assert "no working CUDA compiler" in passed.stdout
