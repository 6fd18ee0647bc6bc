"""The report of a run: one HTML file without references to anything outside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from padkern.pad import plots
from padkern.pad.folder import RunFolder
from padkern.pad.summary import (
    HEADLINES,
    comparison_table,
    interval_table,
    interval_text,
    percent,
)

__all__ = ["render_report", "template", "write_report"]

_NAME = "report.html"
_ROW_NOTES = {
    "most_pop": "most popular items in training",
    "text_knn": "nearest items by text, no training",
    "pretrain": "phase 1: item ids alone",
    "text": "text expert trained alone",
    "id_plus_text": "one encoder on id + text",
    "aligned": "phase 2: ids aligned with text",
    "pad": "three experts behind a frequency gate",
}


def write_report(folder: RunFolder) -> Path:
    """Writes ``report.html`` into a run folder and returns its path.

    A folder open for reading is opened for writing for that moment.

    Raises:
        CheckpointError: ``metrics.json`` is missing or broken, or a process writes to the run.
    """
    html = render_report(folder)
    if folder.writable:
        return folder.write_text(_NAME, html)
    with RunFolder(folder.path) as writer:
        return writer.write_text(_NAME, html)


def template(name: str) -> Any:
    """A template of this package, ready to render."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render_report(folder: RunFolder) -> str:
    """The HTML text. Files other than ``metrics.json`` may be missing; their sections then are."""
    from markupsafe import Markup

    metrics = folder.read_json("metrics.json")
    comparison = _optional(folder, "comparison.json")
    audit = _optional(folder, "audit.json")
    gate = _without_padding(_optional(folder, "gate.json"))
    run = _optional(folder, "run.json")
    models = metrics.get("models", {})

    def figure(svg: str | None) -> Markup | None:
        return None if svg is None else Markup(svg)

    return template(_NAME).render(
        title=f"PAD on {metrics.get('dataset', 'a data set')}",
        dataset=metrics.get("dataset", ""),
        seed=metrics.get("seed"),
        shuffled=bool(run.get("request", {}).get("shuffle_text")),
        cards=_cards(models, comparison),
        verdicts=_verdicts(comparison),
        facts=_facts(audit),
        table=_table(metrics, "test"),
        valid=_table(metrics, "valid"),
        intervals=interval_table(comparison),
        bars=figure(plots.frequency_bars(models)),
        interval_figure=figure(plots.interval_plot(comparison)),
        curves=figure(plots.training_curves(folder.read_jsonl("metrics.jsonl"))),
        gate_figure=figure(plots.gate_weights(gate)),
        gate=_gate(gate),
        seconds=_seconds(metrics.get("seconds", {})),
        command=run.get("command", ""),
        started=run.get("started", ""),
        environment=run.get("environment", {}),
        config=folder.read_text("config.yaml") if folder.exists("config.yaml") else "",
    )


def _optional(folder: RunFolder, name: str) -> dict[str, Any]:
    return folder.read_json(name) if folder.exists(name) else {}


