"""When Python looks for garbage in a process that draws: seldom, for drawing makes many objects and little garbage."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW_OBJECTS = 50_000  # before Python looks for garbage; its own 700 (2,000 from 3.13) have it look all the time


@contextmanager
def collecting_less_often() -> Iterator[None]:
    """Run a block in which Python looks for garbage less often, and give the user's setting back."""
    before = gc.get_threshold()
    gc.set_threshold(before[0] and _NEW_OBJECTS, *before[1:])  # 0: never, and it stays so
    try:
        yield
    finally:
        gc.set_threshold(*before)


def end_sooner() -> None:
    """Let this process end without a look for garbage at all it has, which takes half a second."""
    atexit.register(gc.freeze)
