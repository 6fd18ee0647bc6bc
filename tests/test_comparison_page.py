"""The condensed tables of docs/comparison.md hold what the stored figures say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
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


def rows_under(heading: str, number: int = 0) -> list[list[str]]:
    """Cells of a table under a heading, its own heading row first."""
    text = (DOCS / "comparison.md").read_text().split(f"\n## {heading}\n")[1]
    found = re.findall(r"(?:^\|.*\n)+", text.split("\n## ")[0], flags=re.MULTILINE)
    lines = found[number].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def near(cell: str, value: float | None) -> None:
    shown = float(re.sub(r"\*", "", cell).split(" ")[0])
    assert shown == pytest.approx(100 * (value or 0), abs=0.0051), (cell, value)


def test_every_method_on_every_data_set():
    found = stored("default", "more", "games")
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
    found = stored("default", "more", "games")
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


@pytest.mark.parametrize(
    ("grid", "dataset", "number"),
    [("ablation", "amazon_scientific", 0), ("ablation_pantry", "prime_pantry", 1)],
)
def test_parts(grid, dataset, number):
    methods = stored(grid)[dataset]["methods"]
    _, *rows = rows_under("What each part contributes", number)
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


def test_leads_over_the_next_best():
    found = stored("default", "more", "games")
    _, *rows = rows_under("NDCG@10, test, percent", 1)
    assert len(rows) == len(found)
    for name, lead, interval, p in rows:
        title, _, other = name.partition(", ")
        entry = found[DATASETS[title]]
        values = {n: m["test"]["all"]["ndcg@10"] for n, m in entry["methods"].items()}
        assert other == max((n for n in values if n != "pad"), key=values.get)
        assert float(lead) == pytest.approx(100 * (values["pad"] - values[other]), abs=0.0051)
        stored_difference = entry["differences"].get(f"pad - {other}")
        sign = 1
        if stored_difference is None:
            stored_difference, sign = entry["differences"].get(f"{other} - pad"), -1
        if stored_difference is None:  # neither of the two is the best on validation
            assert p == "-"
            continue
        figures = stored_difference["all"]["ndcg@10"]
        low, high = sorted(100 * sign * figures[key] for key in ("low", "high"))
        shown = [float(x) for x in interval.strip("[]").split(", ")]
        assert shown == pytest.approx([low, high], abs=0.0051)
        assert float(p) == pytest.approx(figures["p_holm"], abs=5.1e-5)


def test_the_tables_are_those_that_condense_makes():
    spec = importlib.util.spec_from_file_location("condense", ROOT / "python" / "condense.py")
    condense = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(condense)
    page = (DOCS / "comparison.md").read_text()
    assert condense.fill(page) == page
    assert not re.search(r"^[A-Z]{5,}$", page, flags=re.MULTILINE)  # a text still to be written
    for name in condense.TABLES:
        begin = f"<!-- condensed {name}:begin -->\n"
        head = page.split(begin)[1].splitlines()[0]
        damaged = page.replace(begin + head, begin + "| nothing |")
        assert damaged != page
        assert condense.fill(damaged) == page
    with pytest.raises(SystemExit, match="must stand once"):
        condense.fill(page.replace("<!-- condensed groups:end -->", ""))
