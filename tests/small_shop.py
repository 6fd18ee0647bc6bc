"""A shop small enough to train every method of a grid on it in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_shop(folder: Path, seed: int) -> Path:
    """Twenty-four items of four kinds, thirty users who stay with one kind; text vectors."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    names = [f"i{k}" for k in range(24)]
    lines = [f"{name}\tkind {k % 4} thing {k}\n" for k, name in enumerate(names)]
    (folder / "items.tsv").write_text("item\ttext\n" + "".join(lines))
    rows = ["user\titems\n"]
    for user in range(30):
        chosen = rng.permutation(np.arange(user % 4, 24, 4))[: rng.integers(4, 7)]
        rows.append(f"u{user}\t{' '.join(names[k] for k in chosen)}\n")
    (folder / "sequences.tsv").write_text("".join(rows))
    matrix = np.hstack([np.eye(4)[np.arange(24) % 4], 0.3 * rng.normal(size=(24, 4))])
    np.save(folder / "text.npy", matrix.astype(np.float32))
    (folder / "text.items.txt").write_text("".join(f"{name}\n" for name in names))
    return folder
