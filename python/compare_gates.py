"""Compares ways to learn the frequency gate on validation, from the phases of a finished run.

    python python/compare_gates.py runs/pantry --out docs/results/gate_comparison.json

Every way starts phase 3 from the same pre-trained, aligned and language experts. Gates that are
fitted on validation targets are evaluated cross-fitted: each half of the users is ranked with a
gate fitted on the other half. Test targets are not read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from padkern.data.bins import frequency_bins
from padkern.data.split import make_split
from padkern.pad.config import RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.phases import Phases
from padkern.pad.progress import make_reporter
from padkern.pad.stored import load_inputs, transform_text

GATE = "disentangle.gate."
#: name -> configuration overrides of phase 3.
WAYS = {
    "uniform weights": [GATE + "learning=uniform", GATE + "hide=0"],
    "trained with the experts": [GATE + "learning=joint", GATE + "hide=0"],
    "trained with the experts, rare items hidden": [GATE + "learning=joint", GATE + "hide=0.5"],
    "held-out targets": [GATE + "cold_tolerance=0", GATE + "rare_tolerance=0", GATE + "hide=0"],
    "held-out targets, unseen items raised": [GATE + "rare_tolerance=0", GATE + "hide=0"],
    "held-out targets, rare and unseen items raised": [GATE + "hide=0"],
    "held-out targets, rare and unseen items raised, rare items hidden": [GATE + "hide=0.5"],
}
GROUPS = ("all", "freq_0", "freq_1_5", "freq_6_50", "freq_gt_50")


def load(phases: Phases, folder: RunFolder, row: str):
    """A trained row of the run."""
    model = phases.build(row)
    model.load_state_dict(folder.load_tensors(f"models/{row}")[0], strict=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("--out", type=Path, help="JSON with the figures")
    options = parser.parse_args()
    folder = RunFolder(options.run, create=False)
    dataset, matrix = load_inputs(folder)
    stored = RunConfig.from_yaml(folder.read_text("config.yaml"))
    split = make_split(dataset, stored.split)
    bins = frequency_bins(split.train_frequency, stored.num_bins, unseen=stored.unseen)
    results = {}
    for name, overrides in WAYS.items():
        config = stored.with_overrides(overrides)
        phases = Phases.of(
            split, bins, transform_text(matrix, config), config, reporter=make_reporter()
        )
        parts = {row: load(phases, folder, row) for row in ("pretrain", "aligned", "text")}
        model, _ = phases.disentangle(parts["pretrain"], parts["aligned"], parts["text"])
        metrics = phases.validation("pad", model).metrics()
        results[name] = {
            "metrics": {g: metrics[g] for g in GROUPS},
            "weights": model.gate.per_bin(model.item_bins, bins.num_bins).tolist()[1:],
        }
        cells = " ".join(f"{metrics[g]['hit@10']:.4f}/{metrics[g]['ndcg@10']:.4f}" for g in GROUPS)
        print(f"{name}: {cells}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
