"""What each post-processing of the text vectors does to cold items: text_knn, nothing trained.

    python python/text_study.py --data prime_pantry --text minilm
    python python/text_study.py --data amazon_scientific --text llm.npy --part valid

Every row ranks the whole catalogue by the nearest neighbours of the user's last items in the
transformed text matrix. Choose on ``--part valid`` and report on ``test``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from padkern.data.bins import frequency_bins
from padkern.data.split import make_split
from padkern.pad.baselines import TextKNN
from padkern.pad.config import RunConfig
from padkern.pad.evaluation import evaluate
from padkern.pad.progress import PlainReporter
from padkern.pad.significance import paired_bootstrap
from padkern.pad.workflow import pick_device, read_data, text_matrix
from padkern.text import TextTransform

GROUPS = ("freq_0", "all")
METRICS = ("hit@10", "ndcg@10")
_BASE = "centred"


def transforms(width: int) -> dict[str, TextTransform]:
    """Name -> transform, those that fit a matrix of this width."""
    chosen = {"raw": TextTransform(center=False), _BASE: TextTransform()}
    for top in (1, 3, 10):
        chosen[f"all-but-top {top}"] = TextTransform(all_but_top=top)
    for size in (64, 128, 256):
        chosen[f"PCA {size}"] = TextTransform(pca=size)
        chosen[f"half whitened {size}"] = TextTransform(pca=size, whiten=0.5)
        chosen[f"whitened {size}"] = TextTransform(pca=size, whiten=True)
    for part in (2, 4):
        size = width // part
        chosen[f"null space {size}"] = TextTransform(null_space=size)
        chosen[f"null space {size}, whitened"] = TextTransform(null_space=size, whiten=True)
    return {
        name: transform
        for name, transform in chosen.items()
        if max(transform.all_but_top, transform.pca or 0, transform.null_space) <= width
    }


def study(data: str, text: str, part: str, kind: str, decay: float, resamples: int) -> dict:
    """Figures of every transform on one split, and differences to centring alone."""
    reporter = PlainReporter()
    dataset = read_data(data)
    matrix = text_matrix(text, dataset, device=pick_device("auto"), reporter=reporter)
    split = make_split(dataset, kind)
    bins = frequency_bins(split.train_frequency)
    max_len = RunConfig().model.max_len
    results = {}
    for name, transform in transforms(matrix.shape[1]).items():
        try:
            moved = transform.fit_apply(matrix)
        except ValueError as error:  # fewer directions than columns
            reporter.message(f"{name}: left out, {error}")
            continue
        results[name] = evaluate(
            TextKNN(moved, decay, centre=False, max_len=max_len), getattr(split, part),
            train_frequency=split.train_frequency, item_bins=bins.item_bins, with_top=True,
        )  # fmt: skip
    rows = {}
    for name, result in results.items():
        metrics = result.metrics()
        rows[name] = {
            group: {metric: metrics[group][metric] for metric in METRICS} for group in GROUPS
        }
        rows[name]["cold_share@10"] = metrics["all"]["cold_share@10"]
        rows[name]["difference"] = {
            group: paired_bootstrap(
                result.ranks, results[_BASE].ranks, "ndcg@10",
                subset=result.group(group), resamples=resamples,
            )
            for group in GROUPS
        }  # fmt: skip
    first = results[_BASE]
    return {
        "dataset": dataset.name,
        "text": text,
        "width": matrix.shape[1],
        "split": kind,
        "part": part,
        "decay": decay,
        "users": {group: int(first.group(group).sum()) for group in GROUPS},
        "cold_items": float(np.mean(split.train_frequency[1:] == 0)),
        "rows": rows,
    }


def markdown(result: dict) -> str:
    """Hit@10 / NDCG@10 in percent, differences of NDCG@10 in points with 95 % intervals."""
    users = result["users"]
    lines = [
        f"| transform | cold ({users['freq_0']:,} users) | all ({users['all']:,}) "
        f"| cold share@10 | cold - {_BASE} | all - {_BASE} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        cells = [" / ".join(_percent(row[group][metric]) for metric in METRICS) for group in GROUPS]
        cells.append(_percent(row["cold_share@10"]))
        for group in GROUPS:
            d = row["difference"][group]
            cells.append(
                "-" if d["difference"] is None or name == _BASE else
                f"{100 * d['difference']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
            )  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="as of padkern run")
    parser.add_argument("--text", required=True, help="as of padkern run")
    parser.add_argument("--part", choices=("test", "valid"), default="test", help="held-out part")
    parser.add_argument(
        "--split", choices=("leave_one_out", "global_time"), default="leave_one_out"
    )
    parser.add_argument("--decay", type=float, default=0.6, help="weight ratio of one step back")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the intervals")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    result = study(
        options.data, options.text, options.part, options.split, options.decay, options.resamples
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['dataset']}, {result['text']}, {result['split']}, {result['part']}")
    print(markdown(result))


if __name__ == "__main__":
    main()
