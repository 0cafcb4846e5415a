"""Why something failed or was lost, in words a user can act on, and what is tried again for how long."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch

from memlib.errors import InputError
from memlib.results import ResultStore, open_results
from memlib.storage import Patience, StorageRefused, is_disk_full
from memlib.training import Diverged

RESTARTS = 3  # of what lost its process or node; an error of its own is final
PATIENCE_SECONDS = 300.0  # a storage that refuses is tried again for so long
PATIENCE_VARIABLE = "MEMLIB_STORAGE_PATIENCE"  # seconds, instead of those
# What Ray's messages say, and what it means; the first that is found.
_LOSSES = (
    ("low on memory", "its node ran out of memory"),
    ("out of memory", "its node ran out of memory"),
    ("node has died", "its node was lost"),
    ("node it was running on is dead", "its node was lost"),
)
TAKEN_BACK = "its node was taken back"  # a spot node that left with notice


class RayDied(RuntimeError):
    """Ray itself died on the machine the sweep's driver runs on, so that nothing can be started any more."""


def open_patiently(results: str, told: Callable[[str], None]) -> ResultStore:
    """Return the store for a process whose work would be lost if the storage refused it; it says so by `told`."""
    return open_results(results, Patience(storage_patience(), told))


def storage_patience() -> float:
    """Return for how many seconds a storage that refuses is tried again.

    Raises:
        InputError: the environment variable that says so is no number of seconds.
    """
    given = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        seconds = float(given) if given else PATIENCE_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{PATIENCE_VARIABLE} is {given!r}; give a number of seconds, e.g. 300.")
    return seconds


def describe_loss(message: str) -> str:
    """Return what was lost, from Ray's message about it."""
    found = [meaning for sign, meaning in _LOSSES if sign in message.lower()]
    return found[0] if found else "its process was lost"


def describe_error(error: Exception) -> str:
    """Return what to tell the user: the message of an expected error, the traceback of any other."""
    if is_disk_full(error):
        return (
            f"the disk or quota holding the results is full ({error}); free some space and run the same command again"
        )
    if isinstance(error, StorageRefused):
        return f"{error.strerror}; run the same command again when it answers: what was written is kept"
    if isinstance(error, InputError | Diverged):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is too small for it, or for what shares the card with it; lower training.batch_size (or "
            f"retraining.batch_size), or give each a whole card (GPU_SHARE in sweeps/resources.py): {error}"
        )
    return "".join(traceback.format_exception(error)).strip()


def record(write: Callable[[ResultStore], None], results: str, reason: str) -> str:
    """Write a failure with `write` and return its reason; where that is refused, the reason is all there is."""
    try:
        write(open_results(results))
    except (InputError, OSError) as refused:
        return f"{reason} (and the failure could not be written to {results}: {refused})"
    return reason
