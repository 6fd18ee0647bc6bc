"""Table over several seeds from finished run folders: means, deviations, paired intervals.

    padkern run --data prime_pantry --text minilm --seed 1 --out runs/pantry-1   # and 2, 3
    python python/seed_table.py runs/pantry-? --out docs/results/pantry.json

The intervals are paired bootstraps over users, with every user's metric averaged over the seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from padkern.data.split import make_split
from padkern.pad.config import RunConfig
from padkern.pad.evaluation import FREQUENCY_GROUPS, frequency_group
from padkern.pad.folder import RunFolder
from padkern.pad.run import PAIRS, ROWS
from padkern.pad.significance import paired_bootstrap
from padkern.pad.stored import load_inputs

GROUPS = ("all", *FREQUENCY_GROUPS)
METRICS = ("hit@5", "hit@10", "hit@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


def summarise(folders: list[Path]) -> dict:
    """Figures of runs that differ in the seed only."""
    runs = [RunFolder(path, create=False) for path in folders]
    configs = [RunConfig.from_yaml(run.read_text("config.yaml")) for run in runs]
    if len({c.model_copy(update={"seed": 0}).to_yaml() for c in configs}) != 1:
        raise SystemExit("the runs differ in more than the seed")
    metrics = [run.read_json("metrics.json") for run in runs]
    ranks = [run.load_tensors("ranks")[0] for run in runs]
    dataset, _ = load_inputs(runs[0])
    split = make_split(dataset, configs[0].split)
    result: dict = {
        "dataset": dataset.name,
        "seeds": [c.seed for c in configs],
        "minutes": [round(sum(v for v in m["seconds"].values()) / 60, 2) for m in metrics],
        "rows": {},
        "differences": {},
    }
    for part in ("valid", "test"):
        targets = getattr(split, part).targets
        frequency = split.train_frequency[targets]
        members = {"all": np.ones(len(targets), dtype=bool)}
        members |= {g: frequency_group(frequency, g) for g in FREQUENCY_GROUPS}
        rows: dict = {}
        for row in ROWS:
            rows[row] = {}
            for group in GROUPS:
                cell = {"count": int(members[group].sum())}
                for metric in METRICS:
                    values = [m["models"][row][part][group][metric] for m in metrics]
                    if None not in values:
                        cell[metric] = float(np.mean(values))
                        cell[metric + "_sd"] = float(np.std(values, ddof=min(1, len(values) - 1)))
                rows[row][group] = cell
            exposure = [m["models"][row][part]["all"] for m in metrics]
            for name in ("coverage@10", "cold_share@10"):
                rows[row]["all"][name] = float(np.mean([e[name] for e in exposure]))
        result["rows"][part] = rows
        result["differences"][part] = {
            f"{a} - {b}": {
                group: {
                    metric: paired_bootstrap(
                        np.stack([r[f"{a}/{part}"].numpy() for r in ranks]),
                        np.stack([r[f"{b}/{part}"].numpy() for r in ranks]),
                        metric,
                        subset=members[group],
                    )
                    for metric in ("ndcg@10", "hit@10")
                }
                for group in GROUPS
                if members[group].any()
            }
            for a, b in PAIRS
        }
    return result


def markdown(result: dict, part: str = "test") -> str:
    """The comparison table in percent, Hit@10 / NDCG@10."""
    lines = [
        "| row | " + " | ".join(GROUPS) + " |",
        "|---|" + "---:|" * len(GROUPS),
    ]
    for row, groups in result["rows"][part].items():
        cells = []
        for group in GROUPS:
            cell = groups[group]
            if "hit@10" not in cell:
                cells.append("-")
                continue
            text = f"{100 * cell['hit@10']:.2f} / {100 * cell['ndcg@10']:.2f}"
            if group == "all" and len(result["seeds"]) > 1:
                text += f" ± {100 * cell['ndcg@10_sd']:.2f}"
            cells.append(text)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", "| difference in NDCG@10 | " + " | ".join(GROUPS) + " |"]
    lines.append("|---|" + "---:|" * len(GROUPS))
    for pair, groups in result["differences"][part].items():
        cells = []
        for group in GROUPS:
            d = groups.get(group, {}).get("ndcg@10")
            cells.append(
                "-" if d is None else
                f"{100 * d['difference']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
            )  # fmt: skip
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    result = summarise(options.runs)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for part in ("valid", "test"):
        print(f"{result['dataset']}, {part}, seeds {result['seeds']}, minutes {result['minutes']}")
        print(markdown(result, part))
        print()


if __name__ == "__main__":
    main()
