"""Identities of centring, PCA and whitening."""

from __future__ import annotations

import numpy as np
import pytest

from padkern.text import TextTransform


def _matrix(rows: int = 200, width: int = 12, rank: int | None = None, seed: int = 0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(rows, rank or width)) @ rng.normal(size=(rank or width, width))
    matrix = np.zeros((rows + 1, width), np.float32)
    matrix[1:] = base * np.linspace(3, 0.3, width) + rng.normal(size=width) * 5
    return matrix


def _covariance(rows: np.ndarray) -> np.ndarray:
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    return centred.T @ centred / len(rows)


def test_center_only():
    matrix = _matrix()
    out = TextTransform().fit_apply(matrix)
    assert out.dtype == np.float32
    assert not out[0].any()
    np.testing.assert_allclose(out[1:].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(out[1:] - out[1], matrix[1:] - matrix[1], atol=1e-4)
    np.testing.assert_array_equal(TextTransform(center=False).fit_apply(matrix), matrix)


def test_pca_keeps_the_largest_variances_and_the_distances():
    matrix = _matrix()
    variance = np.linalg.eigvalsh(_covariance(matrix[1:]))[::-1]
    out = TextTransform(pca=5).fit_apply(matrix)
    np.testing.assert_allclose(_covariance(out[1:]), np.diag(variance[:5]), atol=1e-3)
    full = TextTransform(pca=12).fit_apply(matrix)[1:]
    centred = TextTransform().fit_apply(matrix)[1:]
    np.testing.assert_allclose(full @ full.T, centred @ centred.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(full[:, :5], out[1:])


@pytest.mark.parametrize("rows", [200, 9])
@pytest.mark.parametrize("pca", [None, 6])
def test_whitening_gives_the_identity(rows, pca):
    matrix = _matrix(rows)
    out = TextTransform(pca=pca, whiten=True).fit_apply(matrix)
    assert out.shape == (rows + 1, pca or 12)
    rank = min(rows - 1, 12, pca or 12)
    expected = np.diag((np.arange(pca or 12) < rank).astype(float))
    np.testing.assert_allclose(_covariance(out[1:]), expected, atol=1e-4)
    assert not out[:, rank:].any()


def test_directions_of_rounding_noise_are_zero_not_blown_up():
    matrix = _matrix(rank=4)
    out = TextTransform(whiten=True).fit_apply(matrix)
    np.testing.assert_allclose(_covariance(out[1:])[:4, :4], np.eye(4), atol=1e-4)
    assert not out[:, 4:].any()


def test_constant_rows_become_zero():
    matrix = np.ones((6, 4), np.float32)
    for options in ({}, {"whiten": True}, {"pca": 2, "whiten": True}, {"normalize": True}):
        assert not TextTransform(**options).fit_apply(matrix).any()


def test_partial_whitening_scales_by_a_power():
    matrix = _matrix()
    plain, half, full = (TextTransform(pca=4, whiten=w).fit_apply(matrix)[1:] for w in (0, 0.5, 1))
    np.testing.assert_allclose(half**2, plain * full, rtol=1e-4, atol=1e-5)


def test_signs_do_not_depend_on_row_order_or_method():
    matrix = _matrix(11, 12)
    twice = np.concatenate([matrix, matrix[1:]])  # 22 rows: by covariance, not by SVD
    few, many = (TextTransform(pca=8).fit(m).basis for m in (matrix, twice))
    np.testing.assert_allclose(few, many, atol=1e-5)
    order = np.random.default_rng(1).permutation(11)
    mixed = matrix.copy()
    mixed[1:] = matrix[1:][order]
    again = TextTransform(pca=8).fit_apply(mixed)[1:]
    np.testing.assert_allclose(again, TextTransform(pca=8).fit_apply(matrix)[1:][order], atol=1e-4)
    assert (few[np.abs(few).argmax(0), np.arange(8)] > 0).all()


def test_all_but_top_removes_the_leading_directions():
    matrix = _matrix()
    basis = TextTransform(pca=12).fit(matrix).basis
    out = TextTransform(all_but_top=2).fit_apply(matrix)
    assert out.shape == matrix.shape
    np.testing.assert_allclose(out[1:] @ basis[:, :2], 0, atol=1e-4)
    kept = TextTransform(all_but_top=2, pca=3).fit_apply(matrix)
    np.testing.assert_array_equal(kept, TextTransform(pca=5).fit_apply(matrix)[:, 2:])
    whole = TextTransform(all_but_top=2, pca=3, whiten=True).fit_apply(matrix)
    np.testing.assert_allclose(_covariance(whole[1:]), np.eye(3), atol=1e-4)


def test_zero_rows_stay_zero_and_do_not_move_the_fit():
    matrix = _matrix()
    holes = np.insert(matrix, [1, 50, 50], 0, axis=0)
    present = np.flatnonzero(holes.any(axis=1))
    transform = TextTransform(pca=4, whiten=True, normalize=True)
    out = transform.fit_apply(holes)
    np.testing.assert_allclose(out[present], transform.fit_apply(matrix)[1:], atol=1e-5)
    assert not np.delete(out, present, axis=0).any()
    np.testing.assert_allclose(np.linalg.norm(out[present], axis=1), 1, atol=1e-6)


def test_padding_row_never_counts():
    matrix = _matrix()
    dirty = matrix.copy()
    dirty[0] = 1e6
    out = TextTransform(pca=3).fit_apply(dirty)
    np.testing.assert_array_equal(out, TextTransform(pca=3).fit_apply(matrix))


def test_fit_on_chosen_rows_applies_to_others():
    matrix = _matrix()
    fitted = TextTransform(whiten=True, pca=4).fit(matrix, rows=np.arange(0, 101))
    alone = TextTransform(whiten=True, pca=4).fit(matrix[:101])
    np.testing.assert_array_equal(fitted.basis, alone.basis)
    np.testing.assert_array_equal(fitted.apply(matrix)[:101], alone.apply(matrix[:101]))


def test_bad_arguments():
    for bad in (
        {"all_but_top": -1},
        {"pca": 0},
        {"whiten": 1.5},
        {"eps": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TextTransform(**bad)
    matrix = _matrix()
    with pytest.raises(ValueError, match="at most the matrix's 12 columns"):
        TextTransform(pca=11, all_but_top=2).fit(matrix)
    with pytest.raises(ValueError, match="at least one row"):
        TextTransform().fit(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="2-D float"):
        TextTransform().fit(np.zeros((3, 2), np.int64))
    matrix[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        TextTransform().fit(matrix)
    with pytest.raises(ValueError, match="fitted on 12 columns, got 3"):
        TextTransform().fit(_matrix()).apply(np.zeros((2, 3), np.float32))


def test_null_space_keeps_the_smallest_directions():
    matrix = _matrix()
    variance = np.linalg.eigvalsh(_covariance(matrix[1:]))[::-1]
    full = TextTransform(pca=12).fit_apply(matrix)
    out = TextTransform(null_space=4).fit_apply(matrix)
    np.testing.assert_allclose(out, full[:, 8:], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(_covariance(out[1:]), np.diag(variance[8:]), atol=1e-3)
    whole = TextTransform(null_space=4, whiten=True).fit_apply(matrix)
    np.testing.assert_allclose(_covariance(whole[1:]), np.eye(4), atol=1e-4)
    rest = TextTransform(all_but_top=8, whiten=True).fit_apply(matrix)
    np.testing.assert_allclose(whole, rest, rtol=1e-6, atol=1e-6)


def test_null_space_is_that_of_directions_in_which_rows_differ():
    matrix = _matrix(rank=5)
    out = TextTransform(null_space=2).fit_apply(matrix)
    leading = TextTransform(pca=5).fit_apply(matrix)
    np.testing.assert_allclose(out, leading[:, 3:], rtol=1e-6, atol=1e-6)
    assert np.linalg.norm(out[1:], axis=0).min() > 1e-2
    with pytest.raises(ValueError, match=r"null_space must be at most 5.*got 4 \+ 2"):
        TextTransform(all_but_top=4, null_space=2).fit(matrix)
    with pytest.raises(ValueError, match="null_space must be at least 0, got -1"):
        TextTransform(null_space=-1)
    with pytest.raises(ValueError, match="null_space must be 0 where pca is set, got 2 and 3"):
        TextTransform(null_space=2, pca=3)


def test_steps_run_in_the_documented_order():
    matrix = _matrix().astype(np.float64)
    rows = matrix[1:] - matrix[1:].mean(0)
    variance, directions = np.linalg.eigh(rows.T @ rows / len(rows))
    variance, directions = variance[::-1], directions[:, ::-1]
    kept = rows @ directions[:, 2:5] / np.sqrt(variance[2:5])
    want = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    transform = TextTransform(all_but_top=2, pca=3, whiten=True, normalize=True)
    got = transform.fit_apply(matrix)[1:].astype(np.float64)
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=1e-5)
    np.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-5)


def test_a_run_takes_its_steps_from_the_configuration():
    from padkern.errors import UsageError
    from padkern.pad.config import RunConfig
    from padkern.pad.stored import fit_text

    matrix = _matrix()
    for words, want in (
        (["text.all_but_top=2", "text.pca=3"], {"all_but_top": 2, "pca": 3}),
        (["text.all_but_top=2"], {"all_but_top": 2, "pca": 10}),
        (["text.pca=null", "text.null_space=4"], {"null_space": 4}),
    ):
        config = RunConfig().with_overrides(words)
        options = TextTransform(**want, whiten=True, normalize=True)
        assert fit_text(matrix, config).options == options
    with pytest.raises(UsageError, match="null_space needs pca=null, got 4 and pca=256"):
        RunConfig().with_overrides(["text.null_space=4"])
    # A run stored before these keys came did what their defaults say.
    text = RunConfig().to_yaml()
    lines = text.splitlines(keepends=True)
    older = "".join(line for line in lines if "all_but_top" not in line and "null_sp" not in line)
    assert older != text
    assert RunConfig.from_yaml(older) == RunConfig()
