"""Exceptions that the command line turns into one line and an exit code.

Wrong arguments of library functions raise ``TypeError`` or ``ValueError``; the classes here are for
what a user's files, configuration or machine can get wrong.
"""

from __future__ import annotations


class PadkernError(Exception):
    """Root of padkern's own exceptions; the message is one line that says what to do."""

    exit_code = 1


class UsageError(PadkernError):
    """A command or configuration value that padkern does not accept."""

    exit_code = 2


class DataError(PadkernError):
    """An input file that breaks a rule; the message names file, line or row, column and value."""

    exit_code = 3


class CheckpointError(PadkernError):
    """A run folder or checkpoint that cannot be read or does not fit."""

    exit_code = 4


class EnvError(PadkernError):
    """Something missing on this machine: a package, a device, disk space, the network."""

    exit_code = 5
