"""The one error a user is meant to read: bad input, found before any compute is spent."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what is wrong and what to do."""


def unknown(what: str, given: str, choices: Iterable[str]) -> InputError:
    """Return the error for a name that is not among `choices`, with the nearest match first."""
    known = sorted(choices)
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"{what} {given!r} is not known; {hint}choose from {', '.join(known)}.")
