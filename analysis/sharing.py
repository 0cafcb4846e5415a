"""Independent work shared with other processes: whoever is free takes the next piece."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def share_work(
    names: Sequence[str], here: Callable[[str], T], elsewhere: Callable[[str], T], *, others: int
) -> dict[str, T]:
    """Return what became of each name, in the order given. They are begun in that order: put what takes long first.

    `here(name)` is called in this process, `elsewhere(name)` in each of the others: it and its results are sent by
    pickle. With `others` 0 everything is done here. Raises what a call raised, once those that had begun have ended.
    """
    if others == 0:
        return {name: here(name) for name in names}
    left, done = deque(names), dict[str, T]()

    def take(work: Callable[[str], T]) -> None:
        while True:
            try:
                name = left.popleft()  # looked at and taken at once: threads may be here at the same time
            except IndexError:
                return
            try:
                done[name] = work(name)
            except BaseException:
                left.clear()  # nobody begins any more
                raise

    def help_out() -> None:
        # A pool of one for each thread that waits for it: it is given one name at a time, and one lost is one lost.
        # Spawned: polars' threads do not survive a fork.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            take(lambda name: process.submit(elsewhere, name).result())

    with ThreadPoolExecutor(others) as waiting:
        try:
            helping = [waiting.submit(help_out) for _ in range(others)]
            take(here)
            for helper in helping:
                helper.result()
        finally:
            left.clear()  # where this was interrupted
    return {name: done[name] for name in names}
