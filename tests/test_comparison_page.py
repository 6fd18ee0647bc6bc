"""The condensed tables of docs/comparison.md hold what the stored figures say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATASETS = {
    "Prime Pantry": "prime_pantry",
    "Scientific": "amazon_scientific",
    "Beauty 2014": "amazon_beauty2014",
    "Video Games": "amazon_video_games2018",
    "Complete Journey": "completejourney",
    "MovieLens small": "ml_latest_small",
}
GROUPS = ("freq_0", "freq_1_5", "freq_6_50", "freq_gt_50")


def stored(*names: str) -> dict:
    found: dict = {}
    for name in names:
        found |= json.loads((DOCS / "results" / f"{name}.json").read_text())["datasets"]
    return found


def rows_under(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, its own heading row first."""
    text = (DOCS / "comparison.md").read_text().split(f"\n## {heading}\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[start:end]]
    return [cells[0], *cells[2:]]


def near(cell: str, value: float | None) -> None:
    shown = float(re.sub(r"\*", "", cell).split(" ")[0])
    assert shown == pytest.approx(100 * (value or 0), abs=0.0051), (cell, value)


def test_every_method_on_every_data_set():
    found = stored("default", "more")
    head, *rows = rows_under("NDCG@10, test, percent")
    checked = 0
    for name, *cells in rows:
        for title, cell in zip(head[1:], cells, strict=True):
            methods = found[DATASETS[title]]["methods"]
            assert bool(cell) == (name in methods), (title, name)
            if cell:
                near(cell, methods[name]["test"]["all"]["ndcg@10"])
                best = max(m["test"]["all"]["ndcg@10"] for m in methods.values())
                assert ("**" in cell) == (methods[name]["test"]["all"]["ndcg@10"] == best)
                checked += 1
    assert checked == sum(len(entry["methods"]) for entry in found.values())


def test_groups_and_places():
    found = stored("default", "more")
    _, *rows = rows_under("Where PAD wins and where it does not")
    assert len(rows) == len(found)
    for title, *cells in rows:
        methods = found[DATASETS[title]]["methods"]
        for group, cell in zip(GROUPS, cells, strict=True):
            values = {name: m["test"][group]["ndcg@10"] or 0 for name, m in methods.items()}
            shown, place, count, other, best = re.fullmatch(
                r"([\d.]+), place (\d+) of (\d+); (\w+) ([\d.]+)", cell
            ).groups()
            near(shown, values["pad"])
            near(best, values[other])
            assert values[other] == max(v for name, v in values.items() if name != "pad")
            assert int(place) == 1 + sum(v > values["pad"] for v in values.values())
            assert int(count) == len(values)


def test_parts():
    methods = stored("ablation")["amazon_scientific"]["methods"]
    _, *rows = rows_under("What each part contributes")
    assert [row[0] for row in rows] == list(methods)
    for name, *cells in rows:
        for group, cell in zip(("all", *GROUPS), cells, strict=False):
            near(cell, methods[name]["test"][group]["ndcg@10"])
        near(cells[-1], methods[name]["valid"]["all"]["ndcg@10"])


def test_backbones():
    found = stored("backbones")
    head, *rows = rows_under("Backbones")
    for name, *cells in rows:
        for title, cell in zip(head[1:], cells, strict=True):
            methods = found[DATASETS[title]]["methods"]
            assert bool(cell) == (name in methods)
            if cell:
                near(cell, methods[name]["test"]["all"]["ndcg@10"])
