"""Fills the condensed tables of docs/comparison.md from the stored figures of the grids.

    python python/condense.py

A table stands between ``<!-- condensed NAME:begin -->`` and ``<!-- condensed NAME:end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
TITLES = {
    "prime_pantry": "Prime Pantry",
    "amazon_scientific": "Scientific",
    "amazon_beauty2014": "Beauty 2014",
    "amazon_video_games2018": "Video Games",
    "completejourney": "Complete Journey",
    "ml_latest_small": "MovieLens small",
}
GROUPS = ("freq_0", "freq_1_5", "freq_6_50", "freq_gt_50")
GROUP_TITLES = ("never seen", "1-5", "6-50", "> 50")

Methods = dict[str, Any]


def load(*names: str) -> dict[str, Methods]:
    """Data set -> label -> figures of grids, in the order of :data:`TITLES`."""
    found: dict[str, Methods] = {}
    for name in names:
        content = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for key, entry in content["datasets"].items():
            if key not in TITLES or key in found:
                raise SystemExit(f"{name}: data set {key} is unknown or there twice")
            found[key] = entry["methods"]
    return {key: found[key] for key in TITLES if key in found}


def ndcg(figures: dict[str, Any], group: str = "all", part: str = "test") -> float:
    """NDCG@10 in percent; a group without targets counts as 0."""
    return 100 * (figures[part][group]["ndcg@10"] or 0.0)


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns are aligned to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def with_spread(figures: dict[str, Any]) -> str:
    """Mean, with the deviation where there are several seeds."""
    text = f"{ndcg(figures):.2f}"
    if len(figures["seeds"]) > 1:
        text += f" ± {100 * (figures['test']['all']['ndcg@10_sd'] or 0.0):.2f}"
    return text


def labels(found: dict[str, Methods]) -> list[str]:
    """Every label once; the data set with most of them gives the order."""
    ordered: dict[str, None] = {}
    for methods in sorted(found.values(), key=len, reverse=True):
        ordered |= dict.fromkeys(methods)
    return list(ordered)


def every_method() -> str:
    """Methods x data sets, the best of each set in bold."""
    found = load("default", "more", "games")
    best = {name: max(ndcg(m) for m in methods.values()) for name, methods in found.items()}
    rows = []
    for label in labels(found):
        row = [label]
        for name, methods in found.items():
            figures = methods.get(label)
            text = "" if figures is None else with_spread(figures)
            bold = figures is not None and ndcg(figures) == best[name]
            row.append(f"**{text}**" if bold else text)
        rows.append(row)
    return table(["method", *(TITLES[name] for name in found)], rows)


def groups() -> str:
    """PAD by frequency group: figure, place, and the best of the others."""
    rows = []
    for name, methods in load("default", "more", "games").items():
        row = [TITLES[name]]
        for group in GROUPS:
            values = {label: ndcg(figures, group) for label, figures in methods.items()}
            own = values.pop("pad")
            other = max(sorted(values), key=lambda label, values=values: values[label])
            place = 1 + sum(value > own for value in values.values())
            row.append(f"{own:.2f}, place {place} of {len(methods)}; {other} {values[other]:.2f}")
        rows.append(row)
    return table(["data set", *GROUP_TITLES], rows, left=5)


def parts(grid: str) -> str:
    """An ablation: rows of one data set by frequency group, and validation."""
    (methods,) = load(grid).values()
    rows = []
    for label, figures in methods.items():
        by_group = [f"{ndcg(figures, group):.2f}" for group in GROUPS]
        valid = f"{ndcg(figures, part='valid'):.2f}"
        rows.append([label, with_spread(figures), *by_group, valid])
    return table(["", "all", *GROUP_TITLES, "valid, all"], rows)


def by_data_set(*grids: str, order: Any = None, valid: bool = False) -> str:
    """Labels x data sets, test, and validation beside it if asked for."""
    found = load(*grids)
    head, rows = [""], []
    for name in found:
        head += [TITLES[name], "valid"] if valid else [TITLES[name]]
    for label in sorted(labels(found), key=order) if order else labels(found):
        row = [label]
        for methods in found.values():
            figures = methods.get(label)
            row.append("" if figures is None else with_spread(figures))
            if valid:
                row.append("" if figures is None else f"{ndcg(figures, part='valid'):.2f}")
        rows.append(row)
    return table(head, rows)


TABLES = {
    "methods": every_method,
    "groups": groups,
    "parts-scientific": lambda: parts("ablation"),
    "parts-pantry": lambda: parts("ablation_pantry"),
    "text-maps": lambda: by_data_set("text_maps", "text_maps_pantry", valid=True),
    "unisrec": lambda: by_data_set("unisrec_longer", valid=True),
    "backbones": lambda: by_data_set("backbones", order=lambda x: (not x.startswith("pre"), x)),
}


def fill(document: str) -> str:
    """The document with every condensed table as the stored figures have it.

    Raises:
        SystemExit: a table without its place.
    """
    for name, make in TABLES.items():
        begin, end = f"<!-- condensed {name}:begin -->", f"<!-- condensed {name}:end -->"
        block = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(block.findall(document)) != 1:
            raise SystemExit(f"{begin} ... {end} must stand once in the document")
        text = f"{begin}\n{make()}\n{end}"
        document = block.sub(lambda _, text=text: text, document)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--document", type=Path, default=DOCS / "comparison.md")
    path = parser.parse_args().document
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
