"""``make bench-report``: benchmark JSON to a table and a figure.

For every folder given, reads its ``*.json`` (written by ``make bench BENCH_DEVICE=...``) and writes
``report.md`` and ``report.png`` (``report_gpu.png`` for a GPU suite) beside them, and for
``bench_scaling.py`` ``scaling.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from report_data import Case, Entry, Suite, best, load, peer_warnings
from report_growth import HEADER, growths, plot_growth
from report_growth import rows as growth_rows
from report_plot import plot

Row = list[str]


def _number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(value) >= 1000 else text


def _table(header: Row, rows: list[Row]) -> list[str]:
    """Markdown lines; columns that hold nothing are left out."""
    if not rows:
        return ["None.", ""]
    used = [i for i in range(len(header)) if i == 0 or any(row[i] != "–" for row in rows)]
    header, rows = [header[i] for i in used], [[row[i] for i in used] for row in rows]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)] + [""]


def _ratio(peer: Entry | None, ours: Entry) -> str:
    return f"{_number(peer.median_ms / ours.median_ms)}×" if peer else "–"


def _percent(part: float | None, whole: float) -> str:
    return "–" if part is None else f"{100 * part / whole:.0f} %"


def _summary_row(suite: Suite, case: Case, ours: Entry, entries: dict[str, Entry]) -> Row:
    peer, hand, tllib = best(entries, "peer"), best(entries, "hand"), entries.get("broadcast")
    info = ours.info
    rate = suite.rate(case)
    limit = info.get("roofline_ms") or suite.floor_ms(case, info["gflop"])
    extra, inputs = info.get("peak_extra_mib"), info.get("inputs_mib")
    return [
        case.label(suite.usual_threads),
        ours.name,
        _number(ours.median_ms),
        f"{peer.name} {_number(peer.median_ms)}" if peer else "–",
        _ratio(peer, ours),
        f"{hand.name} {_number(hand.median_ms)}" if hand else "–",
        _ratio(hand, ours),
        _ratio(tllib, ours),
        _number(ours.gflops),
        "–" if rate is None else f"{100 * ours.gflops / rate:.0f} %",
        _percent(limit, ours.median_ms),
        _number(extra),
        f"{_number(extra / inputs, 2)}×" if extra is not None and inputs else "–",
    ]


_SUMMARY = [
    "n = m × D",
    "padkern",
    "ms",
    "best published peer, ms",
    "ratio",
    "best torch by hand, ms",
    "ratio",
    "TLlib / padkern",
    "GFLOP/s",
    "of sgemm",
    "of limit",
    "extra MiB",
    "/ inputs",
]


def _summary(suite: Suite, mode: str) -> list[str]:
    rows = []
    for case in suite.cases:
        entries = suite.of(case)
        for ours in entries.values():
            if case.mode == mode and ours.kind == "padkern":
                rows.append(_summary_row(suite, case, ours, entries))
    return _table(_SUMMARY, rows)


def _grid(suite: Suite, what: str) -> list[str]:
    """Every implementation against every case: medians, or memory."""
    order = {"padkern": 0, "peer": 1, "hand": 2}
    names = list(dict.fromkeys(e.name for e in sorted(suite.entries, key=lambda e: order[e.kind])))
    rows = []
    for case in suite.cases:
        entries = suite.of(case)
        peer = best(entries, "peer")
        cells = []
        for name in names:
            value = None
            if name in entries and what == "ms":
                value = entries[name].median_ms
            elif name in entries:
                value = entries[name].info.get(what)
            text = _number(value)
            cells.append(f"**{text}**" if what == "ms" and peer and name == peer.name else text)
        mode = "fwd+bwd" if case.mode == "fwd_bwd" else "fwd"
        rows.append([f"{case.label(suite.usual_threads)}, {mode}", *cells])
    return _table(["n = m × D", *names], rows)


def losses(suite: Suite) -> list[str]:
    """Sentences on the cases where a peer is faster than padkern's best."""
    found = []
    for case in suite.cases:
        entries = suite.of(case)
        ours = best(entries, "padkern")
        for peer in entries.values():
            if ours and peer.kind != "padkern" and peer.median_ms < ours.median_ms:
                found.append(
                    f"{case.label(suite.usual_threads)}, {case.mode}: {peer.name} takes "
                    f"{_number(peer.median_ms)} ms, {ours.name} {_number(ours.median_ms)} ms "
                    f"({_number(ours.median_ms / peer.median_ms)}× slower)"
                )
    return found


