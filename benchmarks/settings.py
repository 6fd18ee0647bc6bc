"""What the environment may change of a suite: its sizes, and how much of a slow peer is timed."""

from __future__ import annotations

import os

# With PADKERN_BENCH_SMALL=1 the suites that know it run on tiny shapes: every form and every check
# once, in seconds. What they then time are no figures, and the report says so.
SMALL = os.environ.get("PADKERN_BENCH_SMALL") == "1"


def count(name: str, default: int) -> int:
    """A whole number of at least 0 from the environment.

    Raises:
        ValueError: the variable holds something else.
    """
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise ValueError(f"{name} must be a whole number of at least 0, got {text!r}")
    return int(text)


def switched_on(name: str) -> bool:
    """Whether an environment variable is 1."""
    return os.environ.get(name) == "1"
