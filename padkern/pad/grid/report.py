"""What a comparison ends with: ``table.json``, ``table.md``, ``report.html``, the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from padkern.pad.evaluation import FREQUENCY_GROUPS
from padkern.pad.folder import RunFolder
from padkern.pad.grid import figures
from padkern.pad.grid.cells import Result
from padkern.pad.grid.spec import Grid
from padkern.pad.grid.table import HISTORY_GROUPS, build_table
from padkern.pad.progress import Reporter
from padkern.pad.summary import group_title, interval_text, percent

__all__ = ["TextTable", "left_out", "markdown", "show", "text_tables", "write_tables"]

_REAL = 0.05


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: what it shows.
        columns, rows: headings and cells; the first column names the rows.
        open: shown at once in the report, else folded.
        best: row with a badge.
        notes: row -> small print, for the report.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    open: bool = False
    best: str = ""
    notes: Mapping[str, str] | None = None


def write_tables(
    folder: RunFolder,
    grid: Grid,
    results: Sequence[Result],
    failures: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes ``table.md``, ``report.html`` and, last, ``table.json``; returns its content."""
    table = build_table(grid, results, failures, plan)
    folder.write_text("table.md", markdown(table))
    folder.write_text("report.html", _html(table, grid, results))
    folder.write_json("table.json", table)
    return table


def show(table: Mapping[str, Any], reporter: Reporter) -> None:
    """The overall test table of every data set, and what is missing."""
    for name, entry in table["datasets"].items():
        for shown in text_tables(entry)[:1]:
            reporter.table(f"{name}: {shown.title}", shown.columns, shown.rows)
    for line in left_out(table):
        reporter.message(line)


