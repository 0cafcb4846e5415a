"""Why something failed, in words a user can act on, and written where the next sweep finds it."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from memlib.errors import InputError
from memlib.results import ResultStore, open_results
from memlib.storage import is_disk_full
from memlib.training import Diverged

RESTARTS = 3  # of what lost its process or node; an error of its own is final


def describe_error(error: Exception) -> str:
    """Return what to tell the user: the message of an expected error, the traceback of any other."""
    if is_disk_full(error):
        return (
            f"the disk or quota holding the results is full ({error}); free some space and run the same command again"
        )
    if isinstance(error, InputError | Diverged):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()


def record(write: Callable[[ResultStore], None], results: str, reason: str) -> str:
    """Write a failure with `write` and return its reason; where that is refused, the reason is all there is."""
    try:
        write(open_results(results))
    except (InputError, OSError) as refused:
        return f"{reason} (and the failure could not be written to {results}: {refused})"
    return reason
