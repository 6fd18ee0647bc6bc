"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may use the global generator


@pytest.fixture(autouse=True)
def _fresh_log():
    """Undoes what the command line, run inside an earlier test or fixture, did to the logger."""
    log = logging.getLogger("padkern")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def poisoned_empty():
    """Fills torch.empty with NaN, so that memory nobody wrote cannot pass for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def restore_threads():
    """Gives the test the right to change torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native_core():
    """The compiled core; skips with the reason where it was not built."""
    from padkern import _native

    native = _native.load()
    if native.core is None:
        pytest.skip(native.reason)
    return native.core


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Every backend of the ops; native skips with a reason where it cannot run."""
    if request.param == "native":
        request.getfixturevalue("native_core")
    return request.param


@pytest.fixture(scope="session")
def padkern_data() -> Path:
    """Folder with the data sets, from the environment variable PADKERN_DATA."""
    value = os.environ.get("PADKERN_DATA")
    if not value or not Path(value).is_dir():
        message = "PADKERN_DATA does not name a folder with the data sets"
        if os.environ.get("PADKERN_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return Path(value)
