"""The errors a user can meet, each with the exit code a worker ends with (docs/formats.md, exit codes)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_USAGE = 64
EXIT_DATA = 65
EXIT_INTERNAL = 70
EXIT_IO = 74
EXIT_STOPPED = 75
EXIT_UNHEALTHY = 76
EXIT_INTERRUPTED = 130


class LmtrainError(Exception):
    """Base of all errors that are told in one line, without a traceback. ``exit_code`` is the worker's."""

    exit_code = EXIT_INTERNAL


class UsageError(LmtrainError):
    """A recipe, an override, a mesh or a combination that cannot work: nothing was allocated yet."""

    exit_code = EXIT_USAGE


class DataError(LmtrainError):
    """Data or a checkpoint that is missing, damaged or not the one expected."""

    exit_code = EXIT_DATA


class StorageError(LmtrainError):
    """The file system refused: no space, read-only, not permitted, or held by another writer."""

    exit_code = EXIT_IO


class UnhealthyError(LmtrainError):
    """Training cannot go on: repeated non-finite steps, or a rank that hangs."""

    exit_code = EXIT_UNHEALTHY


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` with the known name closest to ``name``, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(names)}" if names else ""