def _limits(suite: Suite) -> list[str]:
    rows = []
    for count, rates in sorted(suite.limits.items(), key=lambda item: int(item[0])):
        for name, text in (
            ("sgemm_gflops", "product 4096 × D × 4096"),
            ("coefficient_gflops", "product 4096 × 4096 × D"),
        ):
            for dim, rate in sorted(rates.get(name, {}).items(), key=lambda item: int(item[0])):
                rows.append([f"{text}, D = {dim}", count, f"{_number(rate)} GFLOP/s"])
        if "exp_gelems" in rates:
            rows.append(["exponential in cache", count, f"{_number(rates['exp_gelems'])} Gelem/s"])
    return _table(["what", "threads", "rate"], rows)


def _skipped(suite: Suite) -> list[str]:
    lines = []
    for one in suite.skipped:
        if one.get("op") == "mkmmd":
            size = f"n = {one['n']}, D = {one['D']}, {one['mode']}"
            lines.append(f"- {one['implementation']} at {size}, {one['dtype']}: {one['reason']}")
        else:
            lines.append(f"- {one['name']}: {one['reason']}")
    return [*dict.fromkeys(lines), ""] if lines else ["Nothing.", ""]


def _graphs(suite: Suite) -> list[str]:
    rows = [
        [f"{e.case.label()} {e.case.mode}", e.name, _number(e.median_ms), _number(graph)]
        for e in suite.entries
        if isinstance(graph := e.info.get("graph_median_ms"), (int, float))
    ]
    if not rows:
        return []
    title = ["## Under a CUDA graph", ""]
    return title + _table(["n = m × D", "implementation", "ms", "ms in a graph"], rows)


def _mkmmd_section(suite: Suite, picture: Path | None) -> list[str]:
    machine = suite.machine
    loads = [float(e.info["load_average"]) for e in suite.entries if "load_average" in e.info]
    where = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('cores')} cores"
    lines = [
        f"`{suite.path.name}`: {where}, {suite.usual_threads} threads, torch "
        f"{machine.get('torch')}, padkern {machine.get('padkern_isa')}, commit "
        f"`{suite.commit[:12]}`, {suite.date[:10]}; load average {min(loads, default=0):.1f} to "
        f"{max(loads, default=0):.1f}.",
        "",
    ]
    for warning in peer_warnings(suite):
        lines += [f"> **Warning:** {warning}.", ""]
    if picture:
        lines += [f"![Times, ratios, share of the limit and memory]({picture.name})", ""]
    lines += [
        "Medians, float32 unless named. *Best published peer*: the fastest of what people use. "
        "*Best torch by hand*: padkern's own plan written in torch strips. *Of sgemm*: useful "
        "GFLOP/s over the better of the two float32 product rates at that width. *Of limit*: the "
        "products at that rate plus one exponential per pair, over the time (on a GPU: the "
        "roofline). On a CPU these are torch's own rates: above 100 % padkern's products are the "
        "faster ones. *Memory kept*: malloc told to keep freed memory, for all alike.",
        "",
        "## Forward + backward",
        "",
        *_summary(suite, "fwd_bwd"),
        "## Forward",
        "",
        *_summary(suite, "fwd"),
        "## Where padkern is slower",
        "",
    ]
    lines += [f"- {sentence}" for sentence in losses(suite)] or ["Nowhere in this run."]
    lines += ["", "## Every implementation", "", "Median ms; bold: best published peer.", ""]
    lines += _grid(suite, "ms")
    lines += ["Peak extra memory of torch's allocator, MiB:", "", *_grid(suite, "peak_extra_mib")]
    lines += _graphs(suite)
    lines += ["## Left out", "", *_skipped(suite), "## The machine's own rates", ""]
    return lines + _limits(suite)


