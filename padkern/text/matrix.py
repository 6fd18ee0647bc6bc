"""A text matrix the user brings: rows are found by item id, never by their order.

Three forms: ``.npy`` [rows, E] with a file of ids, one a line, beside it (``NAME.items.txt`` or
``NAME.ids.txt``); ``.safetensors`` with a tensor ``embeddings`` and the ids as a JSON list in the
metadata entry ``items``, or in such a file; ``.parquet`` with columns ``item`` and ``embedding``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from padkern.errors import DataError, EnvError
from padkern.text.cache import write_atomic

_LOG = logging.getLogger(__name__)
MATRIX_SUFFIXES = (".npy", ".safetensors", ".parquet")


def load_matrix(path: str | Path, items: Sequence[str]) -> np.ndarray:
    """Reads a matrix and puts its rows into the order of ``items``.

    Args:
        path: .npy, .safetensors or .parquet file.
        items: item ids; a first id "" is the padding item and gets the zero row.

    Returns:
        float32 [len(items), E]. Rows of the file whose id is not in ``items`` are left out.

    Raises:
        DataError: naming the file, the row or id and the rule: unreadable file, ids missing or
            given twice, another number of ids than rows, not a matrix of floats, NaN or Inf.
        EnvError: the package that reads the form is missing.
    """
    path = Path(path).expanduser()
    if path.suffix not in MATRIX_SUFFIXES:
        raise DataError(f"{path}: a matrix file must end in {', '.join(MATRIX_SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: matrix file not found")
    if path.suffix == ".npy":
        matrix, ids = _read_npy(path), _read_ids(path)
    elif path.suffix == ".safetensors":
        matrix, ids = _read_safetensors(path)
    else:
        matrix, ids = _read_parquet(path)
    if matrix.ndim != 2 or matrix.dtype.kind != "f" or 0 in matrix.shape:
        raise DataError(
            f"{path}: embeddings must be a non-empty 2-D matrix of floats, "
            f"got shape {list(matrix.shape)} of {matrix.dtype}"
        )
    if len(ids) != len(matrix):
        raise DataError(f"{path}: {len(matrix)} rows but {len(ids)} item ids")

    place: dict[str, int] = {}
    for row, item in enumerate(ids):
        if item in place:
            raise DataError(
                f"{path}: row {row + 1}: item id {item!r} is already that of row {place[item] + 1}"
            )
        place[item] = row
    padded = bool(items) and items[0] == ""
    wanted = items[1:] if padded else items
    missing = [item for item in wanted if item not in place]
    if missing:
        first = ", ".join(repr(item) for item in missing[:3])
        raise DataError(
            f"{path}: {len(missing)} of {len(wanted)} items have no row, the first: {first}"
        )
    rows = np.array([place[item] for item in wanted], np.int64)
    out = np.zeros((len(items), matrix.shape[1]), np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf and is named below
        out[int(padded) :] = matrix[rows]
    bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"{path}: row {place[items[row]] + 1} (item id {items[row]!r}): embedding has NaN or "
            f"Inf in float32 ({len(bad)} such rows)"
        )
    if len(ids) > len(wanted):
        _LOG.info("%s: %d rows of other items are not used", path, len(ids) - len(wanted))
    return out


def save_matrix(path: str | Path, matrix: np.ndarray, items: Sequence[str]) -> None:
    """Writes a matrix with its item ids in one of the three forms, in float32.

    Args:
        path: ends in .npy (ids go to NAME.items.txt), .safetensors or .parquet.
        matrix: [len(items), E] float.
        items: item ids, one a row; a first id "" (padding) is left out with its row.

    Raises:
        ValueError: shapes that do not fit, an empty or repeated id, an id with a line break, NaN
            or Inf, another suffix.
    """
    path = Path(path).expanduser()
    matrix, items = np.asarray(matrix), list(items)
    if matrix.ndim != 2 or len(matrix) != len(items):
        raise ValueError(f"matrix must be [{len(items)}, E], one row per item, got {matrix.shape}")
    if items and items[0] == "":
        matrix, items = matrix[1:], items[1:]
    if len(set(items)) != len(items):
        raise ValueError("item ids must be unique")
    for item in items:
        if not item or item != item.strip("\r\n") or "\n" in item:
            raise ValueError(f"an item id must not be empty or hold a line break, got {item!r}")
    matrix = np.ascontiguousarray(matrix, np.float32)
    if not np.isfinite(matrix).all():
        raise ValueError("matrix has NaN or Inf")
    if path.suffix == ".npy":
        lines = "".join(f"{item}\n" for item in items).encode()
        write_atomic(path.with_suffix(".items.txt"), lambda stream: stream.write(lines))
        write_atomic(path, lambda stream: np.save(stream, matrix))
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save

        raw = save({"embeddings": matrix}, metadata={"items": json.dumps(items)})
        write_atomic(path, lambda stream: stream.write(raw))
    elif path.suffix == ".parquet":
        pa, pq = _pyarrow()
        width = matrix.shape[1]
        flat = pa.array(matrix.reshape(-1), pa.float32())
        offsets = pa.array(np.arange(len(items) + 1) * width, pa.int64())
        column = pa.LargeListArray.from_arrays(offsets, flat)
        table = pa.table({"item": pa.array(items, pa.string()), "embedding": column})
        write_atomic(path, lambda stream: pq.write_table(table, stream))
    else:
        raise ValueError(f"path must end in {', '.join(MATRIX_SUFFIXES)}, got {path.name}")


def _read_npy(path: Path) -> np.ndarray:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file ({_line(error)})") from error
    return matrix


def _read_ids(path: Path) -> list[str]:
    """Ids of the file beside the matrix, one a line."""
    names = [f"{stem}.{kind}.txt" for stem in (path.stem, path.name) for kind in ("items", "ids")]
    beside = [path.with_name(name) for name in names]
    sidecar = next((candidate for candidate in beside if candidate.is_file()), None)
    if sidecar is None:
        raise DataError(f"{path}: needs its item ids, one a line, in {beside[0].name} beside it")
    raw = sidecar.read_bytes().removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    ids = []
    for number, line in enumerate(raw, start=1):
        try:
            ids.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{sidecar}: line {number}: not UTF-8 ({error.reason})") from error
        if not ids[-1]:
            raise DataError(f"{sidecar}: line {number}: an item id must not be empty")
    return ids


def _read_safetensors(path: Path) -> tuple[np.ndarray, list[str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise EnvError(f"{path}: reading it needs: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:  # numpy has no bfloat16, torch has
            names = list(file.keys())
            if "embeddings" not in names:
                found = ", ".join(names[:5]) or "none"
                raise DataError(f"{path}: needs a tensor named 'embeddings', found: {found}")
            tensor = file.get_tensor("embeddings")
            listed = (file.metadata() or {}).get("items")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable .safetensors file ({_line(error)})") from error
    if tensor.is_floating_point():
        tensor = tensor.float()
    if listed is None:
        return tensor.numpy(), _read_ids(path)
    try:
        ids = json.loads(listed)
    except ValueError as error:
        raise DataError(f"{path}: metadata 'items' is not JSON ({_line(error)})") from error
    if not isinstance(ids, list) or not all(isinstance(item, str) and item for item in ids):
        raise DataError(f"{path}: metadata 'items' must be a JSON list of non-empty strings")
    return tensor.numpy(), ids


def _read_parquet(path: Path) -> tuple[np.ndarray, list[str]]:
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:  # read_table would import pandas where it is installed
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable .parquet file ({_line(error)})") from error
    for name in ("item", "embedding"):
        if name not in table.column_names:
            found = ", ".join(table.column_names[:5])
            raise DataError(f"{path}: needs a column {name!r}, found: {found}")
    raw_ids, column = table["item"].to_pylist(), table["embedding"].combine_chunks()
    ids = ["" if value is None else str(value) for value in raw_ids]
    if "" in ids:
        raise DataError(f"{path}: row {ids.index('') + 1}: column 'item' must not be empty")
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_list = is_list or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise DataError(f"{path}: column 'embedding' must be a list of floats, got {kind}")
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(lengths != lengths[:1]) if len(lengths) else np.empty(0, np.int64)
    if len(lengths) and lengths[0] < 0:
        odd = np.zeros(1, np.int64)
    if len(odd):
        row = int(odd[0])
        got = "null" if lengths[row] < 0 else f"{lengths[row]} numbers"
        raise DataError(
            f"{path}: row {row + 1} (item id {ids[row]!r}): embedding is {got}, "
            f"the other rows have {max(int(lengths[0]), 0)}"
        )
    flat = column.flatten()
    values = flat.to_numpy(zero_copy_only=False)
    if flat.null_count:
        values = np.where(np.asarray(flat.is_null()), np.nan, values)
    return values.reshape(len(ids), -1) if len(ids) else np.zeros((0, 0), np.float32), ids


def _pyarrow():
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvError("Parquet files need the package pyarrow: pip install pyarrow") from error
    return pa, pq


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
