"""Gives the simple rival PAD's held-out step: one weight per frequency bin, fitted on validation.

    python python/gated_rival.py runs/pantry-1 runs/pantry-2 runs/pantry-3

PAD's gate is fitted on validation targets. This control fits ``id_plus_text`` a gate of its own the
same way, unseen items raised by the same rule, and prints both rows on the test split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from padkern.modules import FrequencyGate
from padkern.pad.folder import RunFolder
from padkern.pad.gate import fit_gate, held_out, set_gate
from padkern.pad.significance import paired_bootstrap
from padkern.pad.stored import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders")
    parser.add_argument("--out", type=Path, help="JSON with the figures")
    options = parser.parse_args()
    ranks: dict[str, list[np.ndarray]] = {"gated rival": [], "pad": []}
    result: dict = {"rows": {name: [] for name in ranks}}
    for path in options.runs:
        run = load_run(RunFolder(path, create=False))
        rival = run.scorers["id_plus_text"]
        rival.gate = FrequencyGate(run.bins.num_bins, 1)
        config = run.config.disentangle.gate
        data = held_out(rival, run.split.valid, train_frequency=run.split.train_frequency)
        set_gate(rival, fit_gate(rival, data, config, seed=run.config.seed))
        for name, row in (("gated rival", "id_plus_text"), ("pad", "pad")):
            evaluation = run.evaluate("test", row)
            ranks[name].append(evaluation.ranks)
            metrics = evaluation.metrics()
            groups = ("all", "freq_0", "freq_1_5", "freq_6_50", "freq_gt_50")
            cells = {g: [metrics[g]["hit@10"], metrics[g]["ndcg@10"]] for g in groups}
            result["rows"][name].append(cells)
            print(path, name, *(f"{100 * h:.2f}/{100 * n:.2f}" for h, n in cells.values()))
    for metric in ("ndcg@10", "hit@10"):
        result[metric] = paired_bootstrap(
            np.stack(ranks["pad"]), np.stack(ranks["gated rival"]), metric
        )
        print("pad - gated rival", metric, result[metric])
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
