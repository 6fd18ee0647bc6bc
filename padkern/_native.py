"""Loads the compiled CPU core and hands it torch's thread pool, or keeps the reason why not."""

from __future__ import annotations

import ctypes
import json
import os
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Native(NamedTuple):
    """The compiled core and its thread backend.

    Attributes:
        core: ``padkern._C``, or None when it did not load.
        reason: Why ``core`` is None, one sentence; empty when it loaded.
        threads: "torch" (torch's own pool) or "serial".
    """

    core: ModuleType | None
    reason: str
    threads: str


def _torch_pool() -> tuple[int, int] | None:
    """Addresses of torch's exported C functions, or None on a torch without them."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        path = folder / name
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))  # already mapped by torch: this only finds the handle
            symbols = (library.torch_parallel_for, library.torch_get_num_threads)
        except (OSError, AttributeError):
            return None
        first, second = (ctypes.cast(symbol, ctypes.c_void_p).value or 0 for symbol in symbols)
        return first, second
    return None


@lru_cache(maxsize=1)
def load() -> Native:
    """Loads ``padkern._C`` once per process."""
    try:
        core = import_module("padkern._C")
    except ImportError as error:
        return Native(None, f"padkern._C is not available: {error}", "serial")
    isa = core.isa()
    if isa["error"]:
        return Native(None, isa["error"], "serial")
    pool = _torch_pool()
    if pool is not None:
        core.set_parallel(*pool)
        # A pool used before fork has no threads in the child and would wait for them forever.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: core.set_parallel(0, 0))
    return Native(core, "", "torch" if pool is not None else "serial")


class CudaLibrary(NamedTuple):
    """The compiled CUDA library.

    Attributes:
        library: The loaded shared object, or None when it did not load.
        reason: Why ``library`` is None, one sentence; empty when it loaded.
    """

    library: ctypes.CDLL | None
    reason: str


# Must equal PADKERN_CUDA_ABI of csrc/mkmmd/mkmmd_cuda.h.
_CUDA_ABI = 1


def open_cuda(path: Path) -> ctypes.CDLL:
    """Loads one file of the CUDA library and declares its functions.

    Raises:
        OSError: It does not load, or is of another version.
    """
    library = ctypes.CDLL(str(path))
    try:
        abi = library.padkern_cuda_abi()
        library.padkern_mkmmd_params_bytes.restype = ctypes.c_int64
        library.padkern_mkmmd_workspace_bytes.restype = ctypes.c_int64
        library.padkern_mkmmd_workspace_bytes.argtypes = [ctypes.c_void_p]
        library.padkern_mkmmd.restype = ctypes.c_int32
        library.padkern_mkmmd.argtypes = [ctypes.c_void_p]
        library.padkern_cuda_error_text.restype = ctypes.c_char_p
    except AttributeError as error:
        raise OSError(f"a function is missing: {error}") from error
    if abi != _CUDA_ABI:
        raise OSError(f"its interface has version {abi}, this padkern needs {_CUDA_ABI}")
    return library


@lru_cache(maxsize=1)
def load_cuda() -> CudaLibrary:
    """Loads the CUDA library once per process."""
    path = Path(__file__).with_name("libpadkern_cuda.so")
    if not path.exists():
        return CudaLibrary(None, "the CUDA library was not built")
    try:
        return CudaLibrary(open_cuda(path), "")
    except OSError as error:
        return CudaLibrary(None, f"the CUDA library does not load: {error}")


def build_info() -> dict[str, Any]:
    """What the installed build contains; empty when the package was not built."""
    path = Path(__file__).with_name("_build_info.json")
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))
