"""Answers of a stored run on the terminal: metrics, recommendations, the comparison table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from padkern.errors import UsageError
from padkern.pad.folder import RunFolder
from padkern.pad.progress import Reporter, make_reporter
from padkern.pad.summary import HEADLINES, comparison_table, interval_table, percent

if TYPE_CHECKING:
    from padkern.data.dataset import Dataset

__all__ = ["show_evaluation", "show_recommendations", "show_tables"]


def show_evaluation(path: Path, split: str, row: str, as_json: bool) -> None:
    """Prints the metrics of one stored row on one split."""
    from padkern.pad.stored import load_run

    if split not in ("test", "valid"):
        raise UsageError(f"--split must be test or valid, got {split!r}")
    loaded = load_run(RunFolder(path, create=False))
    result = loaded.evaluate(split, row)
    metrics = result.metrics()
    if as_json:
        print(json.dumps({"row": row, "split": split, "metrics": metrics, **result.counters}))
        return
    names = [name for name in metrics["all"] if name != "count"]
    rows = [
        [group, f"{values['count']:,}", *(percent(values.get(name)) for name in names)]
        for group, values in metrics.items()
    ]
    out = make_reporter()
    out.table(f"{row} on {split}, percent", ["targets", "users", *names], rows)
    out.message(", ".join(f"{name} {count:,}" for name, count in result.counters.items()))


def show_recommendations(
    path: Path, user: str | None, history: str | None, k: int, as_json: bool
) -> None:
    """Prints the best items for a user of the run or a history of item ids."""
    from padkern.pad.stored import load_run

    loaded = load_run(RunFolder(path, create=False))
    dataset = loaded.dataset
    if user is not None:
        if user not in dataset.users:
            raise UsageError(f"--user {user!r} is not a user of {path}")
        taken = dataset.sequences.row(dataset.users.index(user)).tolist()
    else:
        taken = _item_ids(dataset, history or "")
    found = loaded.recommend(taken, k)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    out = make_reporter()
    title = f"user {user}" if user is not None else "history"
    out.message(
        f"{title}: {len(taken)} items, the last: "
        + "; ".join(_short(dataset.texts[item] or dataset.items[item], 40) for item in taken[-3:])
    )
    experts = list(found[0]["shares"]) if found else []
    rows = [
        [
            _short(entry["text"] or entry["item"], 60),
            str(place),
            entry["item"],
            f"{entry['frequency']:,}",
            f"{entry['score']:.3f}",
            *(f"{100 * entry['shares'][expert]:.0f} %" for expert in experts),
        ]
        for place, entry in enumerate(found, start=1)
    ]
    out.table("recommendations", ["title", "rank", "item", "trained", "score", *experts], rows)


def show_tables(folder: RunFolder, reporter: Reporter) -> None:
    """The comparison table of a finished run and the intervals of PAD's differences."""
    columns, rows = comparison_table(folder.read_json("metrics.json"))
    reporter.table(
        "test: Hit@10 / NDCG@10 in percent, by training occurrences of the target", columns, rows
    )
    if folder.exists("comparison.json"):
        columns, rows = interval_table(folder.read_json("comparison.json"), names=HEADLINES)
        reporter.table("test: differences in percentage points, 95 % intervals", columns, rows)


def _item_ids(dataset: Dataset, history: str) -> list[int]:
    """Internal ids of comma-separated item ids."""
    known = dataset.item_ids()
    names = [name.strip() for name in history.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--history: {unknown[0]!r} is not an item of the run")
    if not names:
        raise UsageError("--history needs at least one item id")
    return [known[name] for name in names]


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