# What the ratios of a group are relative to, and columns that some suites record.
_OURS = ("padkern", "native")
_EXTRA = {
    "users_timed": "users timed",
    "users_per_s": "users/s",
    "tokens_per_s": "tokens/s",
    "resident_mib": "growth MiB",
    "total_mib": "in total MiB",
}


def _label(info: dict[str, Any], raw: dict[str, Any]) -> str:
    return str(info.get("implementation") or info.get("contender") or raw.get("param") or "")


def _whole_s(raw: dict[str, Any]) -> float:
    """Seconds of the whole task; of one timed on some users, scaled to all of them."""
    info = raw["extra_info"]
    return float(info.get("whole_s") or raw["stats"]["median"] * info.get("factor", 1.0))


def _other_section(
    name: str, others: list[dict[str, Any]], skipped: list[str], picture: Path | None
) -> list[str]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for raw in others:
        if "growth" not in raw["extra_info"]:  # these have a table of their own
            groups[raw.get("group") or raw["name"]].append(raw)
    rows = []
    for group, members in groups.items():
        members.sort(key=_whole_s)
        mine = [raw for raw in members if _label(raw["extra_info"], raw).split("-")[-1] in _OURS]
        for raw in members:
            info = raw["extra_info"]
            whole = _whole_s(raw) if "whole_s" in info or "factor" in info else None
            ratio = _whole_s(raw) / _whole_s(mine[0]) if mine and raw is not mine[0] else None
            rows.append(
                [
                    *(group, _label(info, raw), _number(raw["stats"]["median"] * 1e3)),
                    *(_number(whole), "–" if ratio is None else f"{_number(ratio)}×"),
                    *(_number(info.get(name)) for name in _EXTRA),
                ]
            )
    grown = growths(others)
    header = ["benchmark", "implementation", "median ms", "whole, s", "/ padkern"]
    lines = [f"## `{name}`", ""]
    if any(raw["extra_info"].get("small") for raw in others):
        lines += ["> **Warning:** tiny sizes (`PADKERN_BENCH_SMALL=1`), no figures.", ""]
    if rows or not grown:
        lines += _table([*header, *_EXTRA.values()], rows)
    if grown:
        if picture:
            lines += [f"![Seconds over size on logarithmic axes]({picture.name})", ""]
        lines += _table(HEADER, growth_rows(grown))
    return lines + (["Left out:", "", *skipped] if skipped else [])


def write_report(folder: Path) -> Path | None:
    """Writes report.md and the figure into a device's folder; None where it holds no JSON.

    Args:
        folder: ``benchmarks/results/<device>``.
    """
    lines = [f"# Benchmarks: {folder.name}", "", "Written by `make bench-report`.", ""]
    found = False
    for path in sorted(folder.glob("*.json")):
        suite, others = load(path)
        found = found or bool(suite.entries or others)
        if suite.entries:
            picture = None
            if any(case.mode == "fwd_bwd" for case in suite.cases):
                picture = folder / ("report_gpu.png" if "gpu" in suite.machine else "report.png")
                plot(suite, picture)
            lines += _mkmmd_section(suite, picture)
        if others:
            picture = None
            grown = growths(others)
            if grown:
                picture = folder / "scaling.png"
                machine = suite.machine
                where = f"{machine.get('cpu')}, {machine.get('threads')} threads"
                plot_growth(grown, picture, f"{where}, torch {machine.get('torch')}")
            # The MK-MMD section has its own list.
            skipped = _skipped(suite) if suite.skipped and not suite.entries else []
            lines += _other_section(path.name, others, skipped, picture)
    if not found:
        return None
    out = folder / "report.md"
    out.write_text("\n".join(lines).rstrip() + "\n")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where no folder held figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="benchmarks/results/<device>")
    written = 0
    for folder in parser.parse_args(arguments).folders:
        out = write_report(folder)
        print(f"wrote {out}" if out else f"{folder}: no benchmark JSON")
        if out:
            written += 1
            for path in sorted(folder.glob("*.json")):
                for warning in peer_warnings(load(path)[0]):
                    print(f"warning: {path.name}: {warning}", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
