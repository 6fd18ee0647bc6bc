"""Mean and deviation of cold tests that differ in the seed: other items, other weights.

    padkern coldtest --data prime_pantry --text minilm --seed 1 --out runs/cold-1   # and 2, 3
    python python/cold_seeds.py runs/cold-? --out docs/results/cold_pantry.json

Every seed holds out items of its own, so no interval over users is given across seeds; those of
one seed stand in its ``coldtest.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

METRICS = ("hit@10", "ndcg@10")
GROUPS = ("cold", "among_cold", "warm_before", "warm")


def summarise(results: list[dict]) -> dict:
    """Figures over the seeds.

    Args:
        results: contents of ``coldtest.json``.

    Returns:
        Rows with mean and deviation (n - 1) of every figure, and of ``warm_change``, the
        difference of warm NDCG@10.
    """
    first = results[0]
    for result in results[1:]:
        for key in ("dataset", "split", "share"):
            if result[key] != first[key]:
                raise SystemExit(f"{key} must be alike, got {first[key]!r} and {result[key]!r}")
    if len({result["seed"] for result in results}) != len(results):
        raise SystemExit("each seed once")

    def over(read) -> dict[str, float]:
        values = [read(result) for result in results]
        spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
        return {"mean": float(np.mean(values)), "sd": float(spread)}

    rows: dict = {}
    for row in first["rows"]:
        entry: dict = {
            group: {m: over(lambda r, g=group, m=m, row=row: r["rows"][row][g][m]) for m in METRICS}
            for group in GROUPS
        }
        entry["exposure@10"] = over(lambda r, row=row: r["rows"][row]["exposure@10"])
        entry["warm_change"] = over(
            lambda r, row=row: r["rows"][row]["warm_change"]["ndcg@10"]["difference"]
        )
        rows[row] = entry
    return {
        "dataset": first["dataset"],
        "split": first["split"],
        "share": first["share"],
        "seeds": sorted(result["seed"] for result in results),
        "targets": {
            kind: [result["targets"][kind] for result in results] for kind in ("cold", "warm")
        },
        "rows": rows,
    }


def markdown(summary: dict) -> str:
    """Hit@10 / NDCG@10 in percent, means over the seeds."""
    lines = [
        "| row | cold | cold among cold | exposure@10 | warm before | warm | change |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row, entry in summary["rows"].items():
        pairs = [" / ".join(_percent(entry[g][m]["mean"]) for m in METRICS) for g in GROUPS]
        cells = [*pairs[:2], _percent(entry["exposure@10"]["mean"]), *pairs[2:]]
        change = entry["warm_change"]
        cells.append(f"{100 * change['mean']:+.2f} ± {100 * change['sd']:.2f}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of padkern coldtest")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    summary = summarise(
        [json.loads((folder / "coldtest.json").read_text()) for folder in options.folders]
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(markdown(summary))


if __name__ == "__main__":
    main()
