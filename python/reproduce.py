"""Computes the tables of named grids and, if asked, puts them into a document.

    python python/reproduce.py smoke --out runs/smoke
    python python/reproduce.py default more ablation backbones --out runs --docs docs/tables.md

Several grids get a folder each under ``--out``. A call continues what an earlier one left there. At
the end it says what was computed and what was left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from padkern.errors import PadkernError
from padkern.pad.grid.report import left_out
from padkern.pad.grid.runner import compare
from padkern.pad.progress import make_reporter

GRIDS = Path(__file__).with_name("grids")


def summary(table: dict[str, Any]) -> list[str]:
    """What was computed and what was not, a line each."""
    lines = []
    for name, entry in table["datasets"].items():
        done = [f"{label} ({len(method['seeds'])})" for label, method in entry["methods"].items()]
        lines.append(f"{name}: {', '.join(done) or 'nothing'}")
    missing = left_out(table)
    return ["Computed, with the number of seeds:", *lines, "Left out:", *(missing or ["nothing"])]


def insert(document: str, name: str, markdown: str) -> str:
    """The document with the tables in place of those that a call before put there, or at its end.

    Headings move down one level, so that the tables are a section.
    """
    body = re.sub(r"^#", "##", markdown, flags=re.MULTILINE).strip()
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    block = f"{begin}\n{body}\n{end}"
    before, mark, rest = document.partition(begin)
    if not mark:
        return f"{document.rstrip()}\n\n{block}\n"
    _, closed, after = rest.partition(end)
    if not closed:
        raise SystemExit(f"{begin} without {end}")
    return before + block + after


def rounded(value: Any) -> Any:
    """Every number with eight decimals: users are thousands, so nothing is lost that counts."""
    if isinstance(value, float):
        return round(value, 8)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def main(argv: list[str] | None = None) -> int:
    names = sorted(path.stem for path in GRIDS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grids", nargs="+", choices=names, help="files in python/grids")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison(s)")
    parser.add_argument("--budget", type=float, help="minutes for each grid")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--docs", type=Path, help="Markdown file to put the tables into")
    parser.add_argument("--json", type=Path, help="folder for GRID.json, every figure of the table")
    options = parser.parse_args(argv)
    failed = 0
    for name in options.grids:
        out = options.out if len(options.grids) == 1 else options.out / name
        try:
            table = compare(
                GRIDS / f"{name}.yaml", out, budget=options.budget,
                jobs=options.jobs, device=options.device, reporter=make_reporter(),
            )  # fmt: skip
        except PadkernError as error:
            print(f"reproduce: error: {error}", file=sys.stderr)
            return error.exit_code
        print("\n".join(summary(table)))
        if options.docs:
            markdown = (out / "table.md").read_text(encoding="utf-8")
            document = options.docs.read_text(encoding="utf-8")
            options.docs.write_text(insert(document, name, markdown), encoding="utf-8")
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            content = json.dumps(rounded(table), separators=(",", ":"), ensure_ascii=False)
            (options.json / f"{name}.json").write_text(content + "\n", encoding="utf-8")
        failed += len(table["failed"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
