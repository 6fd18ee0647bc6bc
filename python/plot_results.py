"""Bars of Hit@10 by training frequency of the target, from the JSON of seed_table.py.

python python/plot_results.py docs/results/pantry.json docs/images/results.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GROUPS = {
    "all": "all targets",
    "freq_0": "never seen",
    "freq_1_5": "1-5 times",
    "freq_6_50": "6-50 times",
    "freq_gt_50": "> 50 times",
}
COLOURS = {
    "text_knn": "#b8bec8",
    "pretrain": "#5b8db8",
    "id_plus_text": "#e0a33a",
    "aligned": "#8fc1a6",
    "pad": "#0f6b50",
}
LABELS = {
    "text_knn": "text neighbours (untrained)",
    "pretrain": "SASRec on IDs",
    "id_plus_text": "SASRec on IDs + text",
    "aligned": "aligned expert alone",
    "pad": "PAD",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    result = json.loads(options.json.read_text())
    rows = result["rows"]["test"]
    figure, axis = plt.subplots(figsize=(9.5, 3.9), dpi=160)
    width = 0.8 / len(COLOURS)
    for place, (row, colour) in enumerate(COLOURS.items()):
        x = [i + (place - (len(COLOURS) - 1) / 2) * width for i in range(len(GROUPS))]
        heights = [100 * (rows[row][g].get("hit@10") or 0) for g in GROUPS]
        spread = [100 * rows[row][g].get("hit@10_sd", 0) for g in GROUPS]
        axis.bar(x, heights, width * 0.94, yerr=spread, color=colour, label=LABELS[row],
                 error_kw={"elinewidth": 0.8, "ecolor": "#2b3340"})  # fmt: skip
        if row == "pad":
            for position, height in zip(x, heights, strict=True):
                axis.text(position, height + 0.35, f"{height:.1f}", ha="center", fontsize=8)
    axis.set_xticks(
        range(len(GROUPS)),
        [f"{title}\n{rows['pad'][g]['count']:,} users" for g, title in GROUPS.items()],
    )
    axis.set_ylabel("Hit@10, percent")
    seeds = len(result["seeds"])
    axis.set_title(
        f"{result['dataset']}, test: full ranking, mean of {seeds} seeds; by how often the target "
        "occurs in training",
        loc="left",
        fontsize=9.5,
    )
    axis.grid(axis="y", color="#dfe3e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
