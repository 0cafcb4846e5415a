"""Independent work shared with other processes: they begin at one end of a list, this one at the other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def share_work(
    names: Sequence[str], here: Callable[[str], T], elsewhere: Callable[[str], T], *, others: int
) -> dict[str, T]:
    """Return what became of each name, in their order: `here(name)`, or `elsewhere(name)` in one of the others.

    What each process does is found out as they go; `elsewhere` and its results are sent by pickle. With `others` 0
    everything is done here. Raises what a call raised; one elsewhere is heard of when nothing is left to do here.
    """
    if others == 0:
        return {name: here(name) for name in names}
    # Spawned: polars' threads do not survive a fork.
    pool = ProcessPoolExecutor(others, mp_context=multiprocessing.get_context("spawn"))
    try:
        begun = {name: pool.submit(elsewhere, name) for name in reversed(names)}
        done = {name: here(name) for name in names if begun[name].cancel()}
        return {name: done[name] if name in done else begun[name].result() for name in names}
    finally:
        pool.shutdown(cancel_futures=True)
