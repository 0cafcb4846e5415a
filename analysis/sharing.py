"""Independent work shared with other processes: whoever is free takes the next piece, of its own group if it can."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

from analysis.garbage import end_sooner

T = TypeVar("T")


def share_work(
    groups: Sequence[Sequence[str]], here: Callable[[str], T], elsewhere: Callable[[str], T], *, others: int
) -> dict[str, T]:
    """Return what became of each name; groups hold those that share what they read, the longest work first.

    A process goes on with the groups it has begun, then begins the next one, then helps with those of others.
    `here(name)` is called in this process, `elsewhere(name)` in each of the others: it and its results are sent by
    pickle. With `others` 0 everything is done here. Raises what a call raised, once those that had begun have ended.
    """
    if others == 0:
        return {name: here(name) for group in groups for name in group}
    left, done = _Left(groups), dict[str, T]()

    def take(work: Callable[[str], T]) -> None:
        own = set[int]()
        while (following := left.next_for(own)) is not None:
            group, name = following
            own.add(group)
            try:
                done[name] = work(name)
            except BaseException:
                left.clear()  # nobody begins any more
                raise

    def help_out() -> None:
        # A pool of one for each thread that waits for it: it is given one name at a time, and one lost is one lost.
        # Spawned: polars' threads do not survive a fork.
        spawning = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawning, initializer=end_sooner) as process:
            take(lambda name: process.submit(elsewhere, name).result())

    with ThreadPoolExecutor(others) as waiting:
        try:
            helping = [waiting.submit(help_out) for _ in range(others)]
            take(here)
            for helper in helping:
                helper.result()
        finally:
            left.clear()  # where this was interrupted
    return done


class _Left:
    """The names that nobody has begun, for several threads."""

    def __init__(self, groups: Sequence[Sequence[str]]) -> None:
        self._groups = [deque(group) for group in groups]
        self._begun = set[int]()
        self._lock = Lock()

    def next_for(self, own: Collection[int]) -> tuple[int, str] | None:
        """Return the next name and its group's place for one who has begun the groups at the places `own`.

        Of those first, then of a group that nobody has begun, then of any; None if no name is left.
        """
        with self._lock:
            places = [place for place, group in enumerate(self._groups) if group]
            if not places:
                return None
            place = min(places, key=lambda place: (place not in own, place in self._begun))  # the first of the best
            self._begun.add(place)
            return place, self._groups[place].popleft()

    def clear(self) -> None:
        with self._lock:
            for group in self._groups:
                group.clear()
