"""The catalogue that the readers of published files make of their item files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from padkern.data.raw.events import Catalog


def catalog() -> Catalog:
    names = [pa.array(["a", "b", "a"]), pa.array(["c"])]
    return Catalog.of(Path("items.csv"), names, [["old", "two", "new"], ["three"]])


def test_of_rows_with_one_id_the_last_counts():
    found = catalog()
    assert found.names.to_pylist() == ["b", "a", "c"]
    assert found.texts.to_pylist() == ["two", "new", "three"]
    assert found.duplicates == 1


def test_unknown_items_come_last_in_order_without_a_text():
    found = catalog().with_unknown(pa.array(["z", "b", "y"]))
    assert found.names.to_pylist() == ["b", "a", "c", "y", "z"]
    assert found.texts.to_pylist() == ["two", "new", "three", "", ""]


def test_texts_have_offsets_of_64_bits():
    # With 32 bits, more than 2 GiB of texts would fail.
    assert catalog().texts.type == pa.large_string()
    assert catalog().with_unknown(pa.array(["z"])).texts.type == pa.large_string()
