"""Where the progress of a command goes."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

__all__ = ["reporting"]


@contextlib.contextmanager
def reporting(quiet: bool) -> Iterator[Any]:
    """A reporter; the terminal is restored even when the process is terminated."""
    from padkern.pad.progress import make_reporter

    if quiet:
        logging.getLogger("padkern").setLevel(logging.ERROR)
    reporter = make_reporter(quiet)

    def stop(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield reporter
    finally:
        reporter.close()
        signal.signal(signal.SIGTERM, before)
