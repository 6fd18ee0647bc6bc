"""Writes files of the published forms and sizes from random numbers, and reads them in a child.

    python benchmarks/raw_files.py write amazon2018 FOLDER --scale 0.1
    python benchmarks/raw_files.py read FOLDER

Full size is that of Amazon Electronics 2018 (20 million ratings, 760 thousand items with metadata)
and of MIND-small (230 thousand impressions). Ids, skew and the width of the records are made to
resemble the real files; the contents mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

RATINGS, USERS, ITEMS = 20_000_000, 9_000_000, 760_000
IMPRESSIONS, READERS, NEWS = 230_000, 94_000, 65_000
_TITLES = (
    "USB Cable Black 2-Pack Case for Wireless Mouse &amp; Keyboard 10ft HDMI Adapter Stand LED "
    "Portable Speaker Charger Battery Replacement Camera Lens Filter Kit Tripod Mount Bluetooth "
    "Headphones Earbuds Noise 4K Monitor 27-inch Laptop Sleeve SSD 1TB Memory Card Reader Hub"
)
_WORDS = np.array(_TITLES.split())


def write_amazon2018(folder: Path, scale: float, seed: int = 0) -> None:
    """``Electronics.csv`` (item, user, rating, day; sorted by item) and its metadata, gzip."""
    rng = np.random.default_rng(seed)
    rows, users, items = (max(50, int(size * scale)) for size in (RATINGS, USERS, ITEMS))
    folder.mkdir(parents=True, exist_ok=True)
    asins = _ids("B", rng.permutation(items * 40)[:items], 9)
    # Skewed: a cube of a uniform number for users, a higher power for items.
    item = np.sort((items * rng.random(rows) ** 4).astype(np.int64))
    user = (users * rng.random(rows) ** 3).astype(np.int64)
    table = {
        "item": asins.take(pa.array(item)),
        "user": _ids("A", user * 7919 % (users * 8), 13),
        "rating": pa.array(
            rng.choice([1.0, 2.0, 3.0, 4.0, 5.0], rows, p=[0.1, 0.05, 0.1, 0.2, 0.55])
        ),
        "time": pa.array(rng.integers(11_000, 17_800, rows) * 86_400),
    }
    pacsv.write_csv(
        pa.table(table),
        folder / "Electronics.csv",
        pacsv.WriteOptions(include_header=False, quoting_style="none"),
    )
    names = asins.to_pylist()
    with gzip.open(folder / "meta_Electronics.json.gz", "wb", compresslevel=1) as out:
        for start in range(0, items, 10_000):
            part = names[start : start + 10_000]
            words = _WORDS[rng.integers(0, _WORDS.size, (len(part), 160))]
            near = rng.integers(0, items, (len(part), 40))
            lines = [
                _record(name, row, [names[i] for i in also])
                for name, row, also in zip(part, words.tolist(), near.tolist(), strict=True)
            ]
            out.write("".join(lines).encode())


def write_mind(folder: Path, scale: float, seed: int = 0) -> None:
    """``behaviors.tsv`` and ``news.tsv``."""
    rng = np.random.default_rng(seed)
    rows, users, news = (max(50, int(size * scale)) for size in (IMPRESSIONS, READERS, NEWS))
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"N{number}" for number in rng.permutation(2 * news)[:news]]
    with (folder / "news.tsv").open("w", encoding="utf-8") as out:
        for name in names:
            words = _WORDS[rng.integers(0, _WORDS.size, 60)].tolist()
            title, abstract = " ".join(words[:10]), " ".join(words[10:])
            out.write(f"{name}\tnews\tnewsus\t{title}\t{abstract}\thttps://x/{name}\t[]\t[]\n")

    def draw(size: int) -> list[str]:
        return [names[i] for i in (news * rng.random(size) ** 3).astype(np.int64)]

    past = [" ".join(draw(size)) for size in rng.poisson(32, users)]
    with (folder / "behaviors.tsv").open("w", encoding="utf-8") as out:
        for row in range(rows):
            user = int(users * rng.random())
            shown = draw(int(rng.poisson(36)) + 1)
            clicked = int(rng.integers(len(shown)))
            labels = " ".join(f"{name}-{int(i == clicked)}" for i, name in enumerate(shown))
            day, hour, second = rng.integers([9, 1, 0], [15, 13, 60]).tolist()
            when = f"11/{day}/2019 {hour}:{second:02d}:{second:02d} {'AP'[row % 2]}M"
            out.write(f"{row + 1}\tU{user}\t{when}\t{past[user]}\t{labels}\n")


def read_here(folder: Path) -> dict[str, float | int]:
    """Reads, filters as the authors do, and splits; seconds of each, and the highest memory."""
    from padkern.data import leave_one_out, read_raw

    started = time.perf_counter()
    dataset = read_raw(folder, authors=True)
    read = time.perf_counter()
    split = leave_one_out(dataset)
    done = time.perf_counter()
    return {
        "read_s": round(read - started, 3),
        "split_s": round(done - read, 3),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "rows": sum(file["rows_read"] for file in dataset.provenance["files"]),
        "users": dataset.num_users,
        "items": dataset.num_items,
        "interactions": int(dataset.sequences.values.size),
        "train": int(split.train.values.size),
    }


def read_in_child(folder: Path) -> dict[str, float | int]:
    """:func:`read_here` in a process of its own, whose memory is that of the reading alone."""
    command = [sys.executable, __file__, "read", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _ids(letter: str, numbers: np.ndarray, width: int) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), width, "0")
    return pc.binary_join_element_wise(letter, digits, "")


def _record(name: str, words: list[str], also: list[str]) -> str:
    quoted = '", "'.join(also)
    text = " ".join(words[12:])
    return (
        f'{{"category": ["Electronics", "{words[0]}"], "tech1": "", "description": ["{text}"], '
        f'"title": "{" ".join(words[:12])}", "also_buy": ["{quoted}"], "brand": "{words[5]}", '
        f'"feature": ["{" ".join(words[40:80])}"], "rank": [], "also_view": ["{quoted}"], '
        f'"price": "$9.99", "asin": "{name}", "imageURL": ["https://x/{name}.jpg"]}}\n'
    )


WRITERS = {"amazon2018": write_amazon2018, "mind": write_mind}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("kind", choices=sorted(WRITERS))
    write.add_argument("folder", type=Path)
    write.add_argument("--scale", type=float, default=0.01)
    read = commands.add_parser("read")
    read.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "write":
        WRITERS[chosen.kind](chosen.folder, chosen.scale)
    else:
        print(json.dumps(read_here(chosen.folder)))


if __name__ == "__main__":
    main()