def _cards(models: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline numbers of the test split."""
    pad = models.get("pad", {}).get("test", {})
    cards = []
    for metric in ("ndcg@10", "hit@10"):
        if (value := pad.get("all", {}).get(metric)) is not None:
            cards.append(
                {
                    "name": f"PAD {metric.replace('ndcg', 'NDCG').replace('hit', 'Hit')}, test",
                    "value": f"{percent(value)} %",
                    "note": f"{pad['all'].get('count', 0):,} users, all items ranked",
                }
            )
    if (value := pad.get("freq_0", {}).get("hit@10")) is not None:
        rival = models.get("pretrain", {}).get("test", {}).get("freq_0", {}).get("hit@10")
        cards.append(
            {
                "name": "PAD Hit@10 on cold items",
                "value": f"{percent(value)} %",
                "note": f"{pad['freq_0'].get('count', 0):,} users; pretrain {percent(rival)} %",
            }
        )
    for name, groups in comparison.get("test", {}).items():
        entry = groups.get("all", {}).get("ndcg@10", {})
        if name in HEADLINES and entry.get("difference") is not None:
            cards.append(
                {
                    "name": f"NDCG@10, {name}",
                    "value": f"{100 * entry['difference']:+.2f}",
                    "note": f"points, 95 % interval [{percent(entry['low'])}, "
                    f"{percent(entry['high'])}]",
                }
            )
    return cards


def _verdicts(comparison: Mapping[str, Any]) -> list[str]:
    """One plain sentence per difference to PAD."""
    sentences = []
    for name, groups in comparison.get("test", {}).items():
        entry = groups.get("all", {}).get("ndcg@10", {})
        if not name.startswith("pad - ") or entry.get("low") is None:
            continue
        rival = name.removeprefix("pad - ")
        if entry["low"] > 0:
            said = f"PAD is better than {rival}"
        elif entry["high"] < 0:
            said = f"PAD is worse than {rival}"
        else:
            said = f"PAD cannot be told apart from {rival}"
        sentences.append(f"{said} on test NDCG@10: {interval_text(entry)} percentage points.")
    return sentences


def _table(metrics: Mapping[str, Any], split: str) -> dict[str, Any]:
    columns, rows = comparison_table(metrics, split)
    best = _best(metrics.get("models", {}), split)
    return {"columns": columns, "rows": rows, "best": best, "notes": _ROW_NOTES}


def _seconds(seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    """Training time per row, evaluation of all rows together, and the sum."""
    rows = {name: value for name, value in seconds.items() if not name.endswith("/evaluation")}
    rest = sum(value for name, value in seconds.items() if name not in rows)
    entries = [*rows.items(), *([("evaluation", rest)] if rest else [])]
    total = sum(seconds.values())
    return [(name, f"{value:,.1f}") for name, value in [*entries, ("together", total)]]


def _best(models: Mapping[str, Any], split: str) -> str:
    """The row of highest NDCG@10."""
    values = {
        row: entry[split].get("all", {}).get("ndcg@10") or 0.0
        for row, entry in models.items()
        if split in entry
    }
    return max(values, key=values.__getitem__) if values else ""


def _facts(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The audit's facts that decide what the results can mean."""
    if not audit:
        return []
    split, length = audit.get("split", {}), audit.get("length", {})
    frequency, repeats = audit.get("train_frequency", {}), audit.get("repeats", {})
    rows = [
        ("users", _count(audit.get("users"))),
        ("items", _count(audit.get("items"))),
        ("interactions", _count(audit.get("interactions"))),
        ("density", f"{percent(audit.get('density'), 3)} %"),
        (
            "sequence length",
            f"median {_count(length.get('median'))}, mean {_decimal(length.get('mean'))}, "
            f"max {_count(length.get('max'))}",
        ),
        (
            "items by training occurrences (0, 1-5, 6-50, >50)",
            " / ".join(_count(count) for count in frequency.get("groups", {}).values()),
        ),
        (
            "repeats",
            f"{_count(repeats.get('interactions'))} of {_count(repeats.get('transitions'))} "
            "transitions go to an item seen before",
        ),
        ("items without text", _count(audit.get("texts", {}).get("empty"))),
        ("split", str(split.get("kind", "-")).replace("_", "-")),
    ]
    for name in ("valid", "test"):
        part = split.get(name, {})
        rows.append(
            (
                f"{name} users",
                f"{_count(part.get('users'))}; cold targets {_count(part.get('cold_targets'))}; "
                f"ceiling {percent(part.get('ceiling'))} %",
            )
        )
    rows.append(("padding share", f"{percent(audit.get('padding', {}).get('share'), 1)} %"))
    rows.append(("SHA-256 of the processed table", str(audit.get("sha256", "-"))))
    return rows


def _without_padding(gate: dict[str, Any]) -> dict[str, Any]:
    """Labels may start with the padding bin, which has no weights."""
    labels, weights = gate.get("labels") or [], gate.get("weights") or []
    return {**gate, "labels": labels[1:] if len(labels) == len(weights) + 1 else labels}


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    """The gate as a table."""
    experts: Sequence[str] = gate.get("experts") or []
    labels, weights = gate.get("labels") or [], gate.get("weights") or []
    items = gate.get("items_per_bin") or [None] * len(labels)
    rows = [
        [str(label), _count(count), *(_decimal(weight) for weight in row)]
        for label, count, row in zip(labels, items, weights, strict=False)
    ]
    return {
        "method": gate.get("method", ""),
        "columns": ["bin", "items", *experts],
        "rows": rows if experts else [],
    }


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.10g}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
