"""Plants one bug at a time in a copy of the checkout and demands that the tests turn red.

    python tests/mutants/run.py [--root FOLDER] [NAME ...]

The copy is built once with CMake, its clean tests must pass, and then every mutant of
``mutants.py`` (or those named) is planted, built where it is C++, and tested. Exit status 1 when a
mutant survives, does not apply or does not build.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A planted bug may well make a test wait forever. The limit of one test ends the process from a
# thread of its own, which works while compiled code spins; the other is for what even that misses.
TEST_SECONDS = 60
RUN_SECONDS = 900
BUILT = ("*.so", "__pycache__", "build", ".git", ".venv*", "runs", "*.egg-info", "_build")


def load_mutants() -> tuple[Any, ...]:
    """The definitions beside this file, also where Python does not search its folder."""
    path = Path(__file__).with_name("mutants.py")
    spec = importlib.util.spec_from_file_location("padkern_mutants", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MUTANTS


class Failure(Exception):
    """Something other than a surviving mutant went wrong; the message says what."""


def copy_tree(root: Path, to: Path) -> None:
    """Copies what git knows or would add, or everything that is not built without git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=False)
    if listed.returncode != 0:
        shutil.copytree(root, to, ignore=shutil.ignore_patterns(*BUILT))
        return
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = root / name, to / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def build(tree: Path) -> None:
    """Compiles what changed and puts the extension beside the sources."""
    folder = tree / "build"
    if not (folder / "build.ninja").exists():
        import pybind11

        # Programs of this environment (cmake, ninja) first.
        command = ["cmake", "-S", str(tree), "-B", str(folder), "-GNinja", "-DPADKERN_CUDA=OFF"]
        command += [f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        _call(command, tree)
    _call(["cmake", "--build", str(folder)], tree)
    for extension in folder.glob("_C*.so"):
        shutil.copy2(extension, tree / "padkern")
    shutil.copy2(folder / "_build_info.json", tree / "padkern")


def _environment(tree: Path) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PATH"] = str(Path(sys.executable).parent) + os.pathsep + environment["PATH"]
    return environment


def _call(command: list[str], tree: Path) -> None:
    done = subprocess.run(
        command, cwd=tree, env=_environment(tree), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Failure(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def run_tests(tree: Path, mutant: Any, selections: list[tuple[str, ...]]) -> str:
    """Runs the selections until a test fails.

    Returns:
        The first failing test, or how pytest died; empty when everything passed.
    """
    for selection in selections:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-rfE"]
        command += ["-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"]
        command += ["--timeout-method=thread", *selection]
        environment = _environment(tree) | dict(mutant.environment)
        try:
            done = subprocess.run(
                command,
                **{"cwd": tree, "env": environment, "capture_output": True, "text": True},
                timeout=RUN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"time limit of {RUN_SECONDS} s"
        if done.returncode == 0:
            continue
        if done.returncode < 0:
            return f"crash with signal {-done.returncode}"
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode != 1:
            output = (done.stdout + done.stderr)[-3000:]
            raise Failure(f"pytest {' '.join(selection)} ended with {done.returncode}:\n{output}")
        if failed:
            return failed[1].removeprefix("tests/")
        hung = re.search(r"in (test_\w+)", done.stdout + done.stderr)
        return f"time limit of {hung[1] if hung else 'a test'}"
    return ""


def plant(tree: Path, mutant: Any) -> str:
    """Replaces the one occurrence of the mutant's text; returns the file's clean text."""
    path = tree / mutant.file
    clean = path.read_text(encoding="utf-8") if path.exists() else ""
    found = clean.count(mutant.old)
    if found != 1:
        raise Failure(f"its text occurs {found} times in {mutant.file}, not once")
    path.write_text(clean.replace(mutant.old, mutant.new), encoding="utf-8")
    return clean


def check_clean(tree: Path, mutants: list[Any]) -> None:
    """The copy's own package is the one under test, and its tests pass."""
    where = subprocess.run(
        [sys.executable, "-c", "import padkern; print(padkern.__file__)"],
        **{"cwd": tree, "env": _environment(tree), "capture_output": True, "text": True},
    )
    if str(tree) not in where.stdout:
        raise Failure(f"the tests would import {where.stdout.strip()}, not the copy")
    seen: dict[tuple[str, ...], Any] = {}
    for mutant in mutants:
        for selection in mutant.tests:
            seen.setdefault((*selection, str(mutant.environment)), mutant)
    for key, mutant in seen.items():
        failed = run_tests(tree, mutant, [key[:-1]])
        if failed:
            raise Failure(f"the clean tests fail: {failed} ({' '.join(key[:-1])})")


def main() -> int:
    """Runs the mutants; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants to run; all without names")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to copy")
    arguments = parser.parse_args()
    every = load_mutants()
    names = [name for word in arguments.names for name in word.split(",") if name]
    unknown = set(names) - {mutant.name for mutant in every}
    if unknown:
        parser.error(f"unknown mutants: {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in every if not names or mutant.name in names]
    missing = {name: importlib.util.find_spec(name) is None for name in {m.needs for m in mutants}}
    for mutant in [m for m in mutants if m.needs and missing[m.needs]]:
        print(f"{mutant.name}: not run, {mutant.needs} is not installed")
        mutants.remove(mutant)
    # Python first, then C++ file by file: each change of file compiles that file twice.
    mutants.sort(key=lambda mutant: (mutant.is_native, mutant.file))

    with tempfile.TemporaryDirectory(prefix="padkern-mutants-") as folder:
        tree = Path(folder) / "tree"
        start = time.monotonic()
        copy_tree(arguments.root, tree)
        try:
            build(tree)
            check_clean(tree, mutants)
        except Failure as failure:
            print(f"mutants: {failure}", file=sys.stderr)
            return 1
        print(f"clean tests pass ({time.monotonic() - start:.0f} s with the build)", flush=True)
        width = max(len(mutant.name) for mutant in mutants)
        wide = max(len(mutant.file) for mutant in mutants)
        bad = 0
        for mutant in mutants:
            start = time.monotonic()
            clean = None
            try:
                clean = plant(tree, mutant)
                if mutant.is_native:
                    build(tree)
                killer = run_tests(tree, mutant, list(mutant.tests))
                verdict = f"killed by {killer}" if killer else "SURVIVED"
                bad += not killer
            except Failure as failure:
                verdict = f"INVALID: {failure}"
                bad += 1
            finally:
                if clean is not None:
                    (tree / mutant.file).write_text(clean, encoding="utf-8")
            seconds = time.monotonic() - start
            print(
                f"{mutant.name:{width}}  {mutant.file:{wide}}  {seconds:5.1f} s  {verdict}",
                flush=True,
            )
        print(f"mutants: {len(mutants) - bad} of {len(mutants)} killed")
        return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
