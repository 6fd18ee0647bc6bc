"""Whole runs of two versions of padkern, in turn on the same data and seed: wall seconds by phase.

    python python/compare_versions.py OLD NEW --data prime_pantry --text minilm --seed 1 \
        --rounds 2 --out docs/results/versions.json

OLD and NEW are environments with padkern installed (they hold ``bin/padkern``) or built source
trees (they hold ``padkern/`` with its compiled core; run with this interpreter). The texts are
embedded once, by NEW, before anything is timed; a matrix file is taken as it is. Every second round
runs NEW first, so that a machine that slows down meets both. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("old", "new")
METRICS = ("hit@10", "ndcg@10")
REST = "start, data, report"


def command(version: Path) -> tuple[list[str], dict[str, str]]:
    """The start of a command line of that version, and its environment.

    Raises:
        SystemExit: the folder holds neither an environment nor a source tree.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    program = version / "bin" / "padkern"
    if program.exists():
        return [str(program.absolute())], environment
    if (version / "padkern" / "__init__.py").exists():
        environment["PYTHONPATH"] = str(version.absolute())
        return [sys.executable, "-m", "padkern"], environment
    raise SystemExit(f"{version}: neither bin/padkern nor padkern/__init__.py is there")


def call(version: Path, *arguments: str) -> str:
    """Standard output of ``padkern ARGUMENTS``; stops where it fails."""
    start, environment = command(version)
    done = subprocess.run(
        [*start, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise SystemExit(f"{version}: padkern {arguments[0]} failed:\n" + "\n".join(lines))
    return done.stdout


def described(version: Path) -> dict[str, str]:
    """What identifies a version: its own number, and the commit where it is a git tree."""
    found = {"path": version.name, "version": call(version, "--version").strip()}
    git = ["git", "-C", str(version), "rev-parse", "HEAD"]
    if (version / ".git").exists():
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        found |= {"commit": done.stdout.strip()} if done.returncode == 0 else {}
    return found


def timed_run(version: Path, out: Path, arguments: list[str]) -> dict[str, Any]:
    """One whole run: wall seconds, seconds of each phase, and the metrics of each row."""
    started = time.perf_counter()
    call(version, "run", "--out", str(out), "--quiet", *arguments)
    wall = time.perf_counter() - started
    metrics = json.loads((out / "metrics.json").read_text())
    seconds = dict(metrics["seconds"])
    seconds[REST] = wall - sum(seconds.values())
    rows = {
        row: {name: parts["test"]["all"][name] for name in METRICS}
        for row, parts in metrics["models"].items()
    }
    return {"wall": wall, "seconds": seconds, "rows": rows}


def compare(versions: dict[str, Path], arguments: list[str], rounds: int, work: Path) -> dict:
    """Runs both versions ``rounds`` times in turn."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            found = timed_run(versions[side], work / f"{side}-{number + 1}", arguments)
            print(f"round {number + 1}, {side}: {found['wall']:.1f} s", flush=True)
            runs[side].append(found)
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": {side: described(versions[side]) for side in SIDES},
        "rounds": rounds,
        "runs": runs,
        "median": {side: _medians(runs[side]) for side in SIDES},
    }


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = runs[0]["seconds"]
    return {
        "wall": statistics.median(run["wall"] for run in runs),
        "seconds": {
            name: statistics.median(run["seconds"][name] for run in runs) for name in names
        },
        "rows": {
            row: {name: statistics.median(run["rows"][row][name] for run in runs) for name in cells}
            for row, cells in runs[0]["rows"].items()
        },
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown(result: dict) -> str:
    """Seconds by phase with the ratio old / new, then Hit@10 / NDCG@10 of both on test."""
    old, new = (result["median"][side] for side in SIDES)

    def line(name: str, a: float | None, b: float | None) -> str:
        cells = ["-" if value is None else f"{value:.2f}" for value in (a, b)]
        ratio = f"{a / b:.2f}x" if a is not None and b else "-"
        return f"| {name} | {cells[0]} | {cells[1]} | {ratio} |"

    lines = ["| phase | old, s | new, s | old / new |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys([*old["seconds"], *new["seconds"]]):
        lines.append(line(name, old["seconds"].get(name), new["seconds"].get(name)))
    lines.append(line("whole run", old["wall"], new["wall"]))
    lines += ["", "| row | old Hit@10 / NDCG@10 | new Hit@10 / NDCG@10 |", "|---|---:|---:|"]
    for row in dict.fromkeys([*old["rows"], *new["rows"]]):
        cells = []
        for side in (old, new):
            values = [side["rows"].get(row, {}).get(name) for name in METRICS]
            cells.append("-" if None in values else " / ".join(f"{100 * v:.2f}" for v in values))
        lines.append(f"| {row} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="environment or built source tree")
    parser.add_argument("new", type=Path, help="environment or built source tree")
    parser.add_argument("--data", required=True, help="as in padkern run")
    parser.add_argument("--text", required=True, help="text encoder or matrix file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each version (default 2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=C", help="configuration")
    parser.add_argument("--work", type=Path, help="keeps run folders here; must be new or empty")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    versions = {"old": options.old, "new": options.new}
    for version in versions.values():
        command(version)  # a wrong path is told before anything is embedded
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--work must be empty, {work} is not")
        text = Path(options.text)
        if not text.is_file():
            text = work / "text.safetensors"
            call(
                options.new,
                *("embed", "--data", options.data, "--text", options.text, "--out", str(text)),
            )
        arguments = ["--data", options.data, "--text", str(text), "--seed", str(options.seed)]
        for value in options.set:
            arguments += ["--set", value]
        result = compare(versions, arguments, options.rounds, work)
    result |= {"data": options.data, "text": options.text, "seed": options.seed, "set": options.set}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