def left_out(table: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that the grid asks for and the table lacks."""
    lines = []
    trimmed = table["trimmed"]
    if trimmed:
        kept = ", ".join(map(str, trimmed["seeds_kept"]))
        gone = ", ".join(map(str, trimmed["seeds_left_out"])) or "none"
        lines.append(
            f"Trimmed to {trimmed['budget_minutes']:g} minutes, alike for every method and data "
            f"set: seeds kept {kept}, left out {gone}; {100 * trimmed['epoch_share']:.0f} % of the "
            "epochs."
        )
    lines += [
        f"Failed: {f['dataset']} / {f['method']} / seed {f['seed']}: {f['error']}"
        for f in table["failed"]
    ]
    return lines


def text_tables(entry: Mapping[str, Any]) -> list[TextTable]:
    """The tables of one data set: overall test first, then by group, differences, validation."""
    methods: Mapping[str, Any] = entry["methods"]
    if not methods:
        return []
    differences, best = entry["differences"], entry["best"]
    notes = {label: method["describe"] for label, method in methods.items()}
    overall = []
    for label, method in methods.items():
        cell = method["test"]["all"]
        test = differences.get(f"{best} - {label}", {}).get("all", {}).get("ndcg@10")
        overall.append(
            [
                label,
                str(len(method["seeds"])),
                *(_mean(cell, metric) for metric in ("hit@10", "ndcg@10", "mrr", "coverage@10")),
                interval_text(test),
                "-" if test is None else f"{test['p_holm']:.4f}",
            ]
        )
    lead = f"{best} minus this, NDCG@10"
    tables = [
        TextTable(
            "test, percent",
            ["method", "seeds", "Hit@10", "NDCG@10", "MRR", "coverage@10", lead, "p (Holm)"],
            overall, open=True, best=best, notes=notes,
        )
    ]  # fmt: skip
    for title, groups in (
        ("by training occurrences of the target", tuple(FREQUENCY_GROUPS)),
        ("by length of the history", tuple(HISTORY_GROUPS)),
    ):
        tables.append(_by_group(f"test Hit@10 / NDCG@10, percent, {title}", methods, groups))
        if differences:
            tables.append(
                _leads(f"test NDCG@10, {best} minus each other, {title}", differences, groups)
            )
    valid = [
        [label, *(_mean(m["valid"]["all"], name) for name in ("hit@10", "ndcg@10", "mrr"))]
        for label, m in methods.items()
    ]
    return [
        *tables,
        TextTable("validation, percent", ["method", "Hit@10", "NDCG@10", "MRR"], valid, best=best),
    ]


def _by_group(title: str, methods: Mapping[str, Any], groups: Sequence[str]) -> TextTable:
    first = next(iter(methods.values()))["test"]
    rows = [["users", *(f"{first[group]['count']:,}" for group in groups)]]
    for label, method in methods.items():
        cells = [method["test"][group] for group in groups]
        rows.append(
            [
                label,
                *(
                    f"{percent(c['hit@10'])} / {percent(c['ndcg@10'])}" if c["count"] else "-"
                    for c in cells
                ),
            ]
        )
    return TextTable(title, ["method", *map(group_title, groups)], rows)


def _leads(
    title: str, differences: Mapping[str, Mapping[str, Any]], groups: Sequence[str]
) -> TextTable:
    rows = []
    for pair, by_group in differences.items():
        tests = [by_group.get(group, {}).get("ndcg@10") for group in groups]
        marks = [" †" if test and test["p_holm"] < _REAL else "" for test in tests]
        texts = [interval_text(test) + mark for test, mark in zip(tests, marks, strict=True)]
        rows.append([pair, *texts])
    columns = ["difference († Holm p < 0.05)", *map(group_title, groups)]
    return TextTable(title, columns, rows)


def _mean(cell: Mapping[str, Any], metric: str) -> str:
    deviation = cell.get(f"{metric}_sd")
    tail = "" if deviation is None else f" ± {percent(deviation)}"
    return percent(cell.get(metric)) + tail


def markdown(table: Mapping[str, Any]) -> str:
    """The content of ``table.md``."""
    seeds = ", ".join(map(str, table["seeds"]))
    lines = [f"# {table['title']}", "", f"Preset `{table['preset']}`, seeds {seeds}."]
    if table["tuning"]:
        lines[-1] += f" Tuned: {_tuning(table['tuning'])}."
    for line in left_out(table):
        lines += ["", line]
    for name, entry in table["datasets"].items():
        lines += ["", f"## {name}", "", _note(entry)]
        for shown in text_tables(entry):
            lines += ["", f"{shown.title[0].upper()}{shown.title[1:]}:", ""]
            lines.append("| " + " | ".join(shown.columns) + " |")
            lines.append("|---|" + "---:|" * (len(shown.columns) - 1))
            lines += ["| " + " | ".join(row) + " |" for row in shown.rows]
    return "\n".join(lines) + "\n"


def _note(entry: Mapping[str, Any]) -> str:
    if entry["best"] is None:
        return f"Data `{entry['data']}`, text `{entry['text']}`. No cell finished."
    users = entry["methods"][entry["best"]]["test"]["all"]["count"]
    return (
        f"Data `{entry['data']}`, text `{entry['text']}`, {users:,} test users. "
        f"Best by validation NDCG@10: `{entry['best']}`."
    )


def _tuning(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _html(table: Mapping[str, Any], grid: Grid, results: Sequence[Result]) -> str:
    from markupsafe import Markup

    from padkern.pad.report import template

    def figure(svg: str | None) -> list[Markup]:
        return [] if svg is None else [Markup(svg)]

    parts = []
    for name, entry in table["datasets"].items():
        methods = entry["methods"]
        maps = []
        if methods:
            maps += figure(
                figures.group_map(methods, tuple(FREQUENCY_GROUPS), "training occurrences")
            )
            maps += figure(figures.group_map(methods, tuple(HISTORY_GROUPS), "history length"))
        bars = figure(figures.method_bars(methods, entry["best"] or ""))
        parts.append(
            {
                "name": name,
                "note": _note(entry).replace("`", ""),
                "bars": bars[0] if bars else None,
                "tables": [
                    {
                        "title": shown.title, "columns": shown.columns, "rows": shown.rows,
                        "open": shown.open, "best": shown.best, "notes": shown.notes or {},
                    }
                    for shown in text_tables(entry)
                ],
                "maps": maps,
            }
        )  # fmt: skip
    seeds = ", ".join(map(str, table["seeds"]))
    lead = f"Preset {table['preset']}; seeds {seeds}; {table['cells']['finished']} cells."
    if table["tuning"]:
        lead += f" Tuned: {_tuning(table['tuning'])}."
    return template("comparison.html").render(
        title=table["title"],
        lead=lead,
        warnings=left_out(table),
        parts=parts,
        seconds=_seconds(grid, results),
        command=shlex.join(["padkern", *sys.argv[1:]]),
        source=grid.text,
    )


def _seconds(grid: Grid, results: Sequence[Result]) -> dict[str, Any] | None:
    """Mean seconds of a cell, methods by data sets."""
    spent: dict[tuple[str, str], list[float]] = {}
    for result in results:
        spent.setdefault((result.cell.label, result.cell.dataset), []).append(result.seconds)
    if not spent:
        return None
    rows = []
    for label in grid.methods:
        times = [spent.get((label, name)) for name in grid.datasets]
        rows.append([label, *("-" if t is None else f"{sum(t) / len(t):,.1f}" for t in times)])
    return {"columns": ["method", *grid.datasets], "rows": rows, "best": "", "notes": {}}
