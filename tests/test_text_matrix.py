"""Matrices the user brings: joined by item id in every form, every broken one a clear line."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from padkern.errors import DataError
from padkern.text import load_matrix, load_text, save_matrix

ITEMS = ["", "b", "a", "Zürich 7", "d"]
FORMS = ["npy", "safetensors", "parquet"]


def _matrix(seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)
    matrix[0] = 0
    return matrix


@pytest.fixture(params=FORMS)
def form(request):
    pytest.importorskip({"npy": "numpy", "parquet": "pyarrow"}.get(request.param, request.param))
    return request.param


def test_rows_are_joined_by_id(form, tmp_path, caplog):
    matrix, path = _matrix(), tmp_path / f"emb.{form}"
    order = [3, 1, 4, 2]
    stranger = np.full((1, 3), 9, np.float32)
    save_matrix(
        path, np.concatenate([matrix[order], stranger]), [*(ITEMS[i] for i in order), "stranger"]
    )
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(load_matrix(path, ITEMS), matrix)
    assert "1 rows of other items" in caplog.text
    np.testing.assert_array_equal(load_matrix(path, ITEMS[1:]), matrix[1:])
    dataset = SimpleNamespace(name="tiny", items=ITEMS, texts=[""] * 5)
    np.testing.assert_array_equal(load_text(str(path), dataset), matrix)


def test_padding_row_is_not_written(form, tmp_path):
    path = tmp_path / f"emb.{form}"
    save_matrix(path, _matrix(), ITEMS)
    np.testing.assert_array_equal(load_matrix(path, ITEMS[:0:-1]), _matrix()[:0:-1])


def test_missing_items_are_counted_and_named(form, tmp_path):
    path = tmp_path / f"emb.{form}"
    save_matrix(path, _matrix()[1:2], ["b"])
    items = [*ITEMS, "e"]
    with pytest.raises(
        DataError, match=r"4 of 5 items have no row, the first: 'a', 'Zürich 7', 'd'$"
    ):
        load_matrix(path, items)


def test_nan_is_named_by_row_and_id(form, tmp_path):
    path = tmp_path / f"emb.{form}"
    save_matrix(path, _matrix(), ITEMS)
    matrix = _matrix()[1:]
    matrix[2, 1] = np.nan
    ids = ITEMS[1:]
    if form == "npy":
        np.save(path, matrix)
    elif form == "safetensors":
        from safetensors.numpy import save_file

        save_file({"embeddings": matrix}, path, metadata={"items": json.dumps(ids)})
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"item": ids, "embedding": list(matrix)}), path)
    with pytest.raises(DataError, match=rf"emb\.{form}: row 3 \(item id 'Zürich 7'\).*NaN or Inf"):
        load_matrix(path, ITEMS)


def test_garbage_is_a_data_error(form, tmp_path):
    path = tmp_path / f"emb.{form}"
    path.with_suffix(".items.txt").write_text("a\n")
    path.write_bytes(b"this is no matrix")
    with pytest.raises(DataError, match=rf"emb\.{form}: not a readable \.{form} file") as caught:
        load_matrix(path, ITEMS)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="matrix file not found"):
        load_matrix(tmp_path / f"none.{form}", ITEMS)


def test_save_checks_its_arguments(form, tmp_path):
    path = tmp_path / f"emb.{form}"
    for matrix, items, message in (
        (np.zeros((2, 3)), ["a"], "one row per item"),
        (np.zeros((2, 3)), ["a", "a"], "unique"),
        (np.zeros((2, 3)), ["a", "b\nc"], "line break"),
        (np.zeros((2, 3)), ["a", ""], "empty"),
        (np.full((1, 3), np.inf), ["a"], "NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            save_matrix(path, matrix, items)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="path must end in"):
        save_matrix(tmp_path / "emb.csv", np.zeros((1, 3)), ["a"])


def _npy(path, matrix, ids: str | bytes | None):
    np.save(path, matrix)
    if ids is not None:
        raw = ids.encode() if isinstance(ids, str) else ids
        path.with_suffix(".items.txt").write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("matrix", "ids", "message"),
    [
        (np.zeros((2, 3)), None, r"needs its item ids.*emb\.items\.txt"),
        (np.zeros((2, 3)), "a\nb\nc\n", "2 rows but 3 item ids"),
        (np.zeros((2, 3)), "a\na\n", "row 2: item id 'a' is already that of row 1"),
        (np.zeros((2, 3)), "a\n\nb\n", r"emb\.items\.txt: line 2: an item id must not be empty"),
        (np.zeros((2, 3)), b"a\n\xff\n", r"emb\.items\.txt: line 2: not UTF-8"),
        (np.zeros(2), "a\nb\n", r"2-D matrix of floats, got shape \[2\] of float64"),
        (np.zeros((2, 3), np.int64), "a\nb\n", "2-D matrix of floats.*int64"),
        (np.zeros((2, 0)), "a\nb\n", r"non-empty 2-D matrix.*\[2, 0\]"),
        (np.array([[1e300], [1]]), "a\nb\n", r"row 1 \(item id 'a'\).*Inf"),
    ],
)
def test_broken_npy(tmp_path, matrix, ids, message):
    with pytest.raises(DataError, match=message):
        load_matrix(_npy(tmp_path / "emb.npy", matrix, ids), ["", "a", "b"])


@pytest.mark.parametrize("name", ["emb.items.txt", "emb.ids.txt", "emb.npy.items.txt"])
def test_id_file_names_bom_and_windows_lines(tmp_path, name):
    path = _npy(tmp_path / "emb.npy", np.array([[1.0], [2.0]], np.float16), None)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfb\r\na\r\n")
    np.testing.assert_array_equal(load_matrix(path, ["", "a", "b"]), [[0], [2], [1]])


def test_pickled_npy_is_refused(tmp_path):
    path = _npy(tmp_path / "emb.npy", np.array([{"a": 1}], dtype=object), "a\n")
    with pytest.raises(DataError, match=r"not a readable \.npy file"):
        load_matrix(path, ["", "a"])


def test_safetensors_variants(tmp_path):
    pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "emb.safetensors"
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    save_file({"embeddings": tensor}, path)
    with pytest.raises(DataError, match="needs its item ids"):
        load_matrix(path, ["", "a", "b"])
    (tmp_path / "emb.ids.txt").write_text("b\na\n")
    np.testing.assert_array_equal(load_matrix(path, ["", "a", "b"]), [[0, 0], [3, 4], [1, 2]])
    save_file({"weights": tensor}, path)
    with pytest.raises(DataError, match="needs a tensor named 'embeddings', found: weights"):
        load_matrix(path, ["", "a", "b"])
    for items, message in (("[1, 2]", "JSON list"), ("{", "not JSON")):
        save_file({"embeddings": tensor}, path, metadata={"items": items})
        with pytest.raises(DataError, match=message):
            load_matrix(path, ["", "a", "b"])


def test_parquet_variants(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "emb.parquet"

    def write(items, rows, kind):
        pq.write_table(pa.table({"item": items, "embedding": pa.array(rows, kind)}), path)

    for kind in (pa.list_(pa.float32()), pa.list_(pa.float64(), 2), pa.large_list(pa.float16())):
        write([7, 3], [[1, 2], [3, 4]], kind)  # integer ids are read as text
        np.testing.assert_array_equal(load_matrix(path, ["", "3", "7"]), [[0, 0], [3, 4], [1, 2]])
    floats = pa.list_(pa.float32())
    for items, rows, kind, message in (
        (["a", "b"], [[1, 2], [3]], floats, r"row 2 \(item id 'b'\): embedding is 1 numbers"),
        (["a", "b"], [[1, 2], None], floats, r"row 2 \(item id 'b'\): embedding is null"),
        (["a", "b"], [None, [1, 2]], floats, r"row 1 \(item id 'a'\): embedding is null"),
        (["a", "b"], [[1, 2], [3, None]], floats, r"row 2 \(item id 'b'\).*NaN"),
        (["a", None], [[1, 2], [3, 4]], floats, "row 2: column 'item' must not be empty"),
        (["a", "b"], [[1], [2]], pa.list_(pa.int32()), "must be a list of floats"),
        (["a", "b"], [1.0, 2.0], pa.float32(), "must be a list of floats"),
        ([], [], floats, "non-empty 2-D"),
    ):
        write(pa.array(items, pa.string()), rows, kind)
        with pytest.raises(DataError, match=message):
            load_matrix(path, ["", "a", "b"])
    pq.write_table(pa.table({"id": ["a"], "embedding": [[1.0]]}), path)
    with pytest.raises(DataError, match="needs a column 'item', found: id, embedding"):
        load_matrix(path, ["", "a"])


def test_unknown_suffix(tmp_path):
    with pytest.raises(DataError, match="must end in"):
        load_matrix(tmp_path / "emb.csv", ITEMS)
